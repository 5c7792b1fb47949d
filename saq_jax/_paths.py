"""Names of the leaves of a parameter tree, as rules and masks see them."""

import collections
import re
from collections.abc import Callable
from typing import Any

import jax

PyTree = Any

# The learnable scale of an activation; those of weights are under 'scales'.
ACT_SCALE = 'quant_scale'

_VALUE = jax.tree_util.GetAttrKey('value')


def leaf_names(tree: PyTree) -> list[str]:
  """The names of the leaves, their keys joined by '/': 'stem/kernel', 'blocks/0/kernel'.

  The attribute `value` in which an NNX state holds each variable is left out, so that one rule
  serves a Linen tree and an NNX state alike; it is, where nothing stands beside it.

  Raises:
    ValueError: if two leaves have the same name.
  """
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
  beside = collections.Counter(path[:-1] for path in paths)
  names = [
    jax.tree_util.keystr(
      path[:-1] if len(path) > 1 and path[-1] == _VALUE and beside[path[:-1]] == 1 else path,
      simple=True,
      separator='/',
    )
    for path in paths
  ]
  if len(set(names)) < len(names):
    twice = next(name for name, count in collections.Counter(names).items() if count > 1)
    raise ValueError(f"two leaves of the tree are called {twice!r}: rename a key that holds '/'.")
  return names


def named_leaves(tree: PyTree) -> dict[str, Any]:
  """The leaves of a tree by name, in the tree's order."""
  return dict(zip(leaf_names(tree), jax.tree.leaves(tree), strict=True))


def map_named(fn: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
  """A tree of `fn(name, leaf)` at every leaf."""
  named = (fn(name, leaf) for name, leaf in named_leaves(tree).items())
  return jax.tree.unflatten(jax.tree.structure(tree), named)


def is_quant_scale(path: str) -> bool:
  """Whether a leaf is the learnable scale of a quantizer, by this package's convention.

  Those of weights are under 'scales', those of activations are named 'quant_scale'.
  """
  names = path.split('/')
  return names[0] == 'scales' or names[-1] == ACT_SCALE


def is_norm(path: str) -> bool:
  """Whether a leaf is the scale or the bias of a norm: of a module called 'bn2', 'norm', ..."""
  names = path.split('/')
  return len(names) > 1 and re.fullmatch(r'(.*_)?(bn|norm)\d*', names[-2]) is not None


def is_embedding(path: str) -> bool:
  """Whether a leaf is a token, a position embedding or a table of relative positions."""
  last = path.split('/')[-1]
  return last.endswith(('_token', '_embed')) or last == 'relative_bias'
