"""Weight quantization as a pure function on a parameter tree, chosen by rules over the paths."""

import dataclasses
import difflib
import re
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from saq_jax._paths import PyTree, map_named, named_leaves
from saq_jax.quantizers import Quantizer


@dataclasses.dataclass(frozen=True)
class QuantRule:
  r"""Says which leaves of a parameter tree a quantizer takes.

  Attributes:
    pattern: a regular expression that must match the whole path of a leaf, the keys joined by
      '/': `r'(stem|head)/kernel'`, `r'.*/kernel'`.
    quantizer: the quantizer of these leaves; with `bits=None` it leaves them as they are.

  Raises:
    ValueError: if the pattern is not a regular expression.
    TypeError: if `quantizer` is not a quantizer.
  """

  pattern: str
  quantizer: Quantizer

  def __post_init__(self) -> None:
    if not isinstance(self.quantizer, Quantizer):
      raise TypeError(
        f'QuantRule({self.pattern!r}, {self.quantizer!r}): the second argument must be a '
        'quantizer, such as LSQ(bits=4).'
      )
    try:
      re.compile(self.pattern)
    except re.error as error:
      raise ValueError(f'QuantRule({self.pattern!r}): not a regular expression: {error}.') from None


@dataclasses.dataclass(frozen=True)
class WeightQuantizer:
  """The function `quantize: params -> params` that `weight_quantizer` makes.

  It is a hashable value with no array in it, so it can be closed over, compared, or passed to
  `jax.jit` as a static argument.

  Attributes:
    rules: the rules in the order in which they are tried.
  """

  rules: tuple[QuantRule, ...]

  def assign(self, model_params: PyTree) -> dict[str, Quantizer]:
    """Tells which quantizer each leaf gets.

    Args:
      model_params: the model's parameters, any pytree; arrays or `jax.ShapeDtypeStruct`s.

    Returns:
      The quantizer by path, of the leaves that a rule matches, in the tree's order.

    Raises:
      ValueError: if a rule gets no leaf, or a leaf that a rule matches is not floating.
    """
    leaves = named_leaves(model_params)
    chosen = {path: rule for path in leaves if (rule := self._rule(path)) is not None}
    for rule in self.rules:
      if not any(other is rule for other in chosen.values()):
        raise ValueError(self._unmatched(rule, list(leaves)))
    for path, rule in chosen.items():
      dtype = jnp.result_type(leaves[path])
      if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
          f'QuantRule({rule.pattern!r}) matches {path!r}, which is {dtype}: only floating leaves '
          'can be quantized; narrow the pattern.'
        )
    return {path: rule.quantizer for path, rule in chosen.items()}

  def init(self, model_params: PyTree) -> dict[str, PyTree]:
    """Adds the learnable scales, found from the weights.

    Args:
      model_params: the model's parameters, any pytree of arrays.

    Returns:
      `{'model': model_params, 'scales': {path: scale}}`. A quantizer that learns nothing
      (DoReFa, bits=None) has no entry. An all-zero leaf, such as a new head, gets the scale of a
      leaf whose entries are all 1/sqrt(fan_in) (ours), so that its weights can grow into it.

    Raises:
      ValueError: as `assign`, or if `model_params` came from `init`.
    """
    if isinstance(model_params, dict) and set(model_params) == {'model', 'scales'}:
      raise ValueError("these params have their scales already: init takes the model's own.")
    leaves = named_leaves(model_params)
    scales = {}
    for path, quantizer in self.assign(model_params).items():
      if quantizer.has_scale:
        scales[path] = quantizer.init(_or_typical(jnp.asarray(leaves[path])))
    return {'model': model_params, 'scales': scales}

  def __call__(self, params: dict[str, PyTree]) -> dict[str, PyTree]:
    """Replaces the matched leaves of `params['model']` by their quantized values.

    Args:
      params: what `init` gave, or its trained values.

    Returns:
      The same structure. It is differentiable: the pullback sends gradients straight through to
      the latent weights and to `params['scales']`.

    Raises:
      ValueError: if `params` has no 'model' and 'scales', or the scale of a leaf is missing.
    """
    if not isinstance(params, dict) or set(params) != {'model', 'scales'}:
      raise ValueError(
        "the weight quantizer takes {'model': ..., 'scales': ...}: make it with "
        'params = quantize.init(model_params).'
      )
    scales = params['scales']

    def leaf(name: str, x: Array) -> Array:
      rule = self._rule(name)
      if rule is None:
        return x
      if rule.quantizer.has_scale and name not in scales:
        raise ValueError(f'no scale for {name!r}: make params with quantize.init(model_params).')
      return rule.quantizer(x, scales.get(name))

    return {'model': map_named(leaf, params['model']), 'scales': scales}

  def _rule(self, path: str) -> QuantRule | None:
    """The first rule that matches, if any."""
    return next((rule for rule in self.rules if re.fullmatch(rule.pattern, path)), None)

  def _unmatched(self, rule: QuantRule, paths: list[str]) -> str:
    """The message for a rule that gets no leaf."""
    taken = [path for path in paths if re.fullmatch(rule.pattern, path)]
    if taken:
      return (
        f'QuantRule({rule.pattern!r}) gets no leaf: an earlier rule takes all that it matches '
        f'({", ".join(taken[:3])}); put it first or remove it.'
      )
    plain = re.sub(r'[\\^$.*+?()\[\]{}|]', '', rule.pattern)
    near = difflib.get_close_matches(plain, paths, n=3, cutoff=0.0)
    return (
      f'QuantRule({rule.pattern!r}) matches no leaf. The nearest paths are: '
      f'{", ".join(map(repr, near)) or "none, the tree is empty"}.'
    )


def weight_quantizer(rules: Sequence[QuantRule]) -> WeightQuantizer:
  r"""Makes the function that quantizes the weights of a parameter tree.

  Each leaf goes to the first rule whose pattern matches its whole path; leaves without one stay
  as they are. The model then computes with `quantize(params)['model']` and needs no quantized
  layers of its own.

  Args:
    rules: one or more rules, tried in order.

  Returns:
    A `WeightQuantizer`: `quantize.init(model_params)` adds the scales and `quantize(params)`
    quantizes, structure in, same structure out, which is what `saq(quantize)` takes.

  Raises:
    ValueError: if there is no rule, or something else in the list.

  Example:
    >>> import jax.numpy as jnp
    >>> from saq_jax import LSQ, QuantRule, weight_quantizer
    >>> quantize = weight_quantizer([QuantRule(r'.*kernel', LSQ(bits=2))])
    >>> params = quantize.init({'kernel': jnp.array([-0.4, -0.1, 0.2, 0.3]), 'bias': jnp.ones(2)})
    >>> params['scales']
    {'kernel': Array(0.5, dtype=float32)}
    >>> quantize(params)['model']['kernel']
    Array([-0.5,  0. ,  0. ,  0.5], dtype=float32)
  """
  rules = (rules,) if isinstance(rules, QuantRule) else tuple(rules)
  if not rules or not all(isinstance(rule, QuantRule) for rule in rules):
    raise ValueError(f'weight_quantizer needs a list of one or more QuantRule, not {rules!r}.')
  return WeightQuantizer(rules)


def _or_typical(x: Array) -> Array:
  """`x`, or a constant of LeCun's standard deviation where all of `x` is zero."""
  fan_in = max(x.size // max(x.shape[-1] if x.ndim else 1, 1), 1)
  return jnp.where(jnp.any(x != 0), x, jnp.asarray(fan_in**-0.5, x.dtype))
