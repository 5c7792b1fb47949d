"""The stages of an experiment, made from its settings and run in order."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from saq_jax._paths import PyTree
from saq_jax.data.datasets import Dataset
from saq_jax.data.loader import Reading
from saq_jax.oscillation import track_oscillation
from saq_jax.training.bounds import ConfigError
from saq_jax.training.build import build_optimizer, build_slot, known_choices, total_steps
from saq_jax.training.config import ExperimentConfig, StageConfig
from saq_jax.training.evaluate import Score, make_evaluator
from saq_jax.training.given import Given, Weights, given_weights
from saq_jax.training.inputs import flips_on_host, load_splits, mesh_of, require_fitting_batches
from saq_jax.training.loop import Stage, run_stage
from saq_jax.training.network import FLOATING, build_network
from saq_jax.training.profile import Profile
from saq_jax.training.sharding import replicated
from saq_jax.training.signals import Stop
from saq_jax.training.state import TrainState, new_state, state_from_weights
from saq_jax.training.step import StepConfig, prepare_images
from saq_jax.training.strategy_config import StrategyConfig
from saq_jax.training.workdir import write_json

_SCORE = 'score.json'


@dataclasses.dataclass(frozen=True)
class Outcome:
  """A finished stage.

  Attributes:
    stage: what was trained.
    params: final parameters, on the host.
    batch_stats: final running statistics, on the host.
    score: on the test split.
    directory: where its checkpoints and metrics are.
    image_shape: of one image, [H, W, C].
  """

  stage: Stage
  params: PyTree
  batch_stats: PyTree
  score: Score
  directory: Path
  image_shape: tuple[int, ...]


def train_all(
  config: ExperimentConfig, workdir: Path, stop: Stop, profile: Profile | None = None
) -> list[Outcome]:
  """Trains every stage of an experiment, going on where an earlier run of it ended.

  Args:
    config: the experiment.
    workdir: its directory; each stage has a folder of its name in it.
    stop: asks to save and leave.
    profile: steps to record, if any.

  Returns:
    The finished stages: the float one, then `config.methods`. Where weights were given, the first
    is these weights as they are, with the name 'given'; it is left out if their head does not fit
    or they were trained with quantizers.

  Raises:
    ConfigError: if the batch does not fit the data or the devices, or the given weights the model.
    PreemptedError, DivergedError: as `run_stage`.
  """
  train, test = load_splits(config)
  mesh = mesh_of(config)
  require_fitting_batches(config, train, mesh)
  require_perturbed(config, train)
  outcomes: list[Outcome] = []
  weights: Weights | None = None
  fresh: frozenset[str] = frozenset()
  if config.init_from is not None:
    given = given_weights(config, train.num_classes, train.image_shape, workdir)
    weights, fresh = given.weights, given.fresh
    config = dataclasses.replace(config, model=given.model)
    if given.floating:
      outcomes.append(_as_given(config, given, train, test, mesh, workdir))
  for name in config.methods if weights else ('float', *config.methods):
    stage = make_stage(config, name, train)
    begin = functools.partial(_begin, stage, config, fresh)
    directory = workdir / name
    state, score = run_stage(stage, begin, weights, train, test, mesh, directory, stop, profile)
    params, batch_stats = _fetched((state.params, state.batch_stats), mesh)
    outcomes.append(Outcome(stage, params, batch_stats, score, directory, train.image_shape))
    if name == 'float':
      weights = params['model'], batch_stats, params['scales']
  return outcomes


def require_perturbed(config: ExperimentConfig, train: Dataset) -> None:
  """Refuses patterns of `strategy.perturb_only` that fit no parameter, before anything is trained.

  Args:
    config: the experiment.
    train: the training examples, for their size and classes.

  Raises:
    ConfigError: if one fits none, or all that it fits is left out by `saq.perturb_*`.
  """
  if not config.strategy.perturb_only or not ('saq' in config.methods or config.compare.seeds):
    return
  stage = make_stage(config, 'saq', train)
  images = jax.ShapeDtypeStruct((1, *train.image_shape), jnp.float32)
  try:
    jax.eval_shape(functools.partial(new_state, stage.network, stage.tx, config.seed), images)
  except ConfigError as error:
    raise ConfigError(
      f'config.strategy.perturb_only={config.strategy.perturb_only}, of what config.saq.perturb_* '
      f'leave in: {error}'
    ) from None


def _fetched(tree: PyTree, mesh: Mesh) -> PyTree:
  """Arrays on the host, wherever on the devices of the run they lie."""
  together = jax.jit(lambda x: x, out_shardings=replicated(mesh))
  return jax.device_get(together(tree))


def _as_given(
  config: ExperimentConfig,
  given: Given,
  train: Dataset,
  test: Dataset,
  mesh: Mesh,
  workdir: Path,
) -> Outcome:
  """The given weights at full precision, evaluated once: what all later figures compare with."""
  stage = dataclasses.replace(make_stage(config, 'float', train), name='given')
  model, batch_stats, _ = given.weights
  params = {'model': model, 'scales': {}}
  directory = workdir / stage.name
  noted = directory / _SCORE
  if noted.exists():
    score = Score(**json.loads(noted.read_text(encoding='utf-8')))
  else:
    evaluate = make_evaluator(
      stage.network, stage.step, mesh, test, stage.eval_batch_size, stage.reading
    )
    score = evaluate(params, batch_stats)
    if jax.process_index() == 0:
      directory.mkdir(exist_ok=True)
      write_json(noted, dataclasses.asdict(score))
  print(
    f'  at full precision, as given: {100 * score.accuracy:.1f} % of {config.data.splits[1]!r} '
    f'({score.correct}/{score.examples})',
    flush=True,
  )
  return Outcome(stage, params, batch_stats, score, directory, train.image_shape)


def make_stage(config: ExperimentConfig, name: str, train: Dataset) -> Stage:
  """Makes a stage of the settings.

  Args:
    config: the experiment.
    name: 'float', 'qat' or 'saq'.
    train: the training examples, for the length of an epoch and the classes.

  Returns:
    The stage.
  """
  settings = config.float_stage if name == 'float' else config.quant_stage
  quant = FLOATING if name == 'float' else config.quant
  network = build_network(config.model, quant, train.num_classes)
  steps_per_epoch = len(train) / config.data.batch_size
  steps = total_steps(settings, steps_per_epoch)
  slot = build_slot(
    network,
    config.saq if name == 'saq' else None,
    steps_per_epoch,
    config.strategy,
    total_steps=steps,
    seed=config.seed,
  )
  optimizer, lr = build_optimizer(settings, steps_per_epoch)
  tracked = config.watch.oscillation and name != 'float'
  return Stage(
    name=name,
    network=network,
    slot=slot,
    optimizer=optimizer,
    tracker=track_oscillation(network.quantize) if tracked else None,
    lr=lr,
    step=make_step_config(config, settings, train.num_classes, name),
    seed=config.seed,
    repeats=config.augment.repeats,
    reading=Reading(config.data.workers, config.data.timeout),
    batch_size=config.data.batch_size,
    eval_batch_size=config.data.eval_batch_size,
    total_steps=steps,
    steps_per_epoch=steps_per_epoch,
    eval_every=max(1, round(config.eval_every_epochs * steps_per_epoch)),
    checkpoint_every=max(1, round(config.checkpoint_every_epochs * steps_per_epoch)),
    log_every=config.log_every_steps,
    mesh=config.mesh,
    per_device=name == 'saq' and config.saq.perturbation != 'batch',
    group_size=config.saq.group_size,
    taken=known_choices(config.strategy, steps, config.seed) if name == 'saq' else None,
    watch=config.watch,
    checkpoint=config.checkpoint,
  )


def make_step_config(
  config: ExperimentConfig, settings: StageConfig, num_classes: int, name: str
) -> StepConfig:
  """What a step does beside the network and the optimizer.

  Args:
    config: the experiment.
    settings: of the stage.
    num_classes: of the dataset.
    name: of the stage; 'saq' alone has a strategy.

  Returns:
    The settings of the step.
  """
  augment = config.augment
  strategy = config.strategy if name == 'saq' else StrategyConfig()
  return StepConfig(
    mean=config.data.mean,
    std=config.data.std,
    pad_crop=augment.pad_crop,
    flip=augment.flip and not flips_on_host(config),
    erasing=augment.erasing,
    mixup=augment.mixup,
    cutmix=augment.cutmix,
    num_classes=num_classes,
    label_smoothing=settings.label_smoothing,
    batch_stats_from_both=config.saq.batch_stats_from_both,
    second_pass_float32=config.saq.second_pass_float32,
    accumulate=settings.accumulate,
    shards=jax.device_count(),
    gather_codes=config.mesh.gather == 'codes',
    first_examples=0.0 if strategy.name == 'momentum' else strategy.first_examples,
    second_examples=strategy.second_examples,
  )


def _begin(
  stage: Stage,
  config: ExperimentConfig,
  fresh: frozenset[str],
  images: Array,
  weights: Weights | None,
) -> TrainState:
  """The state at step 0: random weights, or given ones with scales found from a batch."""
  inputs = prepare_images(images, stage.step)
  if weights is None:
    return new_state(stage.network, stage.tx, config.seed, inputs)
  return state_from_weights(stage.network, stage.tx, config.seed, inputs, *weights, fresh=fresh)
