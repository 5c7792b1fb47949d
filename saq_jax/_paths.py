"""Names of the leaves of a parameter tree, as rules and masks see them."""

from typing import Any

import jax

PyTree = Any

# The learnable scale of an activation; those of weights are under 'scales'.
ACT_SCALE = 'quant_scale'


def path_name(path: tuple[Any, ...]) -> str:
  """Joins a key path by '/': 'stem/kernel', 'blocks/0/kernel'.

  The attribute `value` in which an NNX state, a dict, holds each variable is left out, so that one
  rule serves a Linen tree and an NNX state alike.
  """
  if (
    len(path) > 1
    and path[-1] == jax.tree_util.GetAttrKey('value')
    and isinstance(path[-2], jax.tree_util.DictKey)
  ):
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator='/')


def named_leaves(tree: PyTree) -> dict[str, Any]:
  """The leaves of a tree by name, in the tree's order; ValueError if two have the same name."""
  named: dict[str, Any] = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = path_name(path)
    if name in named:
      raise ValueError(f"two leaves of the tree are called {name!r}: rename a key that holds '/'.")
    named[name] = leaf
  return named


def is_quant_scale(path: str) -> bool:
  """Whether a leaf is the learnable scale of a quantizer, by this package's convention.

  Those of weights are under 'scales', those of activations are named 'quant_scale'.
  """
  names = path.split('/')
  return names[0] == 'scales' or names[-1] == ACT_SCALE
