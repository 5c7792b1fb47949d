"""What `config.init_from` names: public files and own checkpoints, chosen once for a whole run."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import torch_names

from saq_jax._paths import named_leaves
from saq_jax.training.bounds import ConfigError
from saq_jax.training.build import build_optimizer
from saq_jax.training.config import StageConfig
from saq_jax.training.given import given_weights
from saq_jax.training.network import build_network
from saq_jax.training.parsing import default_config, parse
from saq_jax.training.state import new_state, state_from_weights
from saq_jax.training.workdir import PIN

VIT = {
  'model.name': 'vit',
  'model.size': 'B',
  'model.depth': '2',
  'model.width': '16',
  'model.heads': '2',
  'model.patch': '4',
  'quant.weights': 'lsq',
  'quant.acts': 'lsq',
}
TX = optax.chain(build_optimizer(StageConfig(), 1)[0])


@pytest.fixture
def hf_vit(tmp_path):
  """A directory as transformers writes it: width 16, two blocks, five classes, 12 pixels."""
  shutil.copytree(Path(__file__).parent / 'reference' / 'hf_vit', tmp_path / 'hf_vit')
  return tmp_path / 'hf_vit'


@pytest.fixture
def workdir(tmp_path):
  """Makes a work directory of its own."""

  def make(name='workdir'):
    (tmp_path / name).mkdir()
    return tmp_path / name

  return make


def settings(init_from, **overrides):
  return parse(default_config(), {**overrides, 'init_from': str(init_from)})


def begin(given, config, classes, shape):
  """The first state of a run from given weights."""
  network = build_network(given.model, config.quant, classes)
  return state_of(network, shape, given.weights, given.fresh)


def state_of(network, shape, weights, fresh=frozenset()):
  """As one program, which is compiled in a twentieth of the time of its operations."""
  return jax.jit(
    lambda: state_from_weights(network, TX, 0, jnp.ones((2, *shape)), *weights, fresh=fresh)
  )()


def test_a_hugging_face_directory(hf_vit, tmp_path, capsys):
  config = settings(hf_vit, **VIT)
  given = given_weights(config, 5, (12, 12, 3), tmp_path)
  assert given.model == dataclasses.replace(config.model, norm_eps=1e-12)
  assert given.fresh == frozenset()
  file = safetensors.numpy.load_file(hf_vit / 'model.safetensors')
  params = begin(given, config, 5, (12, 12, 3)).params
  query = params['model']['block_1']['attn']['q']['kernel']
  (name,) = (n for n in file if '.1.' in n and n.endswith(('query.weight', 'q_proj.weight')))
  np.testing.assert_array_equal(query, file[name].T)
  np.testing.assert_array_equal(params['model']['head']['kernel'], file['classifier.weight'].T)
  assert 'weights from' in (said := capsys.readouterr().out)
  assert 'ViT, Hugging Face names' in said
  assert 'head' not in said


def test_a_head_for_other_classes_begins_anew(hf_vit, tmp_path, capsys):
  config = settings(hf_vit, **VIT)
  given = given_weights(config, 7, (12, 12, 3), tmp_path)
  assert given.fresh == {'params/head/kernel', 'params/head/bias'}
  assert 'head replaced: the file has 5 classes, this run 7' in capsys.readouterr().out
  state = begin(given, config, 7, (12, 12, 3))
  network = build_network(given.model, config.quant, 7)
  fresh = jax.jit(lambda: new_state(network, TX, 0, jnp.ones((2, 12, 12, 3))))()
  # To the last bit or so: they are drawn in two programs.
  np.testing.assert_allclose(
    state.params['model']['head']['kernel'], fresh.params['model']['head']['kernel'], rtol=1e-6
  )


def test_the_same_weights_for_the_whole_run(hf_vit, tmp_path):
  config = settings(hf_vit, **VIT)
  first = given_weights(config, 5, (12, 12, 3), tmp_path)
  again = given_weights(config, 5, (12, 12, 3), tmp_path)
  jax.tree.map(np.testing.assert_array_equal, first.weights, again.weights)
  tensors = safetensors.numpy.load_file(hf_vit / 'model.safetensors')
  tensors['classifier.bias'] = tensors['classifier.bias'] + 1
  safetensors.numpy.save_file(tensors, hf_vit / 'model.safetensors')
  with pytest.raises(ConfigError, match=r'init_from: .* has changed since this run began'):
    given_weights(config, 5, (12, 12, 3), tmp_path)


@pytest.mark.parametrize(
  ('overrides', 'words'),
  [
    ({**VIT, 'model.norm_eps': '1e-6'}, r'norm_eps=1e-12, and config\.model\.norm_eps=1e-06'),
    ({**VIT, 'model.width': '32'}, r'width 16, and the model has width 32'),
    ({**VIT, 'model.depth': '3'}, r'depth 2, and the model has depth 3'),
    ({**VIT, 'model.heads': '4'}, r'heads=2'),
    ({'model.name': 'resnet'}, r'ViT .*ResNet'),
    ({'model.name': 'swin', 'model.size': 'T'}, r'ViT .*Swin'),
  ],
)
def test_weights_of_another_network(hf_vit, tmp_path, overrides, words):
  size = 12 if 'model.patch' in overrides else 32
  with pytest.raises(ConfigError, match=f'config.init_from: (?s:.)*{words}'):
    given_weights(settings(hf_vit, **overrides), 5, (size, size, 3), tmp_path)
  assert not (tmp_path / PIN).exists()


def damaged(folder, kind):
  """Damages a file of weights in one way."""
  path = folder / 'model.safetensors'
  if kind == 'truncated':
    path.write_bytes(path.read_bytes()[:-100])
    return
  tensors = safetensors.numpy.load_file(path)
  name = next(n for n in tensors if n.endswith('fc1.weight') or 'intermediate.dense.weight' in n)
  if kind == 'transposed':
    tensors[name] = np.ascontiguousarray(tensors[name].T)
  elif kind == 'nan':
    tensors[name][3, 2] = np.nan
  else:
    del tensors[name]
  safetensors.numpy.save_file(tensors, path)


@pytest.mark.parametrize(
  ('kind', 'words'),
  [
    ('truncated', r'damaged or cut short'),
    ('transposed', r'would fit transposed'),
    ('nan', r'1 values of 1024 that are NaN'),
    ('missing', r'\(missing\) .*block_0/mlp/fc1/kernel'),
  ],
)
def test_damaged_weights(hf_vit, tmp_path, kind, words):
  damaged(hf_vit, kind)
  with pytest.raises(ConfigError, match=f'config.init_from: (?s:.)*{words}'):
    given_weights(settings(hf_vit, **VIT), 5, (12, 12, 3), tmp_path)


def test_other_normalisation_is_told(hf_vit, workdir, capsys):
  told = {'image_mean': [0.5] * 3, 'image_std': [0.5] * 3}
  (hf_vit / 'preprocessor_config.json').write_text(json.dumps(told))
  given_weights(settings(hf_vit, **VIT), 5, (12, 12, 3), workdir('a'))
  assert '--config.data.mean=0.5,0.5,0.5 --config.data.std=0.5,0.5,0.5' in capsys.readouterr().out
  same = {'data.mean': '0.5,0.5,0.5', 'data.std': '0.5,0.5,0.5'}
  given_weights(settings(hf_vit, **VIT, **same), 5, (12, 12, 3), workdir('b'))
  assert '--config.data.mean' not in capsys.readouterr().out


def test_an_authors_checkpoint_brings_its_clips(workdir, capsys):
  config = settings(f'{torch_names.RECORD}#after1', **{'model.depth': '20', 'model.width': '16'})
  given = given_weights(config, 100, (32, 32, 3), workdir())
  record = np.load(torch_names.RECORD)
  params, stats = torch_names.read(record, 'after1')
  ours, theirs = (
    named_leaves({'model': model, 'scales': scales, 'stats': batch_stats})
    for model, batch_stats, scales in (
      given.weights,
      (params['model'], stats, params['scales']),
    )
  )
  assert ours.keys() == theirs.keys()
  for name, x in theirs.items():
    np.testing.assert_allclose(ours[name], x, rtol=1e-7)
  # Steps of LSQ are no clips.
  lsq = settings(
    f'{torch_names.RECORD}#after1',
    **{'model.depth': '20', 'model.width': '16', 'quant.weights': 'lsq'},
  )
  capsys.readouterr()
  _, _, scales = given_weights(lsq, 100, (32, 32, 3), workdir('lsq')).weights
  assert scales == {}
  assert 'clips left out' in capsys.readouterr().out


def test_weights_in_float64_stay_so_where_jax_has_it(workdir):
  """A whole step can then be held against a record in float64, from a file on."""
  config = settings(f'{torch_names.RECORD}#init', **{'model.depth': '20', 'model.width': '16'})
  params, stats = torch_names.read(np.load(torch_names.RECORD), 'init')
  with jax.enable_x64(True):
    model, batch_stats, scales = given_weights(config, 100, (32, 32, 3), workdir()).weights
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64) / 3, (model, batch_stats, scales))
    network = build_network(config.model, config.quant, 100)
    state = state_of(network, (32, 32, 3), wide)
    ours, theirs = (
      named_leaves(tree) for tree in ((state.params, state.batch_stats), (params, stats))
    )
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
      np.testing.assert_array_equal(ours[name], x / 3)
      assert ours[name].dtype == np.float64
  plain = state_of(network, (32, 32, 3), wide)
  assert {x.dtype for x in jax.tree.leaves(plain.params)} == {np.dtype('float32')}


def test_authors_clips_that_are_dropped_still_tell_of_quantizers(workdir):
  size = {'model.depth': '20', 'model.width': '16'}
  for acts in ('liq', 'lsq'):
    config = settings(f'{torch_names.RECORD}#init', **size, **{'quant.acts': acts})
    assert given_weights(config, 100, (32, 32, 3), workdir(acts)).quantized


def test_weights_that_are_gone_when_a_run_goes_on(hf_vit, tmp_path):
  config = settings(hf_vit, **VIT)
  given_weights(config, 5, (12, 12, 3), tmp_path)
  shutil.rmtree(hf_vit)
  with pytest.raises(ConfigError, match=r'This run began from it: put it back'):
    given_weights(config, 5, (12, 12, 3), tmp_path)


def test_what_a_file_does_not_tell_is_said(hf_vit, workdir, capsys):
  (hf_vit / 'config.json').unlink()
  given_weights(settings(hf_vit, **VIT), 5, (12, 12, 3), workdir())
  said = capsys.readouterr().out
  assert "no config.json beside it: taken with norm_eps=1e-06; that library's own default" in said
  assert 'does not tell the number of heads: the model has 2' in said


@pytest.mark.parametrize(
  ('source', 'words'),
  [
    ('timm/resnet18.tv_in1k', r'write hf://timm/resnet18\.tv_in1k'),
    ('nowhere', 'no such directory'),
    ('nowhere.safetensors', 'no such file'),
    ('hf://not/there', r'hf://not/there could not be fetched|not installed'),
  ],
)
def test_nothing_there(tmp_path, monkeypatch, source, words):
  monkeypatch.setenv('HF_HUB_OFFLINE', '1')
  source = source if '/' in source else str(tmp_path / source)
  with pytest.raises(ConfigError, match=f'config.init_from: .*({words})'):
    given_weights(settings(source, **VIT), 5, (12, 12, 3), tmp_path)
