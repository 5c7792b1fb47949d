"""The comparison over seeds: its choices, its runs against the training loop's, and its report."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from saq_jax.analysis import compare as module
from saq_jax.analysis.compare import choose_rho, compare, run_comparison
from saq_jax.analysis.comparison import METHODS, Scores
from saq_jax.analysis.seeds import SeedScorer, SeedTrainer
from saq_jax.data.source import eval_source, train_source
from saq_jax.training.bounds import ConfigError
from saq_jax.training.loop import DivergedError, PreemptedError
from saq_jax.training.loss import cross_entropy
from saq_jax.training.parsing import default_config, parse
from saq_jax.training.signals import Stop
from saq_jax.training.stages import load_splits
from saq_jax.training.state import new_state
from saq_jax.training.step import prepare_images, train_step

SETTINGS = {
  'data.train_split': 'train[:10%]',
  'data.eval_split': 'test[:25%]',
  'data.batch_size': '16',
  'data.eval_batch_size': '64',
  'model.width': '4',
  'quant.bits': '2',
  'quant.act_bits': '2',
  'float_stage.epochs': '1',
  'quant_stage.epochs': '0.5',
  'seed': '5',
  'compare.seeds': '2',
  'compare.seeds_at_once': '1',
  'compare.rhos': '0.1,0.4',
  'compare.validation_split': 'train[95%:]',
}


@pytest.fixture(scope='module')
def config(tmp_path_factory):
  data_dir = str(tmp_path_factory.mktemp('tfds'))
  return parse(default_config(), SETTINGS | {'data.data_dir': data_dir})


@pytest.fixture(scope='module')
def finished(config, tmp_path_factory):
  """An undisturbed comparison: its directory, and what was found."""
  directory = tmp_path_factory.mktemp('compare')
  return directory, compare(config, directory, Stop())


class StopAfter(Stop):
  """Asks to stop after so many looks at it."""

  def __init__(self, looks):
    self.looks, self.reason = looks, 'SIGTERM'

  @property
  def requested(self):
    self.looks -= 1
    return self.looks < 0


# The choice of the radius.


def test_the_best_validation_accuracy_is_chosen():
  validation = {0.1: Scores((0.5, 0.9), (0.1, 0.1)), 0.2: Scores((0.8, 0.7), (1.0, 1.0))}
  assert choose_rho(validation) == 0.2


def test_a_tie_goes_to_the_lower_loss():
  # 0.1 + 0.2 is not 0.3 in binary: an order of summation must not decide.
  validation = {0.1: Scores((0.1, 0.2), (0.5, 0.5)), 0.2: Scores((0.3, 0.0), (0.4, 0.5))}
  assert choose_rho(validation) == 0.2
  assert choose_rho(dict(reversed(validation.items()))) == 0.2


def test_a_radius_that_diverged_is_passed_over():
  validation = {0.1: Scores((0.9, 0.9), (0.1, float('nan'))), 0.2: Scores((0.1, 0.1), (3.0, 3.0))}
  assert choose_rho(validation) == 0.2
  with pytest.raises(ValueError, match='finite'):
    choose_rho({0.1: validation[0.1]})


def test_test_figures_have_no_part_in_the_choice(config, finished, tmp_path):
  """With the worst test figures written over those of the chosen radii, the choice stays."""
  directory, found = finished
  changed = shutil.copytree(directory, tmp_path / 'changed')
  for path in changed.glob('seeds/*/case*.json'):
    value = json.loads(path.read_text())
    chosen = found.chosen[value['method']].rho == value['rho']
    value['test'] = {'accuracy': [0.0 if chosen else 1.0], 'loss': [9.0 if chosen else 0.0]}
    path.write_text(json.dumps(value))
  again = compare(config, changed, Stop())
  assert {m: r.rho for m, r in again.chosen.items()} == {m: r.rho for m, r in found.chosen.items()}
  assert again.chosen['case3'].test.accuracy == (0.0, 0.0)


def test_every_radius_diverged(config, finished, tmp_path):
  changed = shutil.copytree(finished[0], tmp_path / 'changed')
  for path in changed.glob('seeds/1-1/case2*.json'):
    value = json.loads(path.read_text())
    value['validation']['loss'] = [float('nan')]
    path.write_text(json.dumps(value))
  with pytest.raises(DivergedError, match='case2'):
    compare(config, changed, Stop())


# What is trained.


@pytest.mark.parametrize('method', ['float', 'case2'])
def test_seeds_together_are_the_runs_of_single_seeds(config, method):
  """Against a plain loop over `train_step`, without the staircase of quantized activations."""
  quant = dataclasses.replace(config.quant, act_bits=None, last_bits=None)
  config = dataclasses.replace(config, quant=quant)
  train, _ = load_splits(config)
  trainer = SeedTrainer(config, train, lambda loss: None)
  stage = trainer.stage(method, 0.3)
  begin = jax.jit(functools.partial(_plain_begin, stage))
  step = jax.jit(
    functools.partial(
      train_step, network=stage.network, tx=stage.tx, lr=stage.lr, config=stage.step
    )
  )
  starts, ends = [], []
  for seed in (5, 8):  # of the config and 0 and 3
    source = train_source(train, stage.batch_size, seed=seed)
    state = begin(seed, source[0]['image'])
    starts.append(state)
    for t in range(stage.total_steps):
      state, _ = step(state, source[t])
    ends.append(state)
  start, want = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *s) for s in (starts, ends))
  weights = None if method == 'float' else (start.params['model'], start.batch_stats)
  got = trainer.train(method, 0.3, (0, 3), weights)
  for part in ('params', 'batch_stats'):
    a, b, c = (np.array(_flat(getattr(state, part))) for state in (got, want, start))
    assert np.linalg.norm(a - b) < 0.002 * np.linalg.norm(b - c)


def _plain_begin(stage, seed, images):
  return new_state(stage.network, stage.tx, seed, prepare_images(images, stage.step))


def _flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_scores_are_those_of_one_large_batch(config):
  train, test = load_splits(config)
  trainer = SeedTrainer(config, train, lambda loss: None)
  stage = trainer.stage('qat')
  images = train_source(train, 16, seed=0)[0]['image']
  begin = jax.jit(functools.partial(_plain_begin, stage))
  states = [_off_zero(begin(seed, images)) for seed in (1, 2)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
  found = SeedScorer(stage, train, test, test, rho=0.2).score(stacked)

  @functools.partial(jax.jit, static_argnums=2)
  def loss(z, stats, examples):
    (batch,) = eval_source(examples, len(examples))
    seen = {'params': z['model'], 'batch_stats': stats}
    inputs = prepare_images(batch['image'], stage.step)
    logits = stage.network.model.apply(seen, inputs, train=False)
    right = jnp.argmax(logits, -1) == batch['label']
    return cross_entropy(logits, batch['label'], 0.0).mean(), right.mean()

  grad_fn = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
  for i, state in enumerate(states):
    z, stats = stage.network.quantize(state.params), state.batch_stats
    test_loss, accuracy = loss(z, stats, test)
    np.testing.assert_allclose(found['test'].accuracy[i], accuracy, rtol=1e-6)
    np.testing.assert_allclose(found['test'].loss[i], test_loss, rtol=1e-4)
    (start, _), g = grad_fn(z, stats, train)
    model = jax.tree_util.tree_map_with_path(
      lambda path, d: 0 * d if 'quant_scale' in str(path) else d, g['model']
    )
    moved = jax.tree.map(_moved_by(0.2, model), z['model'], model)
    end, _ = loss({**z, 'model': moved}, stats, train)
    np.testing.assert_allclose(found['train_loss'][i], start, rtol=1e-4)
    np.testing.assert_allclose(found['sharpness'][i], end - start, rtol=1e-3)


def _off_zero(state):
  """Moves what the norms add: fresh low-bit sums cancel to zero, where ReLU has no gradient."""
  rng = np.random.default_rng(0)

  def move(path, x):
    here = jax.tree_util.keystr(path)
    away = 0.1 * rng.normal(size=x.shape).astype(np.float32)
    return x + away if 'bn' in here and ('bias' in here or 'mean' in here) else x

  return jax.tree_util.tree_map_with_path(move, state)


def _moved_by(rho, g):
  norm = np.sqrt(sum(float(jnp.sum(d**2)) for d in jax.tree.leaves(g)))
  return lambda w, d: w + rho * d / norm


# The whole.


def test_every_method_radius_and_seed_is_there(finished):
  _, found = finished
  assert {m: [runs.rho for runs in tried] for m, tried in found.tried.items()} == {
    'qat': [0.0], 'case1': [0.1, 0.4], 'case2': [0.1, 0.4], 'case3': [0.1, 0.4]
  }  # fmt: skip
  for runs in (found.floating, *(runs for tried in found.tried.values() for runs in tried)):
    assert runs.seeds == (0, 1)
    assert len(runs.test.accuracy) == len(runs.validation.loss) == len(runs.sharpness) == 2
  assert found.floating.test.loss[0] != found.floating.test.loss[1]
  losses = {found.chosen[method].test.loss for method in METHODS}
  assert len(losses) == len(METHODS)


@pytest.mark.parametrize('looks', [14, 40])
def test_stopped_and_gone_on_with_is_the_same(config, finished, tmp_path, looks):
  with pytest.raises(PreemptedError, match=r'SIGTERM: stopped .* of 16 parts'):
    compare(config, tmp_path, StopAfter(looks))
  parts = len(list(tmp_path.glob('seeds/*/*.json')))
  assert parts < 16
  assert compare(config, tmp_path, Stop()) == finished[1]


def test_what_is_finished_is_not_trained_again(config, finished, monkeypatch):
  monkeypatch.setattr(SeedTrainer, 'train', None)
  assert compare(config, finished[0], Stop()) == finished[1]


def test_report(config, finished, capsys):
  directory, found = finished
  run_comparison(config, 'tiny', directory, Stop())
  out = capsys.readouterr().out
  for words in ('QAT', 'Case 3 (SAQ)', 'no difference shown', 'comparison.png'):
    assert words in out
  value = json.loads((directory / 'comparison.json').read_text())
  assert len(value['runs']) == 8
  assert value['summary']['case2']['rho'] == found.chosen['case2'].rho
  report = (directory / 'comparison.md').read_text()
  assert 'counts as shown where p is below 0.01' in report
  assert '![' in report
  assert (directory / 'comparison.png').read_bytes().startswith(b'\x89PNG')


# Wrong input.


@pytest.mark.parametrize(
  ('key', 'value', 'message'),
  [
    ('compare.seeds', '1', 'at least 2'),
    ('compare.rhos', '', 'at least one radius'),
    ('compare.validation_split', 'train[5%:20%]', 'overlaps'),
    ('compare.validation_split', 'test[10%:]', 'overlaps'),
    ('compare.validation_split', 'train[:10%]+test[:1%]', 'overlaps'),
    ('compare.validation_split', 'tset', 'validation_split'),
    ('init_from', 'somewhere', 'init_from'),
    ('saq.perturbation', 'device', 'by the whole batch'),
    ('data.batch_size', '1000', 'make it smaller'),
    ('quant_stage.accumulate', '7', 'multiple of 7, for accumulate'),
    ('strategy.perturb_only', 'nothing', 'matches no leaf'),
  ],
)
def test_what_cannot_be_compared(config, tmp_path, key, value, message):
  data_dir = config.data.data_dir
  wrong = parse(default_config(), SETTINGS | {'data.data_dir': data_dir, key: value})
  with pytest.raises(ConfigError, match=message):
    compare(wrong, tmp_path, Stop())


def test_splits_that_only_touch_do_not_overlap(config):
  settings = dataclasses.replace(config.compare, validation_split='train[10%:20%]')
  splits = module._splits(dataclasses.replace(config, compare=settings))
  assert [len(split) for split in splits] == [144, 144, 90]
