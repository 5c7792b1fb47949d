"""The study of benchmarks/: its data, its choices, its runs in the quick form, and its tables."""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from scipy import stats

from saq_jax.analysis.seeds import SeedTrainer, _axes
from saq_jax.data.source import train_source
from saq_jax.training.state import new_state
from saq_jax.training.step import prepare_images, train_step

sys.path.insert(0, str(Path(__file__).parent.parent / 'benchmarks'))

import study
import study_data
from study_figures import Study, holm
from study_parts import Cell, Job, Parts, jobs, read, write
from study_plan import FULL, METHODS, QUICK, TRAINED, config_of, variant, variants
from study_tables import difference_table, overall_table, tables, value_table

CELL = Cell('vit', 'hard')
STEPS = 11  # of the quick plan


@pytest.fixture(scope='module')
def splits(digits_dir):
  return {name: study_data.load(name, digits_dir) for name in study_data.DATA}


@pytest.fixture(scope='module')
def quick(digits_dir, tmp_path_factory):
  """A finished quick study: its directory."""
  directory = tmp_path_factory.mktemp('study')
  study.main(['--quick', '--work', str(directory), '--data-dir', digits_dir])
  return directory


# The data and the seeds.


def test_no_example_is_in_two_splits(splits):
  found = [
    {image.tobytes() for image in getattr(splits['digits'], name).images}
    for name in ('train', 'validation', 'test')
  ]
  assert [len(images) for images in found] == [1150, 288, 359]
  assert len(set.union(*found)) == 1797


def test_hard_is_twenty_a_class_with_a_fifth_of_the_labels_wrong(splits):
  digits, hard = splits['digits'], splits['hard']
  true = {image.tobytes(): label for image, label in zip(digits.train.images, digits.train.labels)}
  right = np.array([true[image.tobytes()] for image in hard.train.images])
  assert np.bincount(right).tolist() == [20] * 10
  wrong = right != hard.train.labels
  assert np.bincount(right[wrong]).tolist() == [4] * 10
  assert wrong.mean() == 0.2
  assert len({image.tobytes() for image in hard.train.images}) == 200
  # Wrong labels are spread over the classes, and the other splits are as they were.
  assert len(set(hard.train.labels[wrong])) > 5
  for name in ('validation', 'test'):
    np.testing.assert_array_equal(getattr(hard, name).labels, getattr(digits, name).labels)


def test_hard_is_always_the_same(splits):
  again = study_data.few_and_noisy(splits['digits'].train)
  np.testing.assert_array_equal(again.images, splits['hard'].train.images)
  np.testing.assert_array_equal(again.labels, splits['hard'].train.labels)
  other = study_data.few_and_noisy(splits['digits'].train, seed=1)
  assert (other.labels != again.labels).any()


@pytest.mark.parametrize('plan', [FULL, QUICK])
def test_seeds_that_choose_are_not_those_of_the_figures(plan):
  assert not set(plan.tuning_seeds) & set(plan.final_seeds)


def test_every_method_has_the_same_budget():
  assert {len(FULL.tried(method)) for method in TRAINED} == {4}
  assert (len(FULL.tuning_seeds), len(FULL.final_seeds)) == (4, 16)


# What is trained.


def test_every_method_trains_with_its_strategy():
  found = variants(FULL, config_of(FULL, 'cnn', 2))
  strategies = {name: config.strategy for name, config in found.items()}
  assert (strategies['looksam-5'].alpha, strategies['looksam-10'].alpha) == (0.2, 0.7)
  assert strategies['interval-10'].period == 10
  assert strategies['swp'].tensors == 0.6
  assert strategies['sds'].second_examples == 0.5
  assert strategies['small'].first_examples == 1 / 16
  cases = {name: config.saq.case for name, config in found.items()}
  assert (cases.pop('case1'), cases.pop('case2')) == (1, 2)
  assert set(cases.values()) == {3}
  names = {variant(method, s) for method in TRAINED for s in FULL.tried(method)}
  assert names == {'qat', *found}


def test_gradients_are_counted_as_flops_are(splits):
  """Against the products in the program of a step, of those whose steps are all alike."""
  config = config_of(QUICK, 'vit', 3)
  plan = dataclasses.replace(FULL, methods=('qat', 'saq', 'sds', 'momentum', 'small'))
  train = splits['digits'].train
  trainer = SeedTrainer(config, train, lambda loss: None, variants(plan, config))
  batch = train_source(train, 32, seed=0)[0]
  flops = {}
  for method in plan.methods:
    stage = trainer.stage(method, 0.1)
    flops[method] = _products(stage, batch)
  for method, second in (('saq', 1), ('sds', 1), ('momentum', 0), ('small', 1)):
    counted = METHODS[method].gradients(second)
    assert flops[method] / flops['qat'] == pytest.approx(counted, rel=0.05), method


