"""A picture of what an experiment trains and evaluates on, as the network sees it.

    python -m saq_jax.analysis.batch_sheet --config configs/deit_s_4bit.py [--png FILE]

Nothing is trained. To be looked at before a long run: wrong labels, colours or crops show at once.
"""

import itertools
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from saq_jax.data.builders import open_builder
from saq_jax.data.datasets import Dataset
from saq_jax.data.decode import RecordError
from saq_jax.data.source import eval_source, train_source
from saq_jax.training.bounds import ConfigError
from saq_jax.training.config import ExperimentConfig
from saq_jax.training.flags import UsageError, read_flags, take_flag
from saq_jax.training.inputs import load_splits, require_enough
from saq_jax.training.stages import make_step_config
from saq_jax.training.step import StepConfig, augmented, prepare_images

HELP = """\
Draws the first training batch of a quantized stage, augmented, mixed and labelled as in the run,
and the first images that are evaluated on.

usage: python -m saq_jax.analysis.batch_sheet [--config FILE] [--png FILE] [--config.KEY=VALUE ...]

  --config FILE       an experiment, as for saq_jax.main.
  --png FILE          the picture; default: batch.png.
  --config.KEY=VALUE  changes one setting: --config.augment.rand_augment=9.
"""

_COLUMNS, _ROWS, _EVAL_ROWS = 8, 4, 1


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command line.

  Args:
    argv: the arguments after the program's name; those of the process by default.

  Returns:
    The exit code: 0, 1 for data that cannot be used, or 2 for wrong input.
  """
  arguments = list(sys.argv[1:] if argv is None else argv)
  if any(a in ('--help', '-h') for a in arguments):
    print(HELP, end='')
    return 0
  try:
    path = take_flag(arguments, '--png') or 'batch.png'
    config, name, workdir = read_flags(arguments)
    if workdir is not None:
      raise UsageError('--workdir is not a flag of this program; see --help.')
    figure = draw_batches(config, name)
    with matplotlib.rc_context({'font.size': 9}):
      figure.savefig(path)
  except (UsageError, ConfigError, RecordError, OSError) as error:
    print(f'saq_jax: {error}', file=sys.stderr)
    return 1 if isinstance(error, RecordError) else 2
  print(path)
  return 0


def draw_batches(config: ExperimentConfig, title: str) -> Figure:
  """Draws the first training batch and the first evaluation images.

  Args:
    config: the experiment.
    title: above the picture.

  Returns:
    A figure to be saved.

  Raises:
    ConfigError: if the data cannot be read or are too few.
    RecordError: if an image cannot be decoded.
  """
  train, test = load_splits(config)
  require_enough(config, train)
  names = list(config.data.classes) or _class_names(config)
  step = make_step_config(config, config.quant_stage, train.num_classes, 'qat')
  splits = config.data.splits
  rows = [
    (f'{title}: training on {splits[0]}', _training(config, step, train), _ROWS),
    (f'evaluating on {splits[1]}', _evaluation(config, step, test), _EVAL_ROWS),
  ]
  rows = [(words, pairs, min(most, -(-len(pairs) // _COLUMNS))) for words, pairs, most in rows]
  heights = [1.75 * count + 0.35 for _, _, count in rows]
  figure = Figure((1.4 * _COLUMNS, sum(heights)), dpi=110, layout='constrained')
  FigureCanvasAgg(figure)
  grid = figure.add_gridspec(len(rows), 1, height_ratios=heights)
  for k, (words, pairs, count) in enumerate(rows):
    part = figure.add_subfigure(grid[k])
    part.suptitle(words, x=0.01, ha='left', fontsize=12)
    axes = part.subplots(count, _COLUMNS, squeeze=False)
    for place, pair in itertools.zip_longest(axes.ravel(), pairs[: count * _COLUMNS]):
      _draw(place, pair, names, step)
  return figure


def _training(
  config: ExperimentConfig, step: StepConfig, train: Dataset
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Images and labels of the first step."""
  batch = train_source(
    train, config.data.batch_size, seed=config.seed, repeats=config.augment.repeats
  )[0]
  # The key of step 0, as `step_key` makes it.
  key = jax.random.fold_in(jax.random.key(config.seed), 0)
  images, labels = jax.jit(augmented, static_argnums=1)(batch, step, key)
  return list(zip(np.asarray(images), np.asarray(labels), strict=True))


def _evaluation(
  config: ExperimentConfig, step: StepConfig, test: Dataset
) -> list[tuple[np.ndarray, np.ndarray]]:
  """Images and labels of the first evaluation batch, without padding."""
  batch = eval_source(test, min(_COLUMNS * _EVAL_ROWS, config.data.eval_batch_size))[0]
  images = prepare_images(batch['image'], step)
  pairs = zip(np.asarray(images), batch['label'], batch['mask'], strict=True)
  return [(image, label) for image, label, mask in pairs if mask]


def _class_names(config: ExperimentConfig) -> list[str]:
  """The names of all classes."""
  names: list[str] = (
    open_builder(config.data.name, config.data.data_dir).info.features['label'].names
  )
  return names


def _draw(axes: Axes, pair: Any, names: Sequence[str], step: StepConfig) -> None:
  """One image, as it was before it was normalised, and its label or the shares of its labels."""
  axes.set_axis_off()
  if pair is None:
    return
  image, label = pair
  pixels = np.clip(image * np.asarray(step.std) + np.asarray(step.mean), 0, 1)
  axes.imshow(pixels if pixels.shape[-1] == 3 else pixels[..., 0], cmap='grey', vmin=0, vmax=1)
  if np.ndim(label):
    best = np.argsort(-label, kind='stable')[:2]
    words = [f'{100 * label[k]:.0f} % {names[k]}' for k in best if label[k] > 0]
  else:
    words = [names[int(label)]]
  axes.set_title('\n'.join(textwrap.shorten(word, 24, placeholder='…') for word in words), pad=3)


if __name__ == '__main__':
  sys.exit(main())
