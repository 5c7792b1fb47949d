"""Whole training steps under a layout of eight virtual devices, and what is sent between them."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh

from saq_jax.training.build import build_optimizer, build_slot
from saq_jax.training.config import ModelConfig, QuantConfig, SAQConfig, StageConfig
from saq_jax.training.network import build_network
from saq_jax.training.passes import Groups
from saq_jax.training.sharding import AXES, Layout, over_batch, replicated
from saq_jax.training.state import new_state
from saq_jax.training.step import StepConfig, train_step

PRERESNET = ModelConfig(name='preresnet', depth=20, width=16), QuantConfig(), (8, 8, 3)
WHOLE_VIT_TI = (
  ModelConfig(name='vit', size='Ti', patch=16),
  QuantConfig(weights='lsq', acts='lsq', first_act_bits=8),
  (32, 32, 3),
)
# Two of its twelve blocks, which are alike: XLA's time grows with the square of their number.
VIT_TI = dataclasses.replace(WHOLE_VIT_TI[0], depth=2), *WHOLE_VIT_TI[1:]
CLASSES, BATCH = 10, 8


def one_device():
  return Mesh(np.array(jax.devices()[:1]).reshape(1, 1), AXES, axis_types=(AxisType.Auto,) * 2)


@functools.cache
def network_of(which):
  model, quant, _ = which
  return build_network(model, quant, CLASSES)


def beginning(which, tx):
  """The state at step 0."""
  return new_state(network_of(which), tx, 0, jnp.zeros((1, *which[2])))


@functools.cache
def first_weights(which):
  """The same weights for every layout, as numpy arrays.

  Biases are not 0: a channel that is constant in a batch would then be at the edge of its ReLU, and
  the last bit of its mean would decide.
  """
  state = jax.jit(lambda: beginning(which, optax.identity()))()
  params, stats = jax.device_get((state.params, state.batch_stats))
  rng = np.random.default_rng(0)

  def biased(path, x):
    return x + 0.1 * rng.normal(size=x.shape) if path[-1].key == 'bias' else x

  return jax.tree_util.tree_map_with_path(biased, params), stats


def batch_of(which):
  rng = np.random.default_rng(
    1
  )  # of 0, an activation is 0 but for the last bit: either side of ReLU
  images = rng.integers(0, 256, (BATCH, *which[2]), np.uint8)
  return {'image': images, 'label': rng.integers(0, CLASSES, BATCH).astype(np.int32)}


def stepped(which, case, mesh, **how):
  """One step: the parameters after it, its metrics, and the compiled program's text.

  In float64, as a rounding of an activation that falls otherwise is no matter of rounding errors.
  """
  with jax.enable_x64(True):
    return _stepped(which, case, mesh, **how)


def _stepped(which, case, mesh, per_device=False, group_size=None, **how):
  net = network_of(which)
  layout = Layout(mesh, min_shard=256)
  slot = build_slot(net, SAQConfig(case=case, rho=0.1) if case else None, 1.0)
  optimizer, lr = build_optimizer(StageConfig(lr=0.05), 1.0)
  tx = optax.chain(slot, optimizer)
  params, stats = jax.tree.map(lambda x: np.asarray(x, np.float64), first_weights(which))
  state = jax.eval_shape(functools.partial(beginning, which, tx)).replace(
    step=jnp.zeros((), jnp.int32),
    seed=jnp.zeros((), jnp.uint32),
    params=params,
    batch_stats=stats,
    opt_state=tx.init(params),
  )
  placed = layout.shardings(state)
  step = jax.jit(
    functools.partial(
      train_step,
      network=net,
      tx=tx,
      lr=lr,
      config=StepConfig((0.5,), (0.25,), shards=mesh.size, **how),
      groups=Groups(slot, optimizer, mesh, group_size) if per_device else None,
      layout=layout,
    ),
    in_shardings=(placed, over_batch(mesh)),
    out_shardings=(placed, replicated(mesh)),
  )
  state = jax.device_put(state, placed)
  batch = jax.device_put(batch_of(which), over_batch(mesh))
  compiled = step.lower(state, batch).compile()
  new, metrics = compiled(state, batch)
  return jax.device_get(new.params), jax.device_get(metrics), compiled.as_text()


_BITS = re.compile(r'(\d+)')


def sent(text, kind):
  """The results of a kind of collective in a program: (type, elements) each."""
  found = []
  for line in text.splitlines():
    if match := re.search(rf' = (.*?) {kind}(?:-start)?\(', line):
      for dtype, shape in re.findall(r'(\w+)\[([\d,]*)\]', match[1]):
        found.append((dtype, math.prod(int(n) for n in shape.split(',') if n)))
  return found


def count(text, kind):
  """How often a kind of collective stands in a program."""
  return len(re.findall(rf' {kind}(?:-start)?\(', text))


def sent_bytes(pairs):
  return sum(int(_BITS.search(dtype)[1]) // 8 * elements for dtype, elements in pairs)
