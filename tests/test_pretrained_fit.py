"""What is changed to make weights fit a model, and what is refused."""

import re

import jax
import numpy as np
import pytest
from flax import traverse_util
from make_parity_record import CASES, KEPT, weights
from test_pretrained_names import google_names
from test_pretrained_parity import our_model, write_record

from saq_jax.models.mobilenetv2 import MobileNetV2
from saq_jax.models.preresnet import PreResNet
from saq_jax.models.resnet import ResNet
from saq_jax.models.swin import resize_relative_bias
from saq_jax.models.vit import ViT, resize_position_embedding
from saq_jax.pretrained.errors import PretrainedError
from saq_jax.pretrained.files import WeightFile, open_weights
from saq_jax.pretrained.fit import fit
from saq_jax.pretrained.load import load_pretrained, model_leaves
from saq_jax.pretrained.settings import image_statistics, model_settings
from saq_jax.quantizers import LSQ

SMALL = PreResNet(3, depth=8, width=2)
WANTED = model_leaves(SMALL, (8, 8, 1))
GIVEN = {path: weights(path, leaf.shape) for path, leaf in WANTED.items()}


def refused(words, given, wanted=WANTED):
  with pytest.raises(PretrainedError, match=re.escape(words)) as error:
    fit(given, wanted, last_kernel='fc/kernel')
  return str(error.value)


def test_leaves_that_fit_stay_as_they_are():
  fitted = fit(GIVEN, WANTED, last_kernel='fc/kernel', scales={'fc/kernel': 1.0})
  assert fitted.leaves == GIVEN
  assert fitted.scales == {'fc/kernel': 1.0}
  assert (fitted.fresh, fitted.notes) == (frozenset(), ())


def test_a_head_for_other_classes_begins_anew():
  """The scale of its weight is dropped; that of its input, which is the same, stays."""
  act = LSQ(bits=4, signed=False)
  wanted = model_leaves(PreResNet(5, depth=8, width=2, act=act, last_act=act), (8, 8, 1))
  given = GIVEN | {'params/fc/input/quant_scale': np.float32(0.3)}
  scales = {'fc/kernel': 1.0, 'layer1_0/conv1/kernel': 2.0, 'layer1_0/conv2/kernel': 3.0}
  fitted = fit(
    given, wanted, last_kernel='fc/kernel', scales=scales, scale_paths=['layer1_0/conv1/kernel']
  )
  assert fitted.fresh == {'params/fc/kernel', 'params/fc/bias'}
  assert fitted.leaves.keys() == given.keys() - fitted.fresh
  assert fitted.scales == {'layer1_0/conv1/kernel': 2.0}
  assert fitted.notes == (
    'head replaced: the file has 3 classes, this run 5',
    '1 scales of weights left out: the run does not quantize those',
  )


def test_a_file_without_a_head():
  given = {path: x for path, x in GIVEN.items() if '/fc/' not in path}
  fitted = fit(given, WANTED, last_kernel='fc/kernel')
  assert fitted.fresh == {'params/fc/kernel', 'params/fc/bias'}
  assert fitted.notes == ('new head for 3 classes: the file has none',)


def test_a_table_of_what_does_not_fit():
  given = dict(GIVEN)
  del given['params/layer1_0/bn1/bias']
  given['params/layer1_0/other'] = np.zeros((1, 1, 2, 2))
  given['params/layer2_0/conv1/kernel'] = np.zeros((3, 3, 4, 2))
  words = 'does not fit the model; tensors missing 1, of another shape 1, unknown 1:'
  lines = refused(words, given).splitlines()
  rows = [re.split(r'\s{2,}', line.strip()) for line in lines[1:]]
  path = 'params/layer2_0/conv1/kernel'
  assert rows == [
    ['in the file', 'shape there', 'here', 'shape here', 'wanted'],
    [path, '3x3x4x2', path, '3x3x4x2', '3x3x2x4'],
    ['(missing)', 'params/layer1_0/bn1/bias', '2'],
    ['params/layer1_0/other', '1x1x2x2', '(unknown)', '1x1x2x2'],
  ]


def test_a_long_table_is_cut():
  given = {path: x for path, x in GIVEN.items() if 'bn' not in path}
  words = 'does not fit the model; tensors missing 28, of another shape 0, unknown 0'
  assert len(refused(words, given).splitlines()) == 6


