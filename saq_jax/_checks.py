"""What `saq` and `qat` refuse, each in one line that says how to mend it."""

import numbers
from typing import Any

import jax
import optax

from saq_jax._paths import PyTree


def check_trees(updates: PyTree, params: PyTree | None) -> None:
  """Raises ValueError unless the gradient has the structure of params."""
  if params is None:
    raise ValueError('params are missing: call tx.update(g, state, params, ...).')
  leaves = jax.tree.leaves(updates, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
  if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
    raise ValueError(
      'saq and qat cannot stand inside optax.masked or optax.partition: they need every leaf. '
      "Put them first in the chain; saq's own mask says what is perturbed."
    )
  require_same_structure(
    'the gradient', updates, params, 'take it at quantize(params), with respect to all of it'
  )


def split_second(second: Any, has_aux: bool, params: PyTree) -> tuple[PyTree, Any]:
  """The second gradient and aux, of what `grad_fn` returned; ValueError if it is neither."""
  mend = 'pass jax.grad(loss), or with has_aux=True a function that returns (gradient, aux)'
  if has_aux and not (isinstance(second, tuple) and len(second) == 2):
    raise ValueError(f'grad_fn did not return (gradient, aux), which has_aux=True wants: {mend}.')
  g2, aux = second if has_aux else (second, None)
  require_same_structure('what grad_fn returned', g2, params, mend)
  return g2, aux


def require_grad_fn(grad_fn: Any) -> None:
  """Raises ValueError where there is no function to take a second gradient with."""
  if grad_fn is None:
    raise ValueError(
      'saq needs grad_fn: call tx.update(g, state, params, grad_fn=jax.grad(loss)). Wrappers '
      'that drop extra arguments, as TrainState.apply_gradients does, cannot be used.'
    )


def require_same_structure(what: str, tree: PyTree, params: PyTree, mend: str) -> None:
  """Raises ValueError unless a tree has the structure of params."""
  here, wanted = (str(jax.tree.structure(t)) for t in (tree, params))
  if here != wanted:
    raise ValueError(f'{what} has another structure than params: {mend}. {here} is not {wanted}.')


def require_static(**arguments: Any) -> None:
  """Raises ValueError for a structural argument that was made an array."""
  for name, value in arguments.items():
    if isinstance(value, jax.Array):
      raise ValueError(
        f'saq({name}=...) shapes the computation and cannot be an array: in '
        f'optax.inject_hyperparams name it in static_args.'
      )


def require_at_least_zero(name: str, value: Any) -> None:
  """Raises ValueError unless it is a finite number, at least 0; arrays are not looked into."""
  if isinstance(value, jax.Array):
    return
  if not isinstance(value, numbers.Real) or not 0 <= float(value) < float('inf'):
    raise ValueError(f'saq({name}={value!r}): must be a finite number, at least 0.')


def require_fraction(who: str, name: str, value: Any) -> None:
  """Raises ValueError unless it is a number above 0 and at most 1; arrays are not looked into."""
  if isinstance(value, jax.Array):
    return
  if not isinstance(value, numbers.Real) or not 0 < float(value) <= 1:
    raise ValueError(f'{who}({name}={value!r}): must be a number above 0 and at most 1.')


def require_count(who: str, name: str, value: Any) -> None:
  """Raises ValueError unless it is a whole number, at least 1."""
  if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
    raise ValueError(f'{who}({name}={value!r}): must be a whole number, at least 1.')


def require_decay(who: str, decay: float) -> None:
  """Raises ValueError unless it is from 0 to below 1."""
  if not 0 <= decay < 1:
    raise ValueError(f'{who}(decay={decay!r}): must be at least 0 and below 1.')
