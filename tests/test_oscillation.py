"""The frequency of oscillating codes, step by step against a loop in NumPy over single weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from saq_jax import LSQ, DoReFa, QuantRule, weight_quantizer
from saq_jax.oscillation import track_oscillation, weight_codes
from saq_jax.training.config import ExperimentConfig, ModelConfig
from saq_jax.training.data_config import DataConfig
from saq_jax.training.loop import _replayed
from saq_jax.training.stages import make_stage
from saq_jax.training.state import new_state
from saq_jax.training.watch_config import WatchConfig
from saq_jax.training.watch_replay import StepsBack

SCALE, LOW, HIGH = 0.5, -4, 3
QUANTIZE = weight_quantizer([QuantRule(r'.*/kernel', LSQ(bits=3))])
STEPS = 60


class Digits:
  """A dataset of which only the sizes are known."""

  image_shape, num_classes = (8, 8, 1), 10

  def __len__(self):
    return 1438


def params_of(one, two):
  return {
    'model': {
      'a': {'kernel': jnp.asarray(one, jnp.float32), 'bias': jnp.ones(3)},
      'b': {'kernel': jnp.asarray(two, jnp.float32)},
    },
    'scales': {'a/kernel': jnp.float32(SCALE), 'b/kernel': jnp.float32(SCALE)},
  }


def walk(seed=0):
  """Weights that jump about a threshold, are clipped, or stay where they are."""
  rng = np.random.default_rng(seed)
  one = 0.25 + 0.2 * rng.standard_normal((STEPS + 1, 2, 3))
  two = 3 * rng.standard_normal((STEPS + 1, 4))
  two[:, 0] = 0.1
  return one.astype(np.float32), two.astype(np.float32)


def by_hand(path, decay):
  """Codes, turns and frequencies of one leaf over time, weight by weight, as the paper has it."""
  codes = np.clip(np.rint(path.reshape(len(path), -1) / SCALE), LOW, HIGH).astype(int)
  frequency, changed = np.zeros(codes.shape), np.zeros(codes.shape, bool)
  for k in range(codes.shape[1]):
    last = 0
    for t in range(1, len(codes)):
      step = codes[t, k] - codes[t - 1, k]
      turned = step != 0 and last != 0 and np.sign(step) != np.sign(last)
      frequency[t, k] = decay * turned + (1 - decay) * frequency[t - 1, k]
      changed[t, k] = step != 0
      last = step or last
  return codes, frequency, changed


@pytest.mark.parametrize(('decay', 'threshold'), [(0.01, 0.005), (0.2, 0.3), (1.0, 0.0)])
def test_every_step_is_that_of_the_loop(decay, threshold):
  tx = track_oscillation(QUANTIZE, decay, threshold)
  one, two = walk()
  known = [by_hand(path, decay) for path in (one, two)]
  params = params_of(one[0], two[0])
  state = tx.init(params)
  update = jax.jit(tx.update)
  for t in range(1, STEPS + 1):
    target = params_of(one[t], two[t])
    _, state = update(jax.tree.map(jnp.subtract, target, params), state, params)
    params = target
    for leaf, (codes, frequency, _) in zip(('a/kernel', 'b/kernel'), known, strict=True):
      assert state.codes[leaf].dtype == jnp.int8
      np.testing.assert_array_equal(state.codes[leaf].ravel(), codes[t])
      np.testing.assert_allclose(state.frequency[leaf].ravel(), frequency[t], rtol=1e-5, atol=1e-7)
    changed = np.concatenate([changes[t] for _, _, changes in known])
    above = np.concatenate([frequency[t] for _, frequency, _ in known]) > threshold
    assert float(state.changed) == pytest.approx(changed.mean())
    assert float(state.oscillating) == pytest.approx(above.mean())
  assert 0 < float(state.oscillating) < 1


def test_a_code_that_only_climbs_or_stays_never_oscillates():
  tx = track_oscillation(QUANTIZE)
  params = params_of(np.full((2, 3), -2.0), np.zeros(4))
  state = tx.init(params)
  for _ in range(6):  # from the lowest code up, one at a time
    updates = params_of(np.full((2, 3), 0.5), np.zeros(4))
    updates['scales'] = jax.tree.map(jnp.zeros_like, updates['scales'])
    _, state = tx.update(updates, state, params)
    params = optax.apply_updates(params, updates)
  assert float(state.changed) == pytest.approx(0.6)  # 6 of 10 weights
  assert float(state.oscillating) == 0


def test_a_scale_that_moves_changes_codes_too():
  tx = track_oscillation(QUANTIZE)
  params = params_of(np.full((2, 3), 0.6), np.zeros(4))
  updates = jax.tree.map(jnp.zeros_like, params)
  updates['scales']['a/kernel'] = jnp.float32(-0.2)  # 0.6 is 1 step of 0.5 and 2 steps of 0.3
  _, state = tx.update(updates, tx.init(params), params)
  assert float(state.changed) == pytest.approx(0.6)
  np.testing.assert_array_equal(state.codes['a/kernel'], 2)


def test_last_in_a_chain_it_changes_no_update():
  params = params_of(*(path[0] for path in walk()))
  g = params_of(*(path[1] for path in walk()))
  plain, tracked = optax.adamw(0.1), optax.chain(optax.adamw(0.1), track_oscillation(QUANTIZE))
  want, _ = plain.update(g, plain.init(params), params)
  got, state = tracked.update(g, tracked.init(params), params)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  moved = optax.apply_updates(params, want)
  np.testing.assert_array_equal(
    state[-1].codes['b/kernel'],
    np.clip(np.rint(np.asarray(moved['model']['b']['kernel']) / float(moved['scales']['b/kernel'])),
            LOW, HIGH),
  )  # fmt: skip


def test_the_state_keeps_its_structure_and_can_be_donated():
  tx = track_oscillation(QUANTIZE)
  params = params_of(*(path[0] for path in walk()))
  update = jax.jit(tx.update, donate_argnums=1)
  state = tx.init(params)
  before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
  for _ in range(2):
    _, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before


def test_half_precision_weights_are_followed_and_unsigned_codes_keep_their_range():
  rules = [QuantRule('w', LSQ(bits=8, signed=False))]
  quantize = weight_quantizer(rules)
  params = {'model': {'w': jnp.array([0.0, 250.0], jnp.bfloat16)}, 'scales': {'w': jnp.array(1.0)}}
  tx = track_oscillation(quantize)
  state = tx.init(params)
  for push in (200.0, -200.0):
    updates = {'model': {'w': jnp.array([push, 0], jnp.bfloat16)}, 'scales': {'w': jnp.zeros(())}}
    _, state = tx.update(updates, state, params)
    params = optax.apply_updates(params, updates)
  assert state.codes['w'].tolist() == [0, 250]
  np.testing.assert_allclose(state.frequency['w'], [0.01, 0])


def test_codes_of_quantizers_without_scale_or_bits():
  rules = [QuantRule('a/kernel', DoReFa(bits=2)), QuantRule('b/kernel', LSQ(bits=None))]
  model = params_of(np.linspace(-1, 1, 6).reshape(2, 3), np.zeros(4))['model']
  codes = weight_codes(weight_quantizer(rules), {'model': model, 'scales': {}})
  u = np.tanh(np.linspace(-1, 1, 6)) / (2 * np.tanh(1)) + 0.5
  assert list(codes) == ['a/kernel']
  np.testing.assert_array_equal(codes['a/kernel'].ravel(), np.rint(3 * u) - 2)


def test_misuse_is_one_clear_line():
  for decay in (0, -0.1, 1.5, float('nan')):
    with pytest.raises(ValueError, match='decay='):
      track_oscillation(QUANTIZE, decay)
  for threshold in (-0.1, 1.0):
    with pytest.raises(ValueError, match='threshold='):
      track_oscillation(QUANTIZE, threshold=threshold)
  params = params_of(*(path[0] for path in walk()))
  floating = weight_quantizer([QuantRule('.*/kernel', LSQ(bits=None))])
  with pytest.raises(ValueError, match='no weight is quantized'):
    track_oscillation(floating).init(params)
  tx = track_oscillation(QUANTIZE)
  with pytest.raises(ValueError, match='needs params'):
    tx.update(params, tx.init(params))


def test_a_stage_that_went_back_counts_the_weights_that_it_has():
  watch = WatchConfig(oscillation=True, backoff=0.01)
  model = ModelConfig(depth=8, width=4)
  config = ExperimentConfig(model=model, watch=watch, data=DataConfig(batch_size=8))
  stage = _replayed(make_stage(config, 'qat', Digits()), StepsBack(count=1))
  params = new_state(stage.network, stage.tx, 0, jnp.zeros((1, 8, 8, 1))).params
  key = jax.random.key(0)
  g = jax.tree.map(lambda x: jax.random.normal(key, x.shape), params)
  updates, (_, (_, tracker)) = stage.tx.update(g, stage.tx.init(params), params)
  want = weight_codes(stage.network.quantize, optax.apply_updates(params, updates))
  full = jax.tree.map(lambda p, u: p + u / 0.01, params, updates)  # at the old learning rate
  other = weight_codes(stage.network.quantize, full)
  for path, codes in tracker.codes.items():
    np.testing.assert_array_equal(codes, want[path])
  assert any(np.any(codes != want[path]) for path, codes in other.items())