def _products(stage, batch):
  """Multiplications in the matrix products of a step."""
  config = dataclasses.replace(stage.step, shards=1)
  images = prepare_images(batch['image'], config)
  state = jax.eval_shape(lambda: new_state(stage.network, stage.tx, 0, images))
  step = functools.partial(
    train_step, network=stage.network, tx=stage.tx, lr=stage.lr, config=config
  )
  return _count(jax.make_jaxpr(step)(state, batch).jaxpr)


def _count(jaxpr):
  total = 0
  for equation in jaxpr.eqns:
    total += sum(_count(inner) for inner in jaxprs_in_params(equation.params))
    if equation.primitive.name == 'dot_general':
      left, right = (v.aval for v in equation.invars)
      (contracted, _), (batched, _) = equation.params['dimension_numbers']
      shared = np.prod([left.shape[i] for i in (*contracted, *batched)])
      total += left.size * right.size / shared
    elif equation.primitive.name == 'conv_general_dilated':
      total += equation.outvars[0].aval.size * np.prod(equation.invars[1].aval.shape[:3])
  return int(total)


def test_second_gradients_of_the_quick_study(quick):
  parts = Parts(quick)
  second = {m: read(parts.final(CELL, m, 3))['second'] for m in QUICK.methods}
  assert second['qat'] == [0.0, 0.0]
  assert second['saq'] == [1.0, 1.0]
  # Steps 0, 5 and 10.
  assert second['interval'] == pytest.approx([3 / STEPS] * 2, abs=1e-5)


@pytest.mark.parametrize('method', ['interval-5', 'random', 'adaptive'])
def test_steps_are_skipped_for_all_seeds_at_once(splits, method):
  """The choice stays one branch under vmap, as the count of steps has no axis of seeds."""
  config = config_of(QUICK, 'vit', 3)
  plan = dataclasses.replace(FULL, methods=('interval', 'random', 'adaptive'))
  trainer = SeedTrainer(config, splits['digits'].train, lambda _: None, variants(plan, config))
  state = jax.eval_shape(lambda: trainer.begin(method, (0, 1), None))
  assert state.step.shape == state.opt_state[0].step.shape == ()
  assert state.params['model']['cls_token'].shape[0] == 2
  step = trainer._compiled_step(method, _axes(state))
  batch = {'image': np.zeros((2, 32, 8, 8, 1), np.uint8), 'label': np.zeros((2, 32), np.int32)}
  traced, after = jax.make_jaxpr(step, return_shape=True)(state, batch, 0.1, 1.0)
  assert jax.tree.map(lambda x: x.shape, after[0]) == jax.tree.map(lambda x: x.shape, state)
  # 'adaptive' looks at each seed's own gradient: there both branches are computed.
  assert ('cond[' in str(traced)) == (method != 'adaptive')


def test_all_figures_are_there(quick, tmp_path):
  results = tmp_path / 'results.json'
  study.main(['--quick', '--work', str(quick), '--collect', '--results', str(results)])
  value = json.loads(results.read_text())
  found = value['runs']['vit-hard']['3']
  assert set(found) == {'ptq', *QUICK.methods}
  for figures in (*found.values(), value['runs']['vit-hard']['32']['float']):
    for name in ('test_accuracy', 'test_loss', 'train_loss', 'sharpness', 'adaptive_sharpness'):
      assert len(figures[name]) == 2
  # All begin at the weights of full precision and end elsewhere, each at its own place.
  losses = [tuple(figures['test_loss']) for figures in found.values()]
  assert len(set(losses)) == len(losses)
  assert value['machine']['jax'] == jax.__version__
  text = tables(Study.from_json(value))
  assert '### ViT, hard digits' in text
  assert '| SAQ every k-th step [ours] |' in text


# Parts.


def test_only_what_is_missing_is_done_again(quick, digits_dir, tmp_path, monkeypatch):
  parts = Parts(quick)
  missing = [parts.tuning(CELL, 'saq', 1), parts.final(CELL, 'saq', 3)]
  before = [read(path) for path in missing]
  for path in missing:
    path.unlink()
  ran, run = [], SeedTrainer.run
  monkeypatch.setattr(
    SeedTrainer,
    'run',
    lambda self, method, rho, seeds, *args, **more: (
      ran.append((method, seeds)) or run(self, method, rho, seeds, *args, **more)
    ),
  )
  study.main(['--quick', '--work', str(quick), '--data-dir', digits_dir])
  assert ran == [('saq', QUICK.tuning_seeds), ('saq', QUICK.final_seeds)]
  for path, old in zip(missing, before):
    assert {**read(path), 'seconds': 0} == {**old, 'seconds': 0}
  monkeypatch.setattr(SeedTrainer, 'run', None)
  study.main(['--quick', '--work', str(quick), '--data-dir', digits_dir])