def test_a_kernel_stored_transposed_is_recognised(tmp_path):
  tensors = dict(open_weights(str(KEPT)).tensors)
  name = 'vit.encoder.layer.0.intermediate.dense.weight'
  tensors[name] = np.ascontiguousarray(tensors[name].T)
  model = our_model('hf_vit', KEPT)
  with pytest.raises(PretrainedError, match=f'{name} would fit transposed') as error:
    load_pretrained(WeightFile(tensors), model, (12, 12, 3))
  assert 'block_0/mlp/fc1/kernel  64x16       16x64' in str(error.value)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_values_that_are_not_finite(bad):
  given = dict(GIVEN)
  given['params/fc/kernel'] = np.where(
    np.arange(24).reshape(8, 3) < 2, bad, GIVEN['params/fc/kernel']
  )
  refused('the checkpoint: params/fc/kernel has 2 values of 24 that are NaN or infinite', given)


def test_integers_where_floats_are_wanted():
  given = GIVEN | {'params/fc/kernel': np.zeros((8, 3), np.int8)}
  refused('params/fc/kernel is of int8, where floats are wanted', given)


@pytest.mark.parametrize(
  ('model', 'words'),
  [
    (PreResNet(3, depth=14, width=2), 'depth 8, and the model has depth 14'),
    (PreResNet(3, depth=8, width=4), 'width 2, and the model has width 4'),
    (
      ResNet(3, width=2),
      'of another network: family PreResNet, and the model has family ResNet. Set',
    ),
  ],
)
def test_another_network(model, words):
  channels = 3 if isinstance(model, ResNet) else 1
  refused(words, GIVEN, model_leaves(model, (8, 8, channels)))


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'depth': 3}, 'depth 2, and the model has depth 3'),
    ({'width': 32}, 'width 16, and the model has width 32'),
    ({'patch': 6}, 'patch 4, and the model has patch 6'),
    ({'distilled': True}, 'distilled no, and the model has distilled yes'),
    ({'heads': 4}, 'asks for heads=2, and the model has 4'),
    ({'norm_eps': 1e-6}, 'asks for norm_eps=1e-12, and the model has 1e-06'),
    ({'mlp_ratio': 2}, 'does not fit the model; tensors missing 0, of another shape 6, unknown 0'),
  ],
)
def test_a_vit_of_another_size(fields, words):
  with pytest.raises(PretrainedError, match=words):
    load_pretrained(str(KEPT), our_model('hf_vit', KEPT, **fields), (12, 12, 3))


def test_another_family_with_names_of_both():
  with pytest.raises(PretrainedError) as error:
    load_pretrained(str(KEPT), ResNet(5), (32, 32, 3))
  first, _, row, *_ = str(error.value).splitlines()
  assert 'holds a ViT (Hugging Face names), and the model is a ResNet' in first
  assert row.split()[0].startswith(('vit.', 'classifier.'))
  assert row.split()[1].startswith(('params/', 'batch_stats/'))


def test_position_embeddings_are_interpolated():
  model = our_model('hf_vit', KEPT, num_classes=9)
  loaded = load_pretrained(str(KEPT), model, (20, 16, 3))
  assert 'position embedding interpolated from 3x3 to 5x4' in loaded.message
  assert 'head replaced: the file has 5 classes, this run 9' in loaded.message
  theirs = open_weights(str(KEPT)).tensors['vit.embeddings.position_embeddings']
  expected = resize_position_embedding(theirs, (5, 4), 1)
  np.testing.assert_array_equal(loaded.params['pos_embed'], expected)
  np.testing.assert_array_equal(loaded.params['pos_embed'][:, 0], theirs[:, 0])
  kept = traverse_util.flatten_dict({'params': loaded.params}, sep='/').keys() | loaded.fresh
  assert kept == model_leaves(model, (20, 16, 3)).keys()


def test_tables_of_relative_positions_are_interpolated(tmp_path):
  write_record('hf_swin', tmp_path)
  model = our_model('hf_swin', tmp_path, window=3)
  loaded = load_pretrained(str(tmp_path), model, (36, 36, 3))
  assert 'relative positions interpolated from windows of 4x4 to 3x3' in loaded.message
  name = 'swin.encoder.layers.1.blocks.0.attention.self.relative_position_bias_table'
  expected = resize_relative_bias(open_weights(str(tmp_path)).tensors[name], 3)
  np.testing.assert_array_equal(loaded.params['stage1_0']['attn']['relative_bias'], expected)


