"""One experiment from its settings to its report, which is what the command line runs."""

from pathlib import Path

import jax
from rich.console import Console

from saq_jax.analysis.compare import run_comparison
from saq_jax.analysis.cost import model_size, product_costs
from saq_jax.analysis.report import results_table, write_report
from saq_jax.analysis.results import Result
from saq_jax.training.config import ExperimentConfig
from saq_jax.training.metrics import FILE_NAME, read_metrics
from saq_jax.training.profile import Profile
from saq_jax.training.signals import Stop
from saq_jax.training.stages import Outcome, train_all


def run(
  config: ExperimentConfig,
  name: str,
  workdir: Path,
  stop: Stop,
  profile: Profile | None = None,
) -> None:
  """Trains what the settings describe, then shows a table and writes the report.

  Args:
    config: the experiment; with `compare.seeds` a comparison of methods over seeds.
    name: of the experiment, for the report's title.
    workdir: its directory. What a stopped run left there is gone on with.
    stop: asks to save and leave.
    profile: steps to record, if any.

  Raises:
    ConfigError, PreemptedError, DivergedError: as `train_all`.
  """
  if config.compare.seeds:
    run_comparison(config, name, workdir, stop)
    return
  results = [summarize(config, outcome) for outcome in train_all(config, workdir, stop, profile)]
  if jax.process_index() == 0:
    paths = write_report(results, workdir, f'{name}: {len(results)} networks')
    console = Console(width=None if Console().is_terminal else 100)
    console.print(results_table(results))
    for path in paths.values():
      print(path)


def summarize(config: ExperimentConfig, outcome: Outcome) -> Result:
  """What the report says of a stage.

  Args:
    config: the experiment.
    outcome: a finished stage.

  Returns:
    Its score, its size and its operations, with the history of its training.
  """
  stage, score = outcome.stage, outcome.score
  floating = stage.name in ('float', 'given')
  bits, act_bits = (None, None) if floating else (config.quant.bits, config.quant.act_bits)
  quantize = None if floating else stage.network.quantize
  size = model_size(outcome.params['model'], outcome.batch_stats, quantize)
  metrics = outcome.directory / FILE_NAME
  costs = product_costs(stage.network.model, outcome.image_shape, quantize)
  return Result(
    name=stage.name,
    label=_label(stage.name, bits, config.saq.case),
    weight_bits=bits,
    act_bits=act_bits,
    accuracy=score.accuracy,
    correct=score.correct,
    examples=score.examples,
    loss=score.loss,
    size_bits=size.bits,
    bops=sum(cost.bops for cost in costs),
    history=read_metrics(metrics) if metrics.exists() else [],
  )


def _label(stage: str, bits: int | None, case: int) -> str:
  """What a reader calls a stage."""
  if stage in ('float', 'given'):
    return 'Full precision' if stage == 'float' else 'As given'
  method = 'QAT' if stage == 'qat' else 'SAQ' if case == 3 else f'Case {case}'
  return method if bits is None else f'{method} {bits}-bit'
