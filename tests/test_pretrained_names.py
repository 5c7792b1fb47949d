"""Names and layouts of every format, and which format a file is in."""

import functools
import json

import authors_networks as authors
import jax
import numpy as np
import pytest
import torch_names
from flax import traverse_util
from make_parity_record import CASES, images, weights
from test_pretrained_parity import REFERENCE, our_model, write_record

from saq_jax.models.mobilenetv2 import MobileNetV2, MobileNetV2Cifar
from saq_jax.models.preresnet import PreResNet
from saq_jax.models.resnet import ResNet
from saq_jax.models.vit import ViT
from saq_jax.pretrained.errors import PretrainedError
from saq_jax.pretrained.files import WeightFile, open_weights
from saq_jax.pretrained.formats import detect
from saq_jax.pretrained.load import load_pretrained, model_leaves
from saq_jax.quantizers import LIQ

LIBRARY = {'hf': 'Hugging Face', 'torchvision': 'torchvision', 'timm': 'timm'}
ACT = LIQ(bits=4, signed=False)
AUTHORS = {
  'resnet18': lambda **acts: ResNet(10, depth=18, **acts),
  'resnet50': lambda **acts: ResNet(10, depth=50, **acts),
  'mobilenetv2': lambda **acts: MobileNetV2(10, **acts),
  'mobilenetv2_cifar': lambda **acts: MobileNetV2Cifar(10, **acts),
}


@pytest.mark.parametrize('case', CASES)
def test_the_format_is_told_by_the_names(case, tmp_path):
  write_record(case, tmp_path)
  tensors = open_weights(str(tmp_path)).tensors
  for beginning in ('', 'module.', '_orig_mod.', 'module._orig_mod.', 'backbone.'):
    form = detect(WeightFile({beginning + name: x for name, x in tensors.items()}))
    assert form.family == CASES[case].family
    assert LIBRARY[case.split('_')[0]] in form.library


def test_names_of_no_format_are_shown():
  names = [f'encoder.block{i}.weight' for i in range(9)]
  file = WeightFile(dict.fromkeys(names, np.zeros(2)), description='x.npz')
  with pytest.raises(PretrainedError) as error:
    detect(file)
  message = str(error.value)
  assert message.startswith('x.npz: its 9 tensors are named as in no known format of MobileNetV2')
  assert message.endswith('block5.weight, ...')


def leaves(loaded):
  tree = {'params': loaded.params, 'batch_stats': loaded.batch_stats}
  return traverse_util.flatten_dict(tree, sep='/')


def test_the_authors_preresnet_with_clips():
  """Against the reader of the tests of whole steps."""
  model = PreResNet(100, depth=20, act=ACT, last_act=ACT, first_act=ACT)
  loaded = load_pretrained(f'{torch_names.RECORD}#after3', model, (32, 32, 3))
  params, stats = torch_names.read(np.load(torch_names.RECORD), 'after3')
  expected = traverse_util.flatten_dict({'params': params['model'], 'batch_stats': stats}, sep='/')
  found = leaves(loaded)
  assert found.keys() == expected.keys()
  for path, x in expected.items():
    np.testing.assert_array_equal(found[path], x)
  assert loaded.scales.keys() == params['scales'].keys()
  for path, x in params['scales'].items():
    assert loaded.scales[path] == x
    assert loaded.scales[path].shape == ()
  assert not loaded.fresh
  assert 'PreResNet, SAQ names' in loaded.message
  assert f'{len(loaded.scales)} scales of weights' in loaded.message


def write_authors(case, path, *, clips):
  """A checkpoint with all of the authors' names; gives the tensors by name."""
  model = AUTHORS[case](act=ACT, last_act=ACT)
  wanted = model_leaves(model, (32, 32, 3))
  names = [str(name) for name in np.load(authors.RECORD)[f'{case}/names']]
  norms = {name.rpartition('.')[0] for name in names if name.endswith('.bias')} - {'fc', 'linear'}
  names += [f'{norm}.{part}' for norm in norms for part in ('running_mean', 'running_var')]
  tensors = {}
  for name in names:
    if name.endswith('clip_value'):
      if clips:
        tensors[name] = -np.abs(weights(name, (1,)))
      continue
    collection, ours = authors.our_path(name)
    leaf = wanted[f'{collection.replace("model", "params")}/{ours}']
    tensors[name] = weights(name, authors.their_shape(leaf.shape))
  np.savez(path, **tensors)
  return tensors


@pytest.mark.parametrize('case', AUTHORS)
def test_the_authors_other_networks(case, tmp_path):
  path = tmp_path / 'checkpoint.npz'
  model = AUTHORS[case](act=ACT, last_act=ACT)
  tensors = write_authors(case, path, clips=True)
  loaded = load_pretrained(str(path), model, (32, 32, 3))
  found = leaves(loaded)
  assert found.keys() == model_leaves(model, (32, 32, 3)).keys()
  for name, x in tensors.items():
    if (place := authors.our_path(name)) is None:
      continue
    collection, ours = place
    if collection == 'scales':
      held = loaded.scales[ours]
    else:
      held = found[f'{collection.replace("model", "params")}/{ours}']
    # Clips count by their absolute value, and train on with their sign.
    clip = name.endswith('clip_value')
    np.testing.assert_array_equal(held, x[0] if clip else authors.our_layout(x))


