"""Times whole training steps side by side: full precision, QAT, SAQ and what makes SAQ cheaper.

    python benchmarks/step.py [--network preresnet20] [--kinds float qat saq] [--json FILE]

A turn is `--steps` steps of each kind, one kind after the other, so that a drift of the machine's
speed meets all alike. Printed are images/s (median, least, most) and the time of a step as a ratio
to the kinds that are called 'float' and 'qat', turn by turn.
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

from saq_jax.training.build import build_optimizer, build_slot, known_choices
from saq_jax.training.compiled import CompiledStep
from saq_jax.training.config import ModelConfig, QuantConfig, SAQConfig, StageConfig
from saq_jax.training.network import FLOATING, build_network
from saq_jax.training.state import TrainState, new_state
from saq_jax.training.step import StepConfig, train_step
from saq_jax.training.strategy_config import StrategyConfig

NETWORKS = {
  'preresnet20': (ModelConfig(depth=20, width=16), QuantConfig(), 32, 128),
  'vit_ti': (
    ModelConfig(name='vit', size='Ti'),
    QuantConfig(weights='lsq', acts='lsq', first_act_bits=8),
    224,
    16,
  ),
}
STRATEGIES = {
  'saq': StrategyConfig(),
  'interval_5': StrategyConfig(name='interval', period=5),
  'interval_10': StrategyConfig(name='interval', period=10),
  'looksam_5': StrategyConfig(name='looksam', period=5),
  'looksam_10': StrategyConfig(name='looksam', period=10, alpha=0.7),
  'random_half': StrategyConfig(name='random'),
  'swp': StrategyConfig(tensors=0.6),
  'sds': StrategyConfig(second_examples=0.5),
  'norms': StrategyConfig(perturb_only=(r'model/.*(bn|norm)\d*/(scale|bias)',)),
  'ascent_8th': StrategyConfig(first_examples=0.125),
  'ascent_16th': StrategyConfig(first_examples=0.0625),
  'momentum': StrategyConfig(name='momentum'),
}
# Steps of a kind in all, at most.
LONGEST = 10_000
KINDS = ('float', 'qat', *STRATEGIES)


def make(kind: str, which: str) -> tuple[Callable[..., Any], TrainState]:
  """A compiled step and its first state."""
  model, quant, size, _ = NETWORKS[which]
  network = build_network(model, FLOATING if kind == 'float' else quant, 100)
  optimizer, lr = build_optimizer(StageConfig(lr=1e-3, scale_lr=1e-4), 1.0)
  strategy = STRATEGIES.get(kind, StrategyConfig())
  saq = SAQConfig() if kind in STRATEGIES else None
  tx = optax.chain(build_slot(network, saq, 1.0, strategy, total_steps=LONGEST), optimizer)
  config = StepConfig(
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    pad_crop=4,
    flip=True,
    first_examples=0.0 if strategy.name == 'momentum' else strategy.first_examples,
    second_examples=strategy.second_examples,
  )
  step = functools.partial(train_step, network=network, tx=tx, lr=lr, config=config)

  def jitted(taken: bool | None) -> Any:
    return jax.jit(functools.partial(step, taken=taken), donate_argnums=0)

  taken = known_choices(strategy, LONGEST, 0) if saq else None
  images = np.random.default_rng(0).normal(size=(1, size, size, 3)).astype(np.float32)
  return CompiledStep(jitted, taken), jax.jit(lambda x: new_state(network, tx, 0, x))(images)


def measure(
  which: str, kinds: list[str], batch_size: int, rounds: int, count: int
) -> dict[str, list[float]]:
  """Seconds a step of each kind, in interleaved turns after one that is not counted."""
  draw = np.random.default_rng(0)
  size = NETWORKS[which][2]
  batch = {
    'image': jax.numpy.asarray(draw.integers(0, 256, (batch_size, size, size, 3), dtype=np.uint8)),
    'label': jax.numpy.asarray(draw.integers(0, 100, batch_size, dtype=np.int32)),
  }
  steps = {kind: make(kind, which) for kind in kinds}
  seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
  for i in range(rounds + 1):
    for kind, (step, state) in steps.items():
      began = time.perf_counter()
      for number in range(i * count + 1, (i + 1) * count + 1):
        state, metrics = step(state, batch, number)
        jax.block_until_ready((state, metrics))
      if i:
        seconds[kind].append((time.perf_counter() - began) / count)
      steps[kind] = step, state
    print(f'turn {i} of {rounds}', flush=True)
  return seconds


def spread(values: list[float]) -> str:
  return f'{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})'


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--network', choices=NETWORKS, default='preresnet20')
  parser.add_argument('--kinds', nargs='+', choices=KINDS, default=['float', 'qat', 'saq'])
  parser.add_argument('--batch', type=int)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--steps', type=int, default=1, help='a turn; a multiple of each period')
  parser.add_argument('--json', type=Path)
  args = parser.parse_args()
  batch = args.batch or NETWORKS[args.network][3]
  seconds = measure(args.network, args.kinds, batch, args.rounds, args.steps)
  device = f'{jax.devices()[0].device_kind}, jax {jax.__version__}, {platform.machine()}'
  print(f'{args.network}, batch {batch}, W4A4, {args.rounds} turns of {args.steps}; {device}')
  base = [kind for kind in ('float', 'qat') if kind in args.kinds]
  print('| step | images/s |' + ''.join(f' time / {kind} |' for kind in base))
  print('|---|---|' + '---|' * len(base))
  for kind, times in seconds.items():
    rate = spread([batch / t for t in times])
    to = [spread([a / b for a, b in zip(times, seconds[k], strict=True)]) for k in base]
    print(f'| {kind} | {rate} |' + ''.join(f' {ratio} |' for ratio in to))
  if args.json:
    found = {'device': device, 'network': args.network, 'batch': batch, 'steps': args.steps}
    args.json.write_text(json.dumps(found | {'seconds': seconds}))


if __name__ == '__main__':
  main()
