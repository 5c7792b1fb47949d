"""How the names and layouts of a foreign format become this package's: rules, and what they do.

A rule takes a module of the file to one of ours. The kind of module says which tensors it has,
what each is called here and how its axes are turned. Formats are lists of rules, kept as data.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import numpy as np

from saq_jax.pretrained.errors import PretrainedError

Turn = Callable[[np.ndarray], np.ndarray]
# What a tensor becomes: a collection, a path below the module's, and how its axes are turned.
Pieces = tuple[tuple[str, str, Turn], ...]

# What no network here needs: counters and indices that are computed anew, and parts for training
# by masked images or of encoders alone.
IGNORED = (
  r'.*num_batches_tracked',
  r'.*relative_position_index',
  r'.*relative_coords_table',
  r'.*attn_mask',
  r'.*mask_token',
  r'pooler\..*',
)


@dataclasses.dataclass(frozen=True)
class Rule:
  """One kind of module of a format.

  Attributes:
    pattern: a regular expression over its whole name in the file, without that of the tensor.
    path: of the module here; '{0}' is the first group of the pattern, '{0+1}' one more than it.
    kind: one of `KINDS`.
  """

  pattern: str
  path: str
  kind: str


@dataclasses.dataclass(frozen=True)
class Format:
  """The names that one library gives to one family of networks.

  Attributes:
    library: whose names they are, for messages.
    family: the class of the model here.
    tells: regular expressions, each of which must match the whole name of some tensor.
    rules: for all modules; the first that matches counts.
    prefixes: beginnings of names that may be there or not.
    head: regular expressions over tensors of a richer head than the model's, which can be left
      out only where the head is.
    background: whether class 0 may be one for the background.
  """

  library: str
  family: str
  tells: tuple[str, ...]
  rules: tuple[Rule, ...]
  prefixes: tuple[str, ...] = ()
  head: tuple[str, ...] = ()
  background: bool = False


@dataclasses.dataclass(frozen=True)
class Converted:
  """The tensors of a file under this package's paths.

  Attributes:
    leaves: by 'params/...' and 'batch_stats/...'.
    scales: of the weights, by the path of the kernel in the model's parameters.
    names: of the tensor in the file that a path came from.
    shapes: of those tensors, by name.
    head: names of the tensors of a richer head.
    unknown: names that no rule takes.
  """

  leaves: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  scales: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
  names: dict[str, str] = dataclasses.field(default_factory=dict)
  shapes: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
  head: list[str] = dataclasses.field(default_factory=list)
  unknown: list[str] = dataclasses.field(default_factory=list)


def _turned(*axes: int) -> Turn:
  """A transposition; an array of another rank is left, for the comparison of shapes to find."""
  return lambda x: x.transpose(axes) if x.ndim == len(axes) else x


def _third(part: int, turn: Turn) -> Turn:
  """One of three equal parts, side by side along the first axis."""
  return lambda x: turn(np.split(x, 3)[part]) if x.ndim and x.shape[0] % 3 == 0 else x


def _same(x: np.ndarray) -> np.ndarray:
  return x


def _clip(x: np.ndarray) -> np.ndarray:
  """A scalar, its sign kept: quantizers take the absolute value, as the authors' layers do."""
  return x.reshape(()) if x.size == 1 else x


def _joined(first: int) -> Turn:
  """Two neighbouring axes made one, as those of heads and of a head's channels."""

  def join(x: np.ndarray) -> np.ndarray:
    if x.ndim < first + 2:
      return x
    return x.reshape(*x.shape[:first], -1, *x.shape[first + 2 :])

  return join


_OIHW = _turned(2, 3, 1, 0)
_OI = _turned(1, 0)
_BIAS: dict[str, Pieces] = {'bias': (('params', 'bias', _same),)}
_WEIGHT_CLIP: dict[str, Pieces] = {'weight_clip_value': (('scales', 'kernel', _clip),)}
_CLIPS = _WEIGHT_CLIP | {'activation_clip_value': (('params', 'input/quant_scale', _clip),)}


