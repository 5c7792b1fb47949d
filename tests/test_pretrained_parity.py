"""Logits from public formats against those that PyTorch's networks were recorded to compute."""

import functools
import json

import jax
import numpy as np
import pytest
from make_parity_record import CASES, KEPT, REFERENCE, images, weights
from safetensors.numpy import save_file

from saq_jax.models.mobilenetv2 import MobileNetV2
from saq_jax.models.resnet import ResNet
from saq_jax.models.swin import Swin
from saq_jax.models.vit import ViT
from saq_jax.pretrained.files import open_weights
from saq_jax.pretrained.load import load_pretrained
from saq_jax.pretrained.settings import model_settings

FAMILIES = {family.__name__: family for family in (MobileNetV2, ResNet, Swin, ViT)}


def write_record(case, folder):
  """The directory as the network's library writes it."""
  about = json.loads(str(np.load(REFERENCE / f'parity_{case}.npz')['about']))
  if about['config']:
    (folder / 'config.json').write_text(json.dumps(about['config']))
  integers = ('num_batches_tracked', 'relative_position_index')
  tensors = {
    name: np.zeros(shape, np.int64) if name.endswith(integers) else weights(name, tuple(shape))
    for name, shape in about['shapes'].items()
  }
  save_file(tensors, folder / 'model.safetensors')


def our_model(case, source, **fields):
  """Ours, with what the settings beside the file say."""
  told = model_settings(open_weights(str(source)))
  return FAMILIES[CASES[case].family](**{'num_classes': 5, **CASES[case].fields, **told, **fields})


def difference(case, source, theirs):
  """The largest difference of logits, relative to the largest logit."""
  side = CASES[case].side
  model = our_model(case, source)
  loaded = load_pretrained(str(source), model, (side, side, 3))
  assert not loaded.fresh
  variables = {'params': loaded.params, 'batch_stats': loaded.batch_stats}
  ours = jax.jit(functools.partial(model.apply, train=False))(variables, images(side))
  return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize('case', CASES)
def test_logits_equal_the_recorded_ones(case, tmp_path):
  write_record(case, tmp_path)
  recorded = np.load(REFERENCE / f'parity_{case}.npz')['logits']
  found = difference(case, tmp_path, recorded)
  print(case, found)
  assert found < 1e-5


def test_a_directory_as_save_pretrained_wrote_it():
  recorded = np.load(REFERENCE / f'parity_{KEPT.name}.npz')['logits']
  assert difference(KEPT.name, KEPT, recorded) < 1e-5