def test_a_job_is_claimed_once(tmp_path):
  parts = Parts(tmp_path)
  with parts.claim('a') as first, parts.claim('a') as second, parts.claim('b') as third:
    assert (first, second, third) == (True, False, True)
  with parts.claim('a') as again:
    assert again


@pytest.mark.parametrize('plan', [FULL, QUICK])
def test_every_job_follows_what_it_waits_for(plan, tmp_path):
  parts, there = Parts(tmp_path), set()
  for job in jobs(plan):
    assert set(job.waits_for(plan, parts)) <= there
    there |= set(job.files(plan, parts))
  finals = {
    parts.final(Cell(network, data), method, bits)
    for network in plan.networks
    for data in plan.data
    for bits in plan.bits
    for method in ('ptq', *plan.methods)
  }
  assert finals <= there


def test_no_number_is_lost_in_json(tmp_path):
  write(tmp_path / 'a.json', {'x': [1.0, float('nan'), 0.1234567], 'n': (1, None)})
  assert read(tmp_path / 'a.json') == {'x': [1.0, None, 0.123457], 'n': [1, None]}
  assert [path.name for path in tmp_path.iterdir()] == ['a.json']


# The choice.


def _tuned(parts, method, scores):
  for i, (accuracy, loss) in enumerate(scores):
    validation = {'accuracy': accuracy, 'loss': loss}
    write(parts.tuning(CELL, method, i), {'validation': validation})


def test_the_choice_is_by_validation_alone(tmp_path):
  parts = Parts(tmp_path)
  nan = float('nan')
  _tuned(parts, 'qat', [([0.5], [1.0]), ([0.7], [1.0]), ([0.6], [0.1]), ([0.1], [1.0])])
  # The best diverged in one seed; of two alike the lower loss wins.
  scores = [([0.9, 0.9], [0.1, nan]), ([0.5, 0.7], [1.0, 1.0]), ([0.6, 0.6], [0.5, 1.0])]
  _tuned(parts, 'saq', [*scores, ([0.5, 0.5], [0.1, 0.1])])
  assert parts.chosen(FULL, CELL, 'qat').lr_factor == 0.25
  chosen = parts.chosen(FULL, CELL, 'saq')
  assert (chosen.rho, chosen.lr_factor) == (METHODS['saq'].settings[2].rho, 0.25)


def test_test_figures_have_no_part_in_the_choice(quick, tmp_path):
  parts = Parts(quick)
  for path in (quick / CELL.name / 'tuning').iterdir():
    assert set(read(path)) == {'setting', 'seeds', 'validation', 'seconds'}
    assert read(path)['seeds'] == list(QUICK.tuning_seeds)
  for method in QUICK.methods:
    assert read(parts.final(CELL, method, 3))['setting'] == vars(parts.chosen(QUICK, CELL, method))
  # A method's choice is before its final runs: no file of these is looked at.
  job = Job('vit', 3, 'saq', tunes=True)
  waits = job.waits_for(QUICK, parts)
  assert [p for p in waits if p.parent.name == '3bit'] == []


# The tables.


@pytest.fixture(scope='module')
def made_up():
  """Two cells, 2 bits, four seeds; 'case2' diverged once."""

  def runs(accuracy, sharpness, second):
    figures = {'test_accuracy': accuracy, 'sharpness': sharpness, 'second': [second] * 4}
    losses = [0.5, 0.6, 0.7, 0.8]
    more = {'test_loss': losses, 'train_loss': losses, 'adaptive_sharpness': sharpness}
    return {'seeds': [0, 1, 2, 3], **figures, **more}

  value = {'runs': {}, 'choices': {}}
  for cell, less in (('cnn-digits', 0.0), ('vit-hard', 0.1)):
    value['runs'][cell] = {
      '32': {'float': runs([0.95, 0.96, 0.97, 0.98], [0.1] * 4, 0.0)},
      '2': {
        'ptq': runs([0.2, 0.3, 0.2, 0.3], [0.9] * 4, 0.0),
        'qat': runs([0.90, 0.91, 0.92, 0.93], [0.2, 0.2, 0.2, 0.2], 0.0),
        'case2': runs([0.90, None, 0.91, 0.92], [0.2] * 4, 1.0),
        'saq': runs([0.93 - less, 0.93 - less, 0.95 - less, 0.96 - less], [0.1] * 4, 1.0),
        'interval': runs([0.90, 0.92, 0.91, 0.93], [0.3, 0.1, 0.2, 0.1], 0.25),
      },
    }
    settings = {'rho': 0.3, 'period': None, 'lr_factor': 1.0}
    value['choices'][cell] = {m: {'chosen': settings} for m in ('qat', 'case2', 'saq', 'interval')}
  return Study.from_json(json.loads(json.dumps(value)))


