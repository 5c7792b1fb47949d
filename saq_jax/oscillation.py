"""Integer codes that swing to and fro during training: an optax link that counts them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from saq_jax._paths import PyTree, named_leaves
from saq_jax.weights import WeightQuantizer


class OscillationState(NamedTuple):
  """The state of `track_oscillation`; the last two fields are there to be plotted.

  Attributes:
    codes: of each quantized leaf, by its path, after the last step: int8, or uint8 where its
      quantizer is unsigned.
    direction: of the last change of each code: 1, -1, or 0 before the first; int8.
    frequency: f, the moving average of how often each code turned back; float32.
    changed: the fraction of all codes that changed in the last step.
    oscillating: the fraction of all codes with f above the threshold.
  """

  codes: dict[str, Array]
  direction: dict[str, Array]
  frequency: dict[str, Array]
  changed: Array
  oscillating: Array


def weight_codes(quantize: WeightQuantizer, params: PyTree) -> dict[str, Array]:
  """The integer codes of all quantized weights.

  Args:
    quantize: of the parameters.
    params: {'model': tree, 'scales': {path: scale}}.

  Returns:
    The codes by the path of their leaf in the model, int8 or uint8. Leaves without a quantizer, or
    with one of `bits=None`, have none.

  Raises:
    ValueError: if there are no codes at all, or a scale is missing.

  Example:
    >>> import jax.numpy as jnp
    >>> from saq_jax import LSQ, QuantRule, weight_quantizer
    >>> quantize = weight_quantizer([QuantRule('w', LSQ(bits=2))])
    >>> weight_codes(quantize, {'model': {'w': jnp.array([-0.6, 0.1])}, 'scales': {'w': 0.5}})
    {'w': Array([-1,  0], dtype=int8)}
  """
  leaves, scales = named_leaves(params['model']), params['scales']
  codes = {
    path: quantizer.encode(leaves[path], scales.get(path))
    for path, quantizer in quantize.assign(params['model']).items()
    if quantizer.bits is not None
  }
  if not codes:
    raise ValueError(
      'no weight is quantized, so there are no codes: give a WeightQuantizer with a rule whose '
      'quantizer has bits.'
    )
  return codes


def track_oscillation(
  quantize: WeightQuantizer, decay: float = 0.01, threshold: float = 0.005
) -> optax.GradientTransformation:
  r"""Counts the codes that oscillate, as the last link of a chain; it changes no update.

  Of each quantized weight, with c_t its integer code after step t (arXiv 2203.11086):

      o_t = 1 if c_t != c_{t-1} and sign(c_t - c_{t-1}) != that of the code's last change, else 0
      f_t = m o_t + (1 - m) f_{t-1},   m = decay

  A code's first change has nothing to be opposite to, and does not count. The codes are those of
  `params + updates`, so it must see the updates as they are applied. A learnt scale that moves can
  change a code as well. It costs one rounding of the weights a step, and keeps 6 bytes a weight.

  Args:
    quantize: of the parameters.
    decay: m, above 0 and at most 1: 0.01 looks back some 100 steps.
    threshold: of f, from 0 to below 1, above which a code is said to oscillate. With both defaults,
      which are the paper's, it is above for 69 steps after a single turn, and stays above if a
      code turns oftener than that.

  Returns:
    A `GradientTransformation` with an `OscillationState`, whose init and update need `params`.

  Raises:
    ValueError: at construction for a number out of its range; in init if nothing is quantized; in
      update if params are missing.

  Example:
    >>> import jax.numpy as jnp, optax
    >>> from saq_jax import LSQ, QuantRule, weight_quantizer
    >>> quantize = weight_quantizer([QuantRule('w', LSQ(bits=2))])
    >>> params = {'model': {'w': jnp.array([0.2, 0.2])}, 'scales': {'w': jnp.array(0.5)}}
    >>> tx = optax.chain(optax.sgd(1.0), track_oscillation(quantize))
    >>> state = tx.init(params)
    >>> for push in (0.2, -0.2):  # over the threshold between two codes, and back
    ...   g = {'model': {'w': jnp.array([-push, 0.0])}, 'scales': {'w': jnp.array(0.0)}}
    ...   updates, state = tx.update(g, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> float(state[-1].changed), float(state[-1].oscillating)
    (0.5, 0.5)

  References:
    Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", arXiv 2203.11086.
  """
  if not 0 < decay <= 1:
    raise ValueError(f'track_oscillation(decay={decay!r}): must be above 0 and at most 1.')
  if not 0 <= threshold < 1:
    raise ValueError(f'track_oscillation(threshold={threshold!r}): must be from 0 to below 1.')

  def init_fn(params: PyTree) -> OscillationState:
    codes = weight_codes(quantize, params)
    return OscillationState(
      codes,
      {path: jnp.zeros(code.shape, jnp.int8) for path, code in codes.items()},
      {path: jnp.zeros(code.shape, jnp.float32) for path, code in codes.items()},
      # One buffer a field: a buffer in two fields could not be donated.
      jnp.zeros((), float),
      jnp.zeros((), float),
    )

  def update_fn(
    updates: PyTree, state: OscillationState, params: PyTree | None = None
  ) -> tuple[PyTree, OscillationState]:
    if params is None:
      raise ValueError('track_oscillation needs params: call tx.update(updates, state, params).')
    codes = weight_codes(quantize, optax.apply_updates(params, updates))
    turn = {
      path: jnp.sign(code.astype(jnp.int16) - state.codes[path].astype(jnp.int16)).astype(jnp.int8)
      for path, code in codes.items()
    }
    frequency = {
      path: decay * (turn[path] * state.direction[path] < 0) + (1 - decay) * f
      for path, f in state.frequency.items()
    }
    direction = {path: jnp.where(d == 0, state.direction[path], d) for path, d in turn.items()}
    return updates, OscillationState(
      codes,
      direction,
      frequency,
      fraction({path: d != 0 for path, d in turn.items()}),
      fraction({path: f > threshold for path, f in frequency.items()}),
    )

  return optax.GradientTransformation(init_fn, update_fn)


def fraction(chosen: PyTree) -> Array:
  """The fraction of all elements of a tree that are true.

  Args:
    chosen: a tree of arrays of bools, at least one element in all.

  Returns:
    A floating scalar.
  """
  leaves = jax.tree.leaves(chosen)
  return sum(jnp.sum(x, dtype=float) for x in leaves) / sum(x.size for x in leaves)
