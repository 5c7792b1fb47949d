"""Every experiment in configs/ builds, and its whole training step traces on abstract values."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from saq_jax._paths import is_quant_scale, named_leaves
from saq_jax.analysis.cost_table import image_shape
from saq_jax.training.flags import read_flags
from saq_jax.training.parsing import to_json
from saq_jax.training.stages import make_stage
from saq_jax.training.state import new_state
from saq_jax.training.step import train_step

CONFIGS = sorted((Path(__file__).parent.parent / 'configs').glob('*.py'))
# Of public figures: parameters for 1,000 classes, less the head, which each dataset has its own of.
PARAMETERS = {
  'resnet18': 11_689_512,
  'resnet34': 21_797_672,
  'resnet50': 25_557_032,
  'mobilenetv2_4bit': 3_504_872,
  'vitb16_4bit': 86_567_656,
  'vits16_4bit': 22_050_664,
  'deit_ti': 5_717_416,
  'deit_s': 22_050_664,
}


@dataclasses.dataclass
class Shapes:
  """A dataset of which only the sizes are known."""

  image_shape: tuple[int, ...]
  num_classes: int

  def __len__(self):
    return 50_000


@functools.cache
def begun(path):
  """The saq stage of a config, its first state and a batch for it, all of them abstract."""
  config, _, _ = read_flags([f'--config={path}'])
  shape, classes = image_shape(config.data)
  stage = make_stage(config, 'saq', Shapes(shape, classes))
  begin = functools.partial(new_state, stage.network, stage.tx, 0)
  state = jax.eval_shape(begin, jax.ShapeDtypeStruct((2, *shape), jnp.float32))
  images = jax.ShapeDtypeStruct((2, *shape), jnp.uint8)
  batch = {'image': images, 'label': jax.ShapeDtypeStruct((2,), jnp.int32)}
  return config, stage, state, batch


def same_step(config):
  """What configs have in common whose steps differ in numbers of bits and classes alone."""
  bits = dict.fromkeys(('bits', 'act_bits'))
  settings = to_json(config)
  data = {key: settings['data'][key] for key in ('mean', 'std')}
  names = ('model', 'saq', 'strategy', 'augment', 'quant_stage', 'mesh', 'watch')
  kept = {name: settings[name] for name in names}
  return json.dumps([kept, settings['quant'] | bits, data, image_shape(config.data)[0]])


def of_each_step():
  """The first config of each kind of step."""
  first = {}
  for path in CONFIGS:
    first.setdefault(same_step(read_flags([f'--config={path}'])[0]), path)
  return list(first.values())


@pytest.mark.parametrize('path', of_each_step(), ids=lambda p: p.stem)
def test_a_whole_step_traces(path):
  _, stage, before, batch = begun(path)
  step = functools.partial(
    train_step, network=stage.network, tx=stage.tx, lr=stage.lr, config=stage.step
  )
  after, metrics = jax.eval_shape(step, before, batch)
  assert jax.tree.structure(after) == jax.tree.structure(before)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
    lambda x: (x.shape, x.dtype), before
  )
  assert metrics['loss_perturbed'].shape == ()


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_every_kernel_has_the_bits_that_the_name_says(path):
  config, stage, before, _ = begun(path)
  # But for the two ends.
  kernels = stage.network.quantize.assign(before.params['model'])
  named = int(re.search(r'_(\d)bit', path.stem)[1])
  inner = [p for p in kernels if not re.fullmatch(stage.network.model.first_kernel, p)]
  inner = [p for p in inner if not re.fullmatch(stage.network.model.last_kernel, p)]
  assert {kernels[p].bits for p in inner} == {named} == {config.quant.act_bits}
  assert len(kernels) - len(inner) == 2
  assert {kernels[p].bits for p in kernels if p not in inner} == {8}
  leaves = named_leaves(before.params['model'])
  assert set(kernels) == {p for p in leaves if p.endswith('kernel')}
  count = sum(x.size for p, x in leaves.items() if not is_quant_scale(p))
  known = [n for name, n in PARAMETERS.items() if path.stem.startswith(name)]
  if known and stage.network.model.num_classes == 1000:
    assert count == known[0]


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_its_docstring_says_command_row_recipe_and_hardware(path):
  text = path.read_text(encoding='utf-8')
  docstring = ' '.join(text.split('"""')[1].split())
  assert f'python -m saq_jax.main --config configs/{path.name}' in docstring
  if not path.stem.startswith('digits'):
    assert re.search(r'[Pp]aper', docstring)
    assert 'Recipe: [' in docstring
    assert 'Hardware and hours' in docstring


def test_every_experiment_of_the_paper_has_a_file():
  names = {path.stem for path in CONFIGS}
  wanted = {'vitb16_4bit', 'vits16_4bit', 'deit_ti_4bit', 'deit_s_4bit', 'resnet34_4bit'}
  wanted |= {f'resnet{depth}_{bits}bit' for depth in (18, 50) for bits in (4, 3, 2)}
  wanted |= {'mobilenetv2_4bit', 'preresnet20_4bit_cifar10'}
  wanted |= {f'{net}_{b}bit_cifar100' for net in ('preresnet20', 'mobilenetv2') for b in (4, 3)}
  assert wanted | {'vitb16_4bit_flowers102', 'vitb16_4bit_pets'} <= names
