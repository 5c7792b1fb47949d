"""Files of weights: safetensors, npz and PyTorch's, single, in a directory, or from the Hub."""

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from saq_jax.pretrained import hub, torch_file
from saq_jax.pretrained.errors import PretrainedError

_SUFFIXES = ('.safetensors', '.npz', *torch_file.SUFFIXES)
_INDEX = 'model.safetensors.index.json'
_SINGLE = ('model.safetensors', 'pytorch_model.bin')
_CONFIG, _PREPROCESSOR = 'config.json', 'preprocessor_config.json'

# The types of safetensors that numpy has; bfloat16 is widened by hand.
_DTYPES = {
  'F64': 'float64',
  'F32': 'float32',
  'F16': 'float16',
  'BF16': 'uint16',
  'I64': 'int64',
  'I32': 'int32',
  'I16': 'int16',
  'I8': 'int8',
  'U64': 'uint64',
  'U32': 'uint32',
  'U16': 'uint16',
  'U8': 'uint8',
  'BOOL': 'bool',
}


@dataclasses.dataclass(frozen=True)
class WeightFile:
  """What was read, before anything is known of the network that it belongs to.

  Attributes:
    tensors: by their names in the file; floats of float32 or float64.
    settings: of the config.json beside the weights; empty where there is none.
    preprocessor: of the preprocessor_config.json beside them; empty where there is none.
    description: which file or files, for messages.
    source: what `open_weights` takes to read the same again: with the commit, where it is a
      repository of the Hub.
  """

  tensors: Mapping[str, np.ndarray]
  settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  preprocessor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  description: str = 'weights'
  source: str = ''


def holds_weights(source: str) -> bool:
  """Says whether a source is one that `open_weights` is for; a run's own checkpoints are not.

  Args:
    source: any path, or 'hf://...'.

  Returns:
    True for the Hub, a file, what is named like one, and a directory with files of weights in it.

  Example:
    >>> holds_weights('hf://google/vit-base-patch16-224'), holds_weights('/nowhere')
    (True, False)
  """
  path, _ = _split(source)
  if source.startswith(hub.SCHEME) or path.is_file() or path.name.endswith(_SUFFIXES):
    return True
  return path.is_dir() and (bool(_weights_in(path)) or (path / _INDEX).is_file())


def open_weights(source: str) -> WeightFile:
  """Reads a file of weights, or a directory as the Hugging Face libraries write it.

  Args:
    source: a .safetensors, .npz or PyTorch file; a directory with model.safetensors, or its shards
      and their index, and config.json; 'hf://org/name' or 'hf://org/name@revision'. Of a file, a
      '#part' at the end takes the tensors named 'part/...' alone, without that beginning.

  Returns:
    The tensors and the settings.

  Raises:
    PretrainedError: if there is nothing to read, or it is damaged.
  """
  if source.startswith(hub.SCHEME):
    folder = hub.fetch(source)
    pinned = f'{source.partition("@")[0]}@{folder.name}'
    return _read_folder(folder, f'{source} (commit {folder.name[:7]})', pinned)
  path, part = _split(source)
  if path.is_dir():
    return _read_folder(path, source, str(path.resolve()))
  if not path.is_file():
    raise PretrainedError(f'{source}: there is no such file or directory')
  tensors = _read_file(path)
  if part:
    beginning = part + '/'
    tensors = {k.removeprefix(beginning): x for k, x in tensors.items() if k.startswith(beginning)}
    if not tensors:
      raise PretrainedError(f'{source}: {path} has no tensor named {beginning}...')
  beside = path.parent if path.name.endswith('.safetensors') or path.name in _SINGLE else None
  return _weight_file(tensors, beside, source, f'{path.resolve()}{"#" if part else ""}{part}')


def _split(source: str) -> tuple[Path, str]:
  """A path, and the part of the file that is meant."""
  path = Path(source).expanduser()
  if path.exists() or '#' not in source:
    return path, ''
  name, _, part = source.rpartition('#')
  return Path(name).expanduser(), part


def _weights_in(folder: Path) -> list[Path]:
  """The files of weights in a directory, by name."""
  return sorted(p for p in folder.iterdir() if p.name.endswith(_SUFFIXES) and p.is_file())