def test_the_authors_clips_where_nothing_takes_them(tmp_path):
  path = tmp_path / 'checkpoint.npz'
  write_authors('resnet18', path, clips=True)
  plain = AUTHORS['resnet18']()
  loaded = load_pretrained(str(path), plain, (32, 32, 3), scale_paths=['fc/kernel'])
  assert leaves(loaded).keys() == model_leaves(plain, (32, 32, 3)).keys()
  assert list(loaded.scales) == ['fc/kernel']
  assert '20 scales of activations left out' in loaded.message
  assert '20 scales of weights left out' in loaded.message
  quantized = AUTHORS['resnet18'](act=ACT, last_act=ACT)
  loaded = load_pretrained(str(path), quantized, (32, 32, 3), keep_scales=False)
  assert leaves(loaded).keys() == model_leaves(plain, (32, 32, 3)).keys()
  assert not loaded.scales
  assert '41 clips left out: this run quantizes otherwise' in loaded.message
  write_authors('resnet18', path, clips=False)
  loaded = load_pretrained(str(path), quantized, (32, 32, 3))
  assert leaves(loaded).keys() == model_leaves(plain, (32, 32, 3)).keys()
  assert 'left out' not in loaded.message


def google_names(heads):
  """The published names of AugReg's archives, made from the tensors of Hugging Face's record."""
  record = np.load(REFERENCE / 'parity_hf_vit.npz')
  shapes = json.loads(str(record['about']))['shapes']
  theirs = {
    name.removeprefix('vit.'): weights(name, tuple(shape)) for name, shape in shapes.items()
  }
  width = theirs['layernorm.bias'].size
  split = (heads, width // heads)
  found = {
    'cls': theirs['embeddings.cls_token'],
    'embedding/kernel': np.einsum(
      'oihw->hwio', theirs['embeddings.patch_embeddings.projection.weight']
    ),
    'embedding/bias': theirs['embeddings.patch_embeddings.projection.bias'],
    'Transformer/posembed_input/pos_embedding': theirs['embeddings.position_embeddings'],
    'Transformer/encoder_norm/scale': theirs['layernorm.weight'],
    'Transformer/encoder_norm/bias': theirs['layernorm.bias'],
    'head/kernel': theirs['classifier.weight'].T,
    'head/bias': theirs['classifier.bias'],
  }
  for i in range(2):
    block, layer = f'Transformer/encoderblock_{i}', f'encoder.layer.{i}'
    attention = f'{block}/MultiHeadDotProductAttention_1'
    for name in ('query', 'key', 'value'):
      held = f'{layer}.attention.attention.{name}'
      found[f'{attention}/{name}/kernel'] = theirs[f'{held}.weight'].T.reshape(width, *split)
      found[f'{attention}/{name}/bias'] = theirs[f'{held}.bias'].reshape(split)
    out = theirs[f'{layer}.attention.output.dense.weight'].T
    found[f'{attention}/out/kernel'] = out.reshape(*split, width)
    found[f'{attention}/out/bias'] = theirs[f'{layer}.attention.output.dense.bias']
    for j, held in ((0, 'layernorm_before'), (2, 'layernorm_after')):
      found[f'{block}/LayerNorm_{j}/scale'] = theirs[f'{layer}.{held}.weight']
      found[f'{block}/LayerNorm_{j}/bias'] = theirs[f'{layer}.{held}.bias']
    for j, held in enumerate(('intermediate.dense', 'output.dense')):
      found[f'{block}/MlpBlock_3/Dense_{j}/kernel'] = theirs[f'{layer}.{held}.weight'].T
      found[f'{block}/MlpBlock_3/Dense_{j}/bias'] = theirs[f'{layer}.{held}.bias']
  return found


def test_googles_archive_computes_what_hugging_face_recorded(tmp_path):
  np.savez(tmp_path / 'Ti_16.npz', **google_names(heads=2))
  model = ViT(5, norm_eps=1e-12, **CASES['hf_vit'].fields)
  loaded = load_pretrained(str(tmp_path / 'Ti_16.npz'), model, (12, 12, 3))
  assert 'ViT, Google names, 40 tensors' in loaded.message
  forward = jax.jit(functools.partial(model.apply, train=False))
  logits = forward({'params': loaded.params}, images(12))
  recorded = np.load(REFERENCE / 'parity_hf_vit.npz')['logits']
  assert np.abs(logits - recorded).max() < 1e-5 * np.abs(recorded).max()


def test_googles_layer_before_the_head_goes_with_the_head(tmp_path):
  path = tmp_path / 'i21k.npz'
  further = {'pre_logits/kernel': np.eye(16), 'pre_logits/bias': np.zeros(16)}
  np.savez(path, **google_names(heads=2), **further)
  kept, replaced = (ViT(n, **CASES['hf_vit'].fields) for n in (5, 7))
  with pytest.raises(PretrainedError, match=r'a further layer before its head \(pre_logits/kernel'):
    load_pretrained(str(path), kept, (12, 12, 3))
  loaded = load_pretrained(str(path), replaced, (12, 12, 3))
  assert loaded.fresh == {'params/head/kernel', 'params/head/bias'}
  assert 'pre_logits/kernel left out' in loaded.message


def test_a_merge_stands_in_older_files_at_the_end_of_a_stage(tmp_path):
  """The same weights under both of the names that timm has used give the same parameters."""
  write_record('timm_swin', tmp_path)
  file = open_weights(str(tmp_path))
  renamed = {}
  for name, x in file.tensors.items():
    parts = name.replace('head.fc', 'head').split('.')
    if 'downsample' in parts:
      parts[1] = str(int(parts[1]) - 1)
    renamed['.'.join(parts)] = x
  older = WeightFile(renamed, description='older')
  assert 'Microsoft' in detect(older).library
  model = our_model('timm_swin', tmp_path)
  new, old = (load_pretrained(each, model, (40, 40, 3)).params for each in (file, older))
  assert jax.tree.all(jax.tree.map(np.array_equal, new, old))