def _qkv(weight: str, bias: str) -> dict[str, Pieces]:
  return {
    weight: tuple(('params', f'{name}/kernel', _third(i, _OI)) for i, name in enumerate('qkv')),
    bias: tuple(('params', f'{name}/bias', _third(i, _same)) for i, name in enumerate('qkv')),
  }


# The tensors of each kind of module, by their names in the file.
KINDS: Mapping[str, Mapping[str, Pieces]] = {
  'conv': _BIAS | _CLIPS | {'weight': (('params', 'kernel', _OIHW),)},
  # The authors' first layer has a clip for its input, which it does not quantize.
  'first conv': _BIAS
  | _WEIGHT_CLIP
  | {'weight': (('params', 'kernel', _OIHW),), 'activation_clip_value': ()},
  'dense': _BIAS | _CLIPS | {'weight': (('params', 'kernel', _OI),)},
  'norm': _BIAS
  | {
    'weight': (('params', 'scale', _same),),
    'running_mean': (('batch_stats', 'mean', _same),),
    'running_var': (('batch_stats', 'var', _same),),
  },
  'qkv': _qkv('weight', 'bias') | _qkv('in_proj_weight', 'in_proj_bias'),
  'array': {},
  'flax': _BIAS | {name: (('params', name, _same),) for name in ('kernel', 'scale')},
  'flax qkv': {
    'kernel': (('params', 'kernel', _joined(1)),),
    'bias': (('params', 'bias', _joined(0)),),
  },
  'flax out': _BIAS | {'kernel': (('params', 'kernel', _joined(0)),)},
}


def convert(tensors: Mapping[str, tuple[str, np.ndarray]], form: Format) -> Converted:
  """Gives every tensor its path and layout here.

  Args:
    tensors: by name without prefixes: the whole name in the file, and the tensor.
    form: whose rules to follow.

  Returns:
    The tensors by path, and those that have none.

  Raises:
    PretrainedError: if two tensors have the same path.
  """
  done = Converted()
  for name, (whole, x) in tensors.items():
    done.shapes[whole] = x.shape
    if any(re.fullmatch(pattern, name) for pattern in IGNORED):
      continue
    if any(re.fullmatch(pattern, name) for pattern in form.head):
      done.head.append(whole)
      continue
    found = _placed(name, form.rules)
    if found is None:
      done.unknown.append(whole)
      continue
    module, pieces = found
    for collection, below, turn in pieces:
      path = '/'.join(filter(None, (collection, module, below)))
      if path in done.names:
        raise PretrainedError(f'{done.names[path]} and {whole} of the file are both {path} here')
      done.names[path] = whole
      if collection == 'scales':
        done.scales[path.removeprefix('scales/')] = turn(x)
      else:
        done.leaves[path] = turn(x)
  return done


def _placed(name: str, rules: tuple[Rule, ...]) -> tuple[str, Pieces] | None:
  """The path of a tensor's module here, and what the tensor becomes; None without a rule."""
  for rule in rules:
    if rule.kind == 'array':
      if match := re.fullmatch(rule.pattern, name):
        return _filled(rule.path, match), (('params', '', _same),)
      continue
    kind = KINDS[rule.kind]
    module, _, leaf = re.sub(r'[./](?=\w+$)', '\n', name).partition('\n')
    if leaf in kind and (match := re.fullmatch(rule.pattern, module)):
      return _filled(rule.path, match), kind[leaf]
  return None


def _filled(template: str, match: re.Match[str]) -> str:
  """The template with its groups, and sums of a group and a number, put in."""

  def group(field: re.Match[str]) -> str:
    text = match[int(field[1]) + 1]
    return str(int(text) + int(field[2])) if field[2] else text

  return re.sub(r'\{(\d)([+-]\d+)?\}', group, template)