def test_a_distilled_file_for_another_number_of_classes(tmp_path):
  """Both heads begin anew, and the embedding keeps its two first entries."""
  write_record('timm_deit', tmp_path)
  model = our_model('timm_deit', tmp_path, num_classes=4)
  loaded = load_pretrained(str(tmp_path), model, (16, 16, 3))
  heads = {f'params/{head}/{leaf}' for head in ('head', 'head_dist') for leaf in ('kernel', 'bias')}
  assert loaded.fresh == heads
  theirs = open_weights(str(tmp_path)).tensors['pos_embed']
  np.testing.assert_array_equal(loaded.params['pos_embed'][:, :2], theirs[:, :2])


def test_an_encoder_alone():
  tensors = {
    name.removeprefix('vit.'): x
    for name, x in open_weights(str(KEPT)).tensors.items()
    if not name.startswith('classifier')
  }
  pooler = {'pooler.dense.weight': np.zeros((16, 16)), 'pooler.dense.bias': np.zeros(16)}
  file = WeightFile(tensors | pooler)
  loaded = load_pretrained(file, our_model('hf_vit', KEPT), (12, 12, 3))
  assert loaded.fresh == {'params/head/kernel', 'params/head/bias'}
  assert 'new head for 5 classes: the file has none' in loaded.message


@pytest.mark.parametrize(('labels', 'kept'), [({'0': 'background', '1': 'cat'}, True), ({}, False)])
def test_the_class_of_the_background(labels, kept, tmp_path):
  write_record('hf_mobilenetv2', tmp_path)
  file = open_weights(str(tmp_path))
  file = WeightFile(file.tensors, {**file.settings, 'id2label': labels}, description='file')
  model = MobileNetV2(4, **model_settings(file))
  loaded = load_pretrained(file, model, (32, 32, 3))
  assert bool(loaded.fresh) != kept
  if kept:
    assert 'class 0 of 5, the background, left out' in loaded.message
    expected = file.tensors['classifier.weight'][1:].T
    np.testing.assert_array_equal(loaded.params['fc']['kernel'], expected)
    np.testing.assert_array_equal(loaded.params['fc']['bias'], file.tensors['classifier.bias'][1:])


def test_a_message_of_what_was_read():
  loaded = load_pretrained(str(KEPT), our_model('hf_vit', KEPT), (12, 12, 3))
  count = sum(x.size for x in jax.tree.leaves(loaded.params))
  assert loaded.message == (
    f'weights from {KEPT}, model.safetensors: ViT, Hugging Face names, 40 tensors, '
    f'{count:,} parameters'
  )


def test_settings_of_a_model(tmp_path):
  file = open_weights(str(KEPT))
  assert model_settings(file) == {'norm_eps': 1e-12}
  assert model_settings(WeightFile(file.tensors)) == {}
  for name, value in (('hidden_act', 'quick_gelu'), ('qkv_bias', False)):
    with pytest.raises(PretrainedError, match=f'asks for {name}={value!r}'):
      model_settings(WeightFile(file.tensors, {**file.settings, name: value}))
  with pytest.raises(PretrainedError, match="says 'swin', but the tensors are those of a ViT"):
    model_settings(WeightFile(file.tensors, {'model_type': 'swin'}))
  write_record('hf_mobilenetv2', tmp_path)
  assert model_settings(open_weights(str(tmp_path))) == {'norm_eps': 1e-3, 'padding': 'same'}


def test_statistics_of_the_images():
  assert image_statistics(WeightFile({})) is None
  timm = {'pretrained_cfg': {'mean': [0.1, 0.2, 0.3], 'std': [1, 1, 2]}}
  assert image_statistics(WeightFile({}, timm)) == ((0.1, 0.2, 0.3), (1.0, 1.0, 2.0))
  google = {f'{CASES["hf_vit"].family}_1/query/kernel': np.zeros((4, 2, 2))}
  assert image_statistics(WeightFile(google)) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def test_heads_of_a_google_archive_are_those_of_the_model(tmp_path):
  file = WeightFile(google_names(heads=4))
  model = ViT(5, **CASES['hf_vit'].fields)
  with pytest.raises(PretrainedError, match='asks for heads=4, and the model has 2'):
    load_pretrained(file, model, (12, 12, 3))