def _read_folder(folder: Path, description: str, source: str) -> WeightFile:
  """The weights of a directory: one file, or shards."""
  index = folder / _INDEX
  there = _weights_in(folder)
  named = [folder / name for name in _SINGLE if folder / name in there]
  if index.is_file() and folder / _SINGLE[0] not in there:
    return _weight_file(_read_shards(index), folder, description, source)
  if not named and len(there) != 1:
    listed = ', '.join(p.name for p in there[:6]) or 'none'
    raise PretrainedError(
      f'{description}: expected model.safetensors in it, or a single file of weights; it has '
      f'{listed}. Give the path of the file'
    )
  path = (named or there)[0]
  return _weight_file(_read_file(path), folder, f'{description}, {path.name}', source)


def _read_shards(index: Path) -> dict[str, np.ndarray]:
  """The tensors that an index places in files beside it."""
  places = _read_json(index).get('weight_map')
  if not isinstance(places, dict) or not places:
    raise PretrainedError(f"{index} has no 'weight_map': it is not an index of shards")
  tensors: dict[str, np.ndarray] = {}
  for shard in sorted(set(places.values())):
    path = index.parent / Path(shard).name
    if not path.is_file():
      raise PretrainedError(
        f'{path} is missing, one of {len(set(places.values()))} shards that {index.name} names: '
        'download it into the same directory'
      )
    tensors |= _read_file(path)
  if lost := [name for name in places if name not in tensors]:
    raise PretrainedError(f'{index} places {lost[0]} in {places[lost[0]]}, which has it not')
  return tensors


def _weight_file(
  tensors: dict[str, np.ndarray], folder: Path | None, description: str, source: str
) -> WeightFile:
  """Puts the settings to the tensors."""
  if not tensors:
    raise PretrainedError(f'{description} holds no tensors')
  settings, preprocessor = (
    _read_json(folder / name) if folder and (folder / name).is_file() else {}
    for name in (_CONFIG, _PREPROCESSOR)
  )
  return WeightFile(tensors, settings, preprocessor, description, source)


def _read_json(path: Path) -> dict[str, Any]:
  try:
    content = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise PretrainedError(f'{path} is no JSON file: {error}') from error
  if not isinstance(content, dict):
    raise PretrainedError(f'{path} holds no JSON object')
  return content


def _read_file(path: Path) -> dict[str, np.ndarray]:
  """The tensors of one file, by what its name ends in."""
  if path.name.endswith('.safetensors'):
    return _read_safetensors(path)
  if path.name.endswith('.npz'):
    return _read_npz(path)
  if path.name.endswith(torch_file.SUFFIXES):
    return torch_file.read_torch(path)
  raise PretrainedError(f'{path}: not one of {", ".join(_SUFFIXES)}, by the end of its name')


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
  try:
    content = safetensors.deserialize(path.read_bytes())
  except safetensors.SafetensorError as error:
    raise PretrainedError(
      f'{path} is damaged or cut short: {error}. Fetch it again (a file of about 130 bytes is the '
      'pointer of git-lfs: run "git lfs pull")'
    ) from error
  tensors = {}
  for name, held in content:
    if held['dtype'] not in _DTYPES:
      raise PretrainedError(f'{path}: {name} is of type {held["dtype"]}, which is not supported')
    flat = np.frombuffer(held['data'], np.dtype(_DTYPES[held['dtype']]).newbyteorder('<'))
    if held['dtype'] == 'BF16':  # the upper half of a float32
      flat = (flat.astype(np.uint32) << 16).view(np.float32)
    tensors[name] = _widened(flat.reshape(held['shape']))
  return tensors


def _read_npz(path: Path) -> dict[str, np.ndarray]:
  try:
    with np.load(path, allow_pickle=False) as archive:
      return {name: _widened(archive[name]) for name in archive.files}
  except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise PretrainedError(f'{path} is damaged, or holds more than arrays: {error}') from error


def _widened(x: np.ndarray) -> np.ndarray:
  return x.astype(np.float32) if x.dtype == np.float16 else x
