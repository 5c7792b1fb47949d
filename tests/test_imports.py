"""Imports point one way, and importing the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'saq_jax'

# The levels, from the bottom; a module imports from its own level or those above it in this list.
LEVELS = [
  ['_version', '_ste', '_paths', '_convolution'],
  ['_quantizer', '_axes', '_checks'],
  ['quantizers', 'perturbation', 'choices'],
  ['weights', 'transform', 'layers'],
  ['strategies'],
  ['attention', 'oscillation'],
  ['models'],
  ['pretrained'],
  ['data'],
  ['training'],
  ['analysis'],
  ['experiment'],
  ['main'],
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names}

# What each part may bring in from outside the standard library.
ALLOWED = {
  '_version': set(),
  '_ste': {'jax'},
  '_paths': {'jax'},
  '_convolution': {'jax'},
  '_quantizer': {'jax'},
  '_axes': {'jax'},
  '_checks': {'jax', 'optax'},
  'quantizers': {'jax'},
  'weights': {'jax'},
  'perturbation': {'jax', 'optax'},
  'choices': {'jax', 'optax'},
  'transform': {'jax', 'optax'},
  'strategies': {'jax', 'optax'},
  'layers': {'jax', 'flax'},
  'attention': {'jax', 'flax'},
  'oscillation': {'jax', 'optax'},
  'models': {'jax', 'flax', 'numpy'},
  'pretrained': {'jax', 'flax', 'numpy', 'safetensors', 'torch', 'huggingface_hub'},
  'data': {
    *('jax', 'numpy', 'tensorflow_datasets', 'grain', 'sklearn', 'absl', 'PIL', 'cv2', 'rich'),
    'simplejpeg',
  },
}
MODULES = sorted(PACKAGE.rglob('*.py'))


def part_of(module):
  """'training' for saq_jax/training/step.py; '' for the package's own __init__."""
  first = module.relative_to(PACKAGE).parts[0].removesuffix('.py')
  return '' if first == '__init__' else first


def imported(module):
  """Every module that a file imports, wherever in it."""
  for node in ast.walk(ast.parse(module.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{module}: imports are absolute'
      yield node.module
      if node.module == 'saq_jax':
        yield from (f'saq_jax.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('module', MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_imports_point_down(module):
  part = part_of(module)
  if not part:
    return
  for name in imported(module):
    top, _, rest = name.partition('.')
    if top == 'saq_jax' and rest:
      other = rest.split('.')[0]
      assert other in LEVEL, f'{module.name} imports {name}: not a part that has a level'
      same = other == part
      assert same or LEVEL[other] < LEVEL[part], f'{module.name} ({part}) imports {name}'


@pytest.mark.parametrize('module', MODULES, ids=lambda m: str(m.relative_to(PACKAGE)))
def test_each_part_uses_only_its_own_libraries(module):
  allowed = ALLOWED.get(part_of(module))
  if allowed is None:
    return
  outside = {name.split('.')[0] for name in imported(module)} - sys.stdlib_module_names
  assert outside - {'saq_jax'} <= allowed, module


def run_python(code):
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_importing_the_package_loads_jax_and_optax_alone():
  loaded = run_python('import sys, saq_jax; print(*sys.modules)').split()
  heavy = {'flax', 'tensorflow_datasets', 'grain', 'matplotlib', 'orbax', 'tensorflow', 'sklearn'}
  heavy |= {'rich', 'PIL', 'cv2', 'simplejpeg', 'ml_collections', 'tensorboardX'}
  assert not heavy & {name.split('.')[0] for name in loaded}
  assert {'jax', 'optax'} <= set(loaded)


def test_models_and_the_step_work_without_data_and_plot_libraries():
  """With those libraries made unimportable, a whole step runs."""
  print(
    run_python("""
import sys
for name in ('tensorflow_datasets', 'grain', 'matplotlib', 'sklearn', 'PIL', 'cv2', 'simplejpeg'):
  sys.modules[name] = None
import jax, jax.numpy as jnp, optax
from saq_jax.training.build import build_optimizer, build_slot
from saq_jax.training.network import build_network
from saq_jax.training.config import ModelConfig, QuantConfig, SAQConfig, StageConfig
from saq_jax.training.state import new_state
from saq_jax.training.step import StepConfig, train_step
network = build_network(ModelConfig(depth=8, width=2), QuantConfig(), num_classes=3)
optimizer, lr = build_optimizer(StageConfig(), 1.0)
tx = optax.chain(build_slot(network, SAQConfig(), 1.0), optimizer)
state = new_state(network, tx, 0, jnp.ones((1, 8, 8, 1)))
batch = {'image': jnp.ones((4, 8, 8, 1), jnp.uint8), 'label': jnp.array([0, 1, 2, 0])}
config = StepConfig((0.5,), (0.5,))
state, metrics = train_step(state, batch, network=network, tx=tx, lr=lr, config=config)
assert int(state.step) == 1 and float(metrics['loss']) > 0
""")
  )
