"""What `config.init_from` names: checkpoints of this package, and what several processes take."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from test_given import TX, begin, settings

from saq_jax._paths import named_leaves
from saq_jax.training import given as given_module
from saq_jax.training.bounds import ConfigError
from saq_jax.training.build import build_slot
from saq_jax.training.checkpoint import Checkpoints
from saq_jax.training.config import SAQConfig
from saq_jax.training.given import given_weights
from saq_jax.training.network import build_network
from saq_jax.training.parsing import default_config, parse, to_json
from saq_jax.training.state import new_state
from saq_jax.training.workdir import MARK, PIN, WorkdirError, write_json


@pytest.fixture
def workdir(tmp_path_factory):
  """Makes a work directory of a name."""
  return tmp_path_factory.mktemp


@pytest.fixture
def own_run(tmp_path):
  """A run of PreResNet-8 at 4 bits with five classes, as its work directory."""
  config = parse(default_config(), {'model.width': '4'})
  network = build_network(config.model, config.quant, 5)
  tx = optax.chain(build_slot(network, SAQConfig(), 1), TX)
  state = new_state(network, tx, 1, jnp.ones((1, 8, 8, 1)))
  folder = tmp_path / 'run'
  with Checkpoints(folder / 'saq' / 'checkpoints') as checkpoints:
    checkpoints.save(3, state)
  write_json(folder / MARK, {'config': to_json(config)})
  return folder, state


def test_an_own_checkpoint_with_another_head(own_run, workdir, capsys):
  folder, state = own_run
  config = settings(folder, **{'model.width': '4'})
  given = given_weights(config, 9, (8, 8, 1), workdir('new'))
  assert given.fresh == {'params/fc/kernel', 'params/fc/bias'}
  said = capsys.readouterr().out
  assert f'weights from {folder / "saq" / "checkpoints" / "3"}, trained with quantizers' in said
  assert 'head replaced' in said
  assert given.quantized
  model, _, scales = given.weights
  kept = 'layer1_0/conv1/kernel'
  assert kept in scales
  assert 'fc/kernel' not in scales
  np.testing.assert_array_equal(
    named_leaves(model)[kept], named_leaves(state.params['model'])[kept]
  )
  started = begin(given, config, 9, (8, 8, 1))
  assert started.params['model']['fc']['kernel'].shape[-1] == 9
  assert started.params['scales']['fc/kernel'].shape == ()


def test_what_a_run_took_from_its_weights_goes_with_its_own(own_run, workdir):
  folder, _ = own_run
  write_json(folder / PIN, {'source': 'anywhere', 'model': {'norm_eps': 1e-3}})
  given = given_weights(settings(folder, **{'model.width': '4'}), 5, (8, 8, 1), workdir('new'))
  assert given.model.norm_eps == 1e-3
  other = settings(folder, **{'model.width': '4', 'model.norm_eps': '1e-5'})
  with pytest.raises(ConfigError, match=r'norm_eps=0\.001, and config\.model\.norm_eps=1e-05'):
    given_weights(other, 5, (8, 8, 1), workdir('other'))


@pytest.mark.parametrize('overrides', [{}, {'quant.bits': '3'}, {'quant.weights': 'lsq'}])
def test_weights_trained_with_quantizers_are_no_full_precision_network(own_run, workdir, overrides):
  """Also where their scales do not come along; those of a float stage are one."""
  folder, _ = own_run
  settled = settings(folder, **{'model.width': '4'}, **overrides)
  given = given_weights(settled, 5, (8, 8, 1), workdir('new'))
  assert given.quantized
  assert not given.floating
  (folder / 'saq').rename(folder / 'float')
  plain = {'params': {}, 'batch_stats': given.weights[1]}
  model = {p: x for p, x in named_leaves(given.weights[0]).items() if 'quant_scale' not in p}
  plain['params'] = {'model': traverse_util.unflatten_dict(model, sep='/'), 'scales': {}}
  shutil.rmtree(folder / 'float')
  with Checkpoints(folder / 'float' / 'checkpoints') as checkpoints:
    checkpoints.save(3, plain)
  assert given_weights(settled, 5, (8, 8, 1), workdir('float_run')).floating


# ---- Several processes


@pytest.fixture
def second(monkeypatch):
  """Makes this process the second of two, which hears what the first has noted."""

  def become(note):
    monkeypatch.setattr(jax, 'process_index', lambda: 1)
    monkeypatch.setattr(given_module, 'from_first', lambda text: json.dumps(note))

  return become


def test_a_process_takes_the_weights_that_the_first_has_chosen(own_run, workdir, second):
  """Also where it finds newer ones itself."""
  folder, state = own_run
  config = settings(folder, **{'model.width': '4'})
  first, other = workdir('first'), workdir('other')
  given_weights(config, 5, (8, 8, 1), first)
  note = json.loads((first / PIN).read_text())
  with Checkpoints(folder / 'saq' / 'checkpoints') as checkpoints:
    checkpoints.save(4, jax.tree.map(lambda x: x + 1, state))
  second(note)
  model, _, _ = given_weights(config, 5, (8, 8, 1), other).weights
  jax.tree.map(np.testing.assert_array_equal, model, state.params['model'])
  assert not (other / PIN).exists()  # the first has written it


def test_a_process_ends_where_the_first_has_no_weights(own_run, workdir, second):
  folder, _ = own_run
  second(None)
  with pytest.raises(ConfigError, match='another process cannot use it, and tells why'):
    given_weights(settings(folder, **{'model.width': '4'}), 5, (8, 8, 1), workdir('new'))


def test_a_note_that_the_disk_does_not_take_is_one_line(own_run, workdir, monkeypatch):
  def fail(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(given_module, 'write_json', fail)
  with pytest.raises(WorkdirError, match=r'cannot be used \(No space left on device\)'):
    given_weights(settings(own_run[0], **{'model.width': '4'}), 5, (8, 8, 1), workdir('new'))
