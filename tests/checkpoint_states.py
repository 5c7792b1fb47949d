"""States for the tests of checkpoints, and how files of one are damaged."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from saq_jax.training.checkpoint import Checkpoints

KERNEL = 'layer1_0/conv1/kernel'


@struct.dataclass
class State:
  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any


def make_state(step=0, width=6, stats=True):
  """A state of the trainer's shape, with every awkward value and key a real one may have."""
  values = jax.random.normal(jax.random.key(step), (8, width))
  odd = np.array([0.0, -0.0, np.inf, np.nan, 1e-45, step, 1, 2], np.float32)
  params = {
    'model': {'layer1_0': {'conv1': {'kernel': values}}, 'head': {'kernel': jnp.asarray(odd)}},
    'scales': {KERNEL: jnp.float32(0.5 + step), 'layer1_0': jnp.full(3, 7.0 + step)},
  }
  trained = {'model': {'layer1_0': True, 'head': False}, 'scales': True}
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.masked(optax.adamw(1e-3), trained))
  stats = {'bn': {'mean': values[0].astype(jnp.bfloat16), 'seen': jnp.array([True, False])}}
  return State(jnp.int32(step), params, stats if stats else {}, tx.init(params))


def assert_same_bits(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def save_steps(directory, *steps, keep=3):
  with Checkpoints(directory, keep=keep) as checkpoints:
    for step in steps:
      checkpoints.save(step, make_state(step))
  return directory


def files_of(step_dir):
  return sorted(path for path in step_dir.rglob('*') if path.is_file())


def flip(path):
  data = bytearray(path.read_bytes())
  if data:
    data[len(data) // 2] ^= 0x55
  path.write_bytes(bytes(data))
