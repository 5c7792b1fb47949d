"""Times depthwise convolutions as XLA has them and as this package computes them, side by side.

    python benchmarks/depthwise.py [--rounds 9] [--json FILE]

3x3 kernels, stride 1, 16 images of 32x32 pixels with 144 channels (a block of MobileNetV2 for
CIFAR), float32: the layer, and both its gradients. One call of each kind in turn; printed are
milliseconds (median, least, most) and the ratio, round by round.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from saq_jax.layers import Conv

SHAPE, CHANNELS = (16, 32, 32), 144


def make() -> dict[str, Callable[[], Any]]:
  """Compiled calls by what they compute."""
  draw = np.random.default_rng(0)
  x = jnp.asarray(draw.normal(size=(*SHAPE, CHANNELS)), jnp.float32)
  kernel = jnp.asarray(draw.normal(size=(3, 3, 1, CHANNELS)), jnp.float32)
  calls = {}
  for name, conv in (('xla', jax.lax.conv_general_dilated), ('saq_jax', None)):
    chosen = {} if conv is None else {'conv_general_dilated': conv}
    layer = Conv(
      CHANNELS, (3, 3), padding=1, feature_group_count=CHANNELS, use_bias=False, **chosen
    )

    def forward(x, kernel, layer=layer):
      return layer.apply({'params': {'kernel': kernel}}, x)

    def gradients(x, kernel, forward=forward):
      return jax.grad(lambda *args: jnp.sum(forward(*args) ** 2), (0, 1))(x, kernel)

    for what, fn in (('layer', forward), ('gradients', gradients)):
      compiled = jax.jit(fn).lower(x, kernel).compile()
      calls[f'{name} {what}'] = lambda compiled=compiled: compiled(x, kernel)
  return calls


def spread(values: list[float]) -> str:
  return f'{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=9)
  parser.add_argument('--json', type=Path)
  args = parser.parse_args()
  calls = make()
  seconds: dict[str, list[float]] = {name: [] for name in calls}
  for i in range(args.rounds + 1):
    for name, call in calls.items():
      began = time.perf_counter()
      jax.block_until_ready(call())
      if i:
        seconds[name].append(time.perf_counter() - began)
  device = f'{jax.devices()[0].device_kind}, jax {jax.__version__}'
  print(f'depthwise 3x3, {SHAPE} x {CHANNELS}, {args.rounds} rounds; {device}')
  print('| | XLA, ms | here, ms | ratio |\n|---|---|---|---|')
  for what in ('layer', 'gradients'):
    theirs, ours = ([1e3 * s for s in seconds[f'{who} {what}']] for who in ('xla', 'saq_jax'))
    ratio = [a / b for a, b in zip(theirs, ours, strict=True)]
    print(f'| {what} | {spread(theirs)} | {spread(ours)} | {spread(ratio)} |')
  if args.json:
    args.json.write_text(json.dumps({'device': device, 'seconds': seconds}))


if __name__ == '__main__':
  main()