def test_holm():
  # Sorted: 0.01 x 4, 0.02 x 3, then 0.03 x 2 and 0.035 x 1, which are not below what precedes.
  assert holm([0.035, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
  assert holm([0.9, 0.8]) == [1.0, 1.0]
  assert holm([]) == []


def test_means_and_intervals(made_up):
  half = stats.t.ppf(0.975, 3) * np.std([93, 93, 95, 96], ddof=1) / 2
  rows = value_table(made_up, [('cnn-digits', 2)], 'test_accuracy', 100, 2).split('\n')
  assert f'| SAQ (case 3) | 94.25 ± {half:.2f} |' in rows
  assert '| QAT + SAM, case 2 | – |' in rows
  assert rows[2].startswith('| Full precision | 96.50 ±')


def test_differences_are_paired_and_corrected(made_up):
  qat, saq = np.array([90, 91, 92, 93]), np.array([93, 93, 95, 96])
  interval = np.array([90, 92, 91, 93])
  p = [stats.ttest_rel(other, qat).pvalue for other in (saq, interval)]
  found = made_up.differences([('cnn-digits', 2)], 'qat', 'test_accuracy')
  assert {method for _, method in found} == {'saq', 'interval'}
  first, second = (found[('cnn-digits', 2), method] for method in ('saq', 'interval'))
  assert first.p == pytest.approx(min(2 * p[0], 1))
  assert second.p == pytest.approx(max(2 * p[0], p[1]))
  assert first.shown
  assert not second.shown
  half = stats.t.ppf(0.975, 3) * np.std(saq - qat, ddof=1) / 2
  table = difference_table(made_up, [('cnn-digits', 2)], 'qat', 'test_accuracy', 100, 2)
  assert f'| SAQ (case 3) | +2.75 ± {half:.2f} * |' in table.split('\n')


def test_all_places_together(made_up):
  # A seed's difference is the mean over the places: 3, 2, 3, 3 and 10 less.
  found = made_up.overall('qat', 'test_accuracy')
  assert set(found) == {'saq', 'interval'}
  want = np.array([3, 2, 3, 3]) - 5
  assert 100 * found['saq'].paired.difference.mean == pytest.approx(want.mean())
  # QAT has 0.2 in both places: 0.3, 0.1, 0.2 and 0.1 are 0.5, -0.5, 0 and -0.5 of it more.
  found = made_up.overall('qat', 'sharpness', relative=True)['interval'].paired.difference
  assert found.mean == pytest.approx(-0.125)
  half = stats.t.ppf(0.975, 3) * np.std([0.5, -0.5, 0, -0.5], ddof=1) / 2
  assert found.high - found.mean == pytest.approx(half)
  row = next(r for r in overall_table(made_up).split('\n') if r.startswith('| SAQ (case 3)'))
  cells = [cell.strip() for cell in row.split('|')]
  assert cells[2].startswith('-2.25 ±')
  assert cells[5] == '0.50 *'  # 0.1 / 0.2 in both places, without any spread
  assert cells[-2] == '2.000'
  interval = next(r for r in overall_table(made_up).split('\n') if 'k-th step' in r)
  assert interval.endswith('| 1.250 |')


def test_the_report_draws_and_prints(made_up, tmp_path, capsys):
  value = {'runs': made_up.runs, 'choices': made_up.choices}
  (tmp_path / 'results.json').write_text(json.dumps(value))
  plot = tmp_path / 'study.png'
  arguments = ['--report', '--results', str(tmp_path / 'results.json'), '--plot', str(plot)]
  study.main(arguments)
  assert '### PreResNet-8, digits' in capsys.readouterr().out
  assert plot.read_bytes().startswith(b'\x89PNG')


def test_the_tables_in_the_docs_are_those_of_the_results():
  value = json.loads(study._RESULTS.read_text(encoding='utf-8'))
  text = (study._ROOT / 'docs' / 'study.md').read_text(encoding='utf-8')
  assert tables(Study.from_json(value)).strip() in text
  runs = [
    f for bits in value['runs'].values() for methods in bits.values() for f in methods.values()
  ]
  assert {tuple(figures['seeds']) for figures in runs} == {FULL.final_seeds}


@pytest.mark.parametrize('arguments', [[], ['--collect'], ['--work', 'x', '--part', '3/2']])
def test_wrong_arguments(arguments):
  with pytest.raises(SystemExit):
    study.main(arguments)
