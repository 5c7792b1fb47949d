"""Reading of files of weights, whole and damaged, single, in directories and from the Hub."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from saq_jax.pretrained.errors import PretrainedError
from saq_jax.pretrained.files import holds_weights, open_weights

TENSORS = {'fc.weight': np.arange(6, dtype=np.float32).reshape(2, 3), 'step': np.int64([4])}


def refused(source, words):
  with pytest.raises(PretrainedError, match=words) as error:
    open_weights(str(source))
  assert str(source).split('#')[0] in str(error.value)
  assert '\n' not in str(error.value)


def same(tensors, expected):
  assert tensors.keys() == expected.keys()
  for name, x in expected.items():
    np.testing.assert_array_equal(tensors[name], x)


def test_a_file_with_its_settings(tmp_path):
  path = tmp_path / 'model.safetensors'
  save_file(TENSORS, path)
  (tmp_path / 'config.json').write_text('{"model_type": "vit"}')
  (tmp_path / 'preprocessor_config.json').write_text('{"image_mean": [0.5]}')
  for source in (path, tmp_path):
    file = open_weights(str(source))
    same(file.tensors, TENSORS)
    assert file.settings == {'model_type': 'vit'}
    assert file.preprocessor == {'image_mean': [0.5]}
    assert str(source) in file.description
    same(open_weights(file.source).tensors, TENSORS)
    assert holds_weights(str(source))


def test_types_without_a_twin_in_numpy_are_widened(tmp_path):
  values = np.array([0.0, -1.5, 2.0, 3.140625], np.float32)
  halves = (values.view(np.uint32) >> 16).astype(np.uint16)
  pieces = {'b': ('BF16', halves), 'h': ('F16', values.astype(np.float16)), 'f': ('F32', values)}
  header, data = {}, b''
  for name, (kind, x) in pieces.items():
    offsets = [len(data), len(data) + x.nbytes]
    header[name] = {'dtype': kind, 'shape': [2, 2], 'data_offsets': offsets}
    data += x.tobytes()
  text = json.dumps(header).encode()
  path = tmp_path / 'x.safetensors'
  path.write_bytes(len(text).to_bytes(8, 'little') + text + data)
  for x in open_weights(str(path)).tensors.values():
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, values.reshape(2, 2))


def write_shards(folder):
  places = {'a': 'model-1-of-2.safetensors', 'b': 'model-2-of-2.safetensors'}
  for name, shard in places.items():
    save_file({name: np.float32([1, 2])}, folder / shard)
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': places}))
  return index


def test_shards(tmp_path):
  index = write_shards(tmp_path)
  assert open_weights(str(tmp_path)).tensors.keys() == {'a', 'b'}
  index.write_text(json.dumps({'weight_map': {'a': 'model-2-of-2.safetensors'}}))
  refused(tmp_path, 'places a in model-2-of-2.safetensors, which has it not')
  index.write_text('{}')
  refused(tmp_path, 'not an index of shards')
  write_shards(tmp_path)
  (tmp_path / 'model-2-of-2.safetensors').unlink()
  refused(tmp_path, r'model-2-of-2.safetensors is missing, one of 2 shards')


@pytest.mark.parametrize('content', [b'', b'version https://git-lfs', b'\x08' + b'\0' * 7 + b'{}'])
def test_what_is_no_safetensors(content, tmp_path):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(content)
  refused(path, 'damaged or cut short')


def test_damage(tmp_path):
  path = tmp_path / 'x.safetensors'
  save_file(TENSORS, path)
  whole = path.read_bytes()
  path.write_bytes(whole[:-4])
  refused(path, 'damaged or cut short')
  path.write_bytes(whole.replace(b'F32', b'F8X'))
  refused(path, 'damaged or cut short')
  npz = tmp_path / 'x.npz'
  np.savez(npz, **TENSORS)
  npz.write_bytes(npz.read_bytes()[:-30])
  refused(npz, 'is damaged, or holds more than arrays')
  np.savez(npz, a=np.array([{}], object))
  refused(npz, 'is damaged, or holds more than arrays')
  np.save(tmp_path / 'x.npy', np.zeros(2))
  (tmp_path / 'x.npy').rename(npz)
  refused(npz, 'is damaged, or holds more than arrays')


def test_settings_that_are_no_json(tmp_path):
  save_file(TENSORS, tmp_path / 'model.safetensors')
  for text in ('{', '[]'):
    (tmp_path / 'config.json').write_text(text)
    refused(tmp_path, 'config.json (is no JSON file|holds no JSON object)')


def test_part_of_an_archive(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, **{'init/a': np.zeros(2), 'after/a': np.ones(2), 'loss': np.ones(1)})
  file = open_weights(f'{path}#after')
  same(file.tensors, {'a': np.ones(2)})
  same(open_weights(file.source).tensors, file.tensors)
  refused(f'{path}#other', 'has no tensor named other/...')


def test_what_is_not_there(tmp_path):
  refused(tmp_path / 'none.safetensors', 'there is no such file')
  refused(tmp_path, 'expected model.safetensors in it.*it has none')
  assert not holds_weights(str(tmp_path))
  for name in ('a.npz', 'b.npz'):
    np.savez(tmp_path / name, **TENSORS)
  refused(tmp_path, 'it has a.npz, b.npz')
  (tmp_path / 'a.npz').unlink()
  same(open_weights(str(tmp_path)).tensors, TENSORS)
  other = tmp_path / 'weights.h5'
  other.write_bytes(b'x')
  refused(other, 'not one of .safetensors')
  np.savez(tmp_path / 'b.npz')
  refused(tmp_path / 'b.npz', 'holds no tensors')


def test_a_file_of_pytorch_without_pytorch(tmp_path, monkeypatch):
  path = tmp_path / 'x.pth'
  path.write_bytes(b'x')
  monkeypatch.setitem(sys.modules, 'torch', None)
  refused(path, 'takes PyTorch, which is not installed: pip install torch, or convert')


def test_the_hub_without_its_client(monkeypatch):
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
  refused('hf://org/name', r"huggingface_hub is not installed: pip install 'saq_jax\[hub\]'")
  refused('hf://name', 'write')


def test_the_hub_without_a_network(tmp_path):
  """A cache laid out as the client does, and another repository that is not in it."""
  pytest.importorskip('huggingface_hub')
  commit = '0123456789' * 4
  repo = tmp_path / 'models--org--net'
  for part in ('refs', f'snapshots/{commit}', 'blobs'):
    (repo / part).mkdir(parents=True)
  (repo / 'refs' / 'main').write_text(commit)
  save_file(TENSORS, repo / 'snapshots' / commit / 'model.safetensors')
  code = """
from saq_jax.pretrained.errors import PretrainedError
from saq_jax.pretrained.files import open_weights
for source in ('hf://org/net', 'hf://org/net@main', 'hf://org/other'):
  try:
    file = open_weights(source)
    assert file.source == 'hf://org/net@' + 4 * '0123456789', file.source
    print(file.description)
  except PretrainedError as error:
    print(error)
"""
  env = {**os.environ, 'HF_HUB_CACHE': str(tmp_path), 'HF_HUB_OFFLINE': '1'}
  done = subprocess.run([sys.executable, '-c', code], env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  first, second, third = done.stdout.splitlines()
  assert first == 'hf://org/net (commit 0123456), model.safetensors'
  assert second == 'hf://org/net@main (commit 0123456), model.safetensors'
  assert third.startswith('hf://org/other could not be fetched, and is not in the cache: ')
