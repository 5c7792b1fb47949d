"""Logits against PyTorch's own networks, where it is installed: files written here and now."""

import numpy as np
import pytest
from make_parity_record import CASES, images, logits_of, write_theirs
from test_pretrained_parity import difference, our_model

from saq_jax.pretrained.errors import PretrainedError
from saq_jax.pretrained.files import open_weights
from saq_jax.pretrained.load import load_pretrained

torch = pytest.importorskip('torch')
LIBRARY = {'hf': 'transformers', 'torchvision': 'torchvision', 'timm': 'timm'}


@pytest.mark.parametrize('case', CASES)
def test_logits_equal_those_of_pytorch(case, tmp_path):
  """From safetensors, and from a checkpoint of a training with names as they are in memory."""
  pytest.importorskip(LIBRARY[case.split('_')[0]])
  theirs = write_theirs(case, tmp_path)
  state = {f'module.{k}': x.clone() for k, x in theirs.state_dict().items()}
  optimizer = torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9).state_dict()
  logits = logits_of(theirs, images(CASES[case].side))
  assert difference(case, tmp_path, logits) < 1e-5
  (tmp_path / 'model.safetensors').unlink()
  checkpoint = {'epoch': 3, 'model': state, 'optimizer': optimizer}
  torch.save(checkpoint, tmp_path / 'pytorch_model.bin')
  assert difference(case, tmp_path, logits) < 1e-5


def test_shards_as_they_are_written(tmp_path):
  pytest.importorskip('transformers')
  theirs = write_theirs('hf_vit', tmp_path)
  (tmp_path / 'model.safetensors').unlink()
  theirs.save_pretrained(tmp_path, max_shard_size='10KB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 2
  assert difference('hf_vit', tmp_path, logits_of(theirs, images(12))) < 1e-5


def test_a_deit_of_one_head_is_refused(tmp_path):
  transformers = pytest.importorskip('transformers')
  config = CASES['hf_deit'].build().config
  transformers.DeiTForImageClassification(config).save_pretrained(tmp_path)
  with pytest.raises(PretrainedError, match='has no head_dist/kernel, only one of the 2 heads'):
    load_pretrained(str(tmp_path), our_model('hf_deit', tmp_path), (12, 12, 3))


def test_half_precision_is_widened(tmp_path):
  from safetensors.torch import save_file

  values = torch.linspace(-3, 3, 7)
  tensors = {'a': values.bfloat16(), 'b': values.half(), 'c': values.double(), 'd': values.int()}
  save_file(tensors, tmp_path / 'x.safetensors')
  torch.save(tensors, tmp_path / 'x.pt')
  for name in ('x.safetensors', 'x.pt'):
    read = open_weights(str(tmp_path / name)).tensors
    assert [read[k].dtype.name for k in 'abcd'] == ['float32', 'float32', 'float64', 'int32']
    for key, x in tensors.items():
      np.testing.assert_array_equal(read[key], x.double().numpy())


def test_a_pickle_of_objects_is_not_run(tmp_path):
  path = tmp_path / 'whole.pth'
  torch.save({'model': {'fc.weight': torch.ones(2, 2)}, 'args': Marker(str(tmp_path))}, path)
  with pytest.raises(PretrainedError, match='holds Python objects beside tensors'):
    open_weights(str(path))
  assert not (tmp_path / 'ran').exists()


class Marker:
  """What leaves a file behind where it is unpickled."""

  def __init__(self, folder):
    self.folder = folder

  def __reduce__(self):
    return open, (f'{self.folder}/ran', 'w')


def test_damaged_files_of_torch(tmp_path):
  path = tmp_path / 'x.pth'
  torch.save({'a': torch.ones(50)}, path)
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(PretrainedError, match='damaged or no PyTorch file'):
    open_weights(str(path))
  torch.save([1, 2], path)
  with pytest.raises(PretrainedError, match='holds no tensors by name: list'):
    open_weights(str(path))
