"""Names of the leaves of a parameter tree, as rules and masks see them."""

from typing import Any

import jax

PyTree = Any


def path_name(path: tuple[Any, ...]) -> str:
  """Joins a key path by '/': 'stem/kernel', 'blocks/0/kernel'.

  The attribute `value` in which an NNX state holds each variable is left out, so that one rule
  serves a Linen tree and an NNX state alike.
  """
  last = path[-1] if path else None
  if len(path) > 1 and isinstance(last, jax.tree_util.GetAttrKey) and last.name == 'value':
    path = path[:-1]
  return jax.tree_util.keystr(path, simple=True, separator='/')


def named_leaves(tree: PyTree) -> dict[str, Any]:
  """The leaves of a tree by name, in the tree's order."""
  return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def is_quant_scale(path: str) -> bool:
  """Whether a leaf is the learnable scale of a quantizer, by this package's convention.

  Those of weights are under 'scales', those of activations are named 'quant_scale'.
  """
  names = path.split('/')
  return names[0] == 'scales' or names[-1] == 'quant_scale'
