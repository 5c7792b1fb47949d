"""Checkpoints on other numbers of devices and in other layouts: the same bits."""

import os
import subprocess
import sys

import pytest

# Each process restores what the one before saved on its own devices, whole and in parts.
PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from saq_jax.training.checkpoint import Checkpoints, restore, restore_subtrees

folder, step, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
assert jax.device_count() == count
rng = np.random.default_rng(0)
values = {
  'rows': rng.normal(size=(16, 6)).astype(np.float32),
  'columns': rng.normal(size=(6, 8)).astype(np.float32),
  'both': rng.normal(size=(8, 8, 3)).astype(np.float32),
  'half': jnp.asarray(rng.normal(size=(16,)), jnp.bfloat16),
  'odd': np.array([0.0, -0.0, np.inf, np.nan, 1e-45, 1, 2, 3], np.float32),
  'count': np.int32(7),
}
specs = {
  'rows': P(('data', 'fsdp')), 'columns': P(None, 'fsdp'), 'both': P('fsdp', 'data'),
  'half': P('fsdp'), 'odd': P(), 'count': P(),
}

def placed(fsdp, cut):
  mesh = jax.make_mesh((count // fsdp, fsdp), ('data', 'fsdp'), axis_types=(AxisType.Auto,) * 2)
  return {name: NamedSharding(mesh, specs[name] if cut else P()) for name in values}

def example(shardings):
  return {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shardings[name])
    for name, x in values.items()
  }

def check(restored, shardings):
  for name, x in values.items():
    assert restored[name].sharding.is_equivalent_to(shardings[name], x.ndim), name
    assert np.asarray(restored[name]).tobytes() == np.asarray(x).tobytes(), name
    for shard in restored[name].addressable_shards:
      assert np.asarray(shard.data).tobytes() == np.asarray(x)[shard.index].tobytes(), name

layouts = [placed(fsdp, cut) for fsdp in {1, count // 2 or 1, count} for cut in (True, False)]
with Checkpoints(folder, keep=9) as checkpoints:
  for shardings in layouts:
    if step:
      found, restored = checkpoints.restore_latest(example(shardings))
      assert found == step
      check(restored, shardings)
  for shardings in layouts[:2]:
    step += 1
    checkpoints.save(step, jax.device_put(values, shardings))
(part,) = restore_subtrees(folder, 'both')
assert isinstance(part, np.ndarray) and part.tobytes() == values['both'].tobytes()
print(step)
"""


@pytest.mark.parametrize('order', [(8, 1, 4, 2), (2, 8)])
def test_a_state_moves_between_numbers_of_devices(tmp_path, order):
  step = 0
  for count in order:
    env = os.environ | {'XLA_FLAGS': f'--xla_force_host_platform_device_count={count}'}
    command = [sys.executable, '-c', PROCESS, str(tmp_path), str(step), str(count)]
    child = subprocess.run(
      command, capture_output=True, text=True, timeout=120, check=False, env=env
    )
    assert child.returncode == 0, child.stderr
    assert child.stderr == ''
    step = int(child.stdout)
  assert step == 2 * len(order)
