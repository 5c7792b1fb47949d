"""A step under any layout of devices is that of one device; what crosses the wire is counted."""

import functools
import os

import jax
import numpy as np
import optimised
import pytest
from layouts import (
  PRERESNET,
  VIT_TI,
  WHOLE_VIT_TI,
  count,
  first_weights,
  network_of,
  one_device,
  sent,
  sent_bytes,
  stepped,
)

from saq_jax import LIQ, LSQ, PACT, DoReFa, QuantRule, weight_quantizer
from saq_jax._paths import named_leaves
from saq_jax.training.gather import gather_weights
from saq_jax.training.sharding import Layout, make_mesh

CASES = {'qat': 0, 'case 1': 1, 'case 2': 2, 'case 3': 3}
NETWORKS = {'PreResNet-20': PRERESNET, 'ViT-Ti': VIT_TI}
FSDP = {'data': 1, 'fsdp': 8, 'data x fsdp': 4}  # of eight devices
# One run with all blocks in every case and layout takes a quarter of an hour.
ALL_BLOCKS = 'SAQ_TEST_ALL_BLOCKS' in os.environ


@functools.cache
def step_of(which, case, fsdp, **how):
  """A step, compiled and taken once; fsdp=0 is one device."""
  return stepped(which, case, make_mesh(fsdp) if fsdp else one_device(), **how)


def assert_same_step(ours, theirs):
  for name, x in theirs[1].items():
    np.testing.assert_allclose(ours[1][name], x, rtol=1e-9, atol=1e-12, err_msg=name)
  mine = named_leaves(ours[0])
  for path, x in named_leaves(theirs[0]).items():
    np.testing.assert_allclose(mine[path], x, rtol=1e-9, atol=1e-12, err_msg=path)


@pytest.mark.parametrize('fsdp', FSDP.values(), ids=FSDP)
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
@pytest.mark.parametrize('which', NETWORKS.values(), ids=NETWORKS)
def test_a_step_is_that_of_one_device(which, case, fsdp):
  found = step_of(which, case, fsdp)
  assert_same_step(found, step_of(which, case, 0))
  assert (count(found[2], 'all-gather') > 0) == (fsdp > 1)


@pytest.mark.parametrize('fsdp', FSDP.values() if ALL_BLOCKS else [4])
@pytest.mark.parametrize('case', CASES.values() if ALL_BLOCKS else [0])
def test_so_it_is_with_all_blocks(case, fsdp):
  assert_same_step(step_of(WHOLE_VIT_TI, case, fsdp), step_of(WHOLE_VIT_TI, case, 0))


def test_with_weights_sent_as_codes_too():
  assert_same_step(step_of(VIT_TI, 3, 4, gather_codes=True), step_of(VIT_TI, 3, 0))


def test_weights_of_the_first_pass_cross_the_wire_as_codes():
  kernels = network_of(VIT_TI).quantize.assign(first_weights(VIT_TI)[0]['model'])
  sizes = {p: x.size for p, x in named_leaves(first_weights(VIT_TI)[0]['model']).items()}
  floats = sent(step_of(VIT_TI, 3, 4)[2], 'all-gather')
  codes = sent(step_of(VIT_TI, 3, 4, gather_codes=True)[2], 'all-gather')
  small = [pair for pair in codes if pair[0] in ('s8', 'u8')]
  assert not [pair for pair in floats if pair[0] in ('s8', 'u8')]
  # Two codes of 4 bits a byte; 8 bits in the first and the last layer, where they are cut at all.
  wanted = {path: sizes[path] // (1 if q.bits == 8 else 2) for path, q in kernels.items()}
  assert sum(n for _, n in small) >= sum(n for p, n in wanted.items() if kernels[p].bits == 4)
  assert sum(n for _, n in small) <= sum(wanted.values())
  # Half a byte a weight in place of eight, as this is float64.
  inner = sum(sizes[p] for p, q in kernels.items() if q.bits == 4)
  assert sent_bytes(floats) - sent_bytes(codes) >= inner * 7.5 * 0.99


# Codes in general.


@pytest.mark.parametrize('bits', [2, 3, 4, 5, 8])
@pytest.mark.parametrize(
  'make',
  [LSQ, functools.partial(LSQ, axis=-1), functools.partial(LIQ, normalize=True), PACT, DoReFa],
  ids=['lsq', 'lsq-axis', 'liq', 'pact', 'dorefa'],
)
@pytest.mark.parametrize('shape', [(3, 3, 8, 16), (16, 5), (8, 3)])
def test_gathered_weights_are_the_quantized_ones(make, bits, shape):
  quantize = weight_quantizer([QuantRule('kernel', make(bits=bits))])
  rng = np.random.default_rng(bits)
  params = quantize.init({'kernel': rng.normal(size=shape).astype(np.float32), 'bias': np.ones(3)})
  layout = Layout(make_mesh(8), min_shard=1)
  placed = jax.device_put(params, layout.shardings(params))
  gather = optimised.jit(functools.partial(gather_weights, quantize, layout=layout, codes=True))
  compiled = gather.lower(placed).compile()
  found, wanted = compiled(placed), optimised.jit(quantize)(params)
  kernel = found['model']['kernel']
  assert kernel.sharding.is_fully_replicated
  if 'liq' in str(make).lower():
    # The mean and deviation of the pieces are added in another order: a code may flip.
    assert np.mean(np.abs(kernel - wanted['model']['kernel']) > 1e-6) < 0.01
  else:
    np.testing.assert_array_equal(kernel, wanted['model']['kernel'])
  np.testing.assert_array_equal(found['model']['bias'], params['model']['bias'])
  # A byte a weight, or half of one.
  pairs = (
    bits <= 4
    and shape != (16, 5)
    and any(n % 2 == 0 for i, n in enumerate(shape) if i != layout.axis(params['model']['kernel']))
  )
  gathered = [n for d, n in sent(compiled.as_text(), 'all-gather') if d in ('s8', 'u8')]
  assert gathered == [np.prod(shape) // (2 if pairs else 1)]


# What crosses the wire.


def test_perturbing_by_device_sends_no_more_than_plain_training():
  plain, global_, own = (
    step_of(PRERESNET, 0, 1)[2],
    step_of(PRERESNET, 3, 1)[2],
    step_of(PRERESNET, 3, 1, per_device=True)[2],
  )
  reduced = {
    name: sent_bytes(sent(text, 'all-reduce'))
    for name, text in (('plain', plain), ('global', global_), ('own', own))
  }
  weights = sum(8 * x.size for x in jax.tree.leaves(first_weights(PRERESNET)[0]))
  assert count(own, 'all-reduce') <= count(plain, 'all-reduce') < count(global_, 'all-reduce')
  # One mean of all gradients and running statistics, against two of them.
  assert weights <= reduced['own'] < 1.1 * weights
  assert reduced['global'] > 2 * weights
  for kind in ('all-gather', 'all-to-all', 'collective-permute', 'reduce-scatter'):
    assert count(own, kind) == 0
