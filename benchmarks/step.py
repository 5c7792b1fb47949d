"""Times whole training steps of PreResNet-20 side by side: full precision, QAT and SAQ.

    python benchmarks/step.py [--batch 128] [--rounds 7] [--json FILE]

One step of each kind in turn, so that a drift of the machine's speed meets all alike. Printed are
images/s (median, least, most) and the ratio to full precision and to QAT, round by round.
"""

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from saq_jax.training.build import build_optimizer, build_slot
from saq_jax.training.config import ModelConfig, QuantConfig, SAQConfig, StageConfig
from saq_jax.training.network import FLOATING, build_network
from saq_jax.training.state import TrainState, new_state
from saq_jax.training.step import StepConfig, train_step

KINDS = ('float', 'qat', 'saq')


def make(kind: str) -> tuple[Callable[..., Any], TrainState]:
  """A compiled step and its first state."""
  network = build_network(
    ModelConfig(depth=20, width=16), FLOATING if kind == 'float' else QuantConfig(), 100
  )
  optimizer, lr = build_optimizer(StageConfig(), 1.0)
  tx = optax.chain(build_slot(network, SAQConfig() if kind == 'saq' else None, 1.0), optimizer)
  config = StepConfig(mean=(0.5,) * 3, std=(0.25,) * 3, pad_crop=4, flip=True)
  step = jax.jit(
    functools.partial(train_step, network=network, tx=tx, lr=lr, config=config), donate_argnums=0
  )
  images = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
  return step, jax.jit(lambda x: new_state(network, tx, 0, x))(images)


def measure(batch_size: int, rounds: int) -> dict[str, list[float]]:
  """Seconds a step of each kind, in interleaved rounds after one that is not counted."""
  draw = np.random.default_rng(0)
  batch = {
    'image': jax.numpy.asarray(draw.integers(0, 256, (batch_size, 32, 32, 3), dtype=np.uint8)),
    'label': jax.numpy.asarray(draw.integers(0, 100, batch_size, dtype=np.int32)),
  }
  steps = {kind: make(kind) for kind in KINDS}
  seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
  for i in range(rounds + 1):
    for kind, (step, state) in steps.items():
      began = time.perf_counter()
      state, metrics = step(state, batch)
      jax.block_until_ready((state, metrics))
      if i:
        seconds[kind].append(time.perf_counter() - began)
      steps[kind] = step, state
  return seconds


def spread(values: list[float]) -> str:
  return f'{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--batch', type=int, default=128)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--json', type=Path)
  args = parser.parse_args()
  seconds = measure(args.batch, args.rounds)
  device = f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {platform.machine()}'
  print(f'PreResNet-20, batch {args.batch}, W4A4, {args.rounds} rounds; {device}')
  print('| step | images/s | time / full precision | time / QAT |')
  print('|---|---|---|---|')
  for kind, times in seconds.items():
    rate = spread([args.batch / t for t in times])
    to = [spread([a / b for a, b in zip(times, seconds[k], strict=True)]) for k in KINDS[:2]]
    print(f'| {kind} | {rate} | {to[0]} | {to[1]} |')
  if args.json:
    args.json.write_text(json.dumps({'device': device, 'batch': args.batch, 'seconds': seconds}))


if __name__ == '__main__':
  main()
