"""The flatness report of a tiny run: independent figures, a whole page, and clear errors."""

import base64
import copy
import html.parser
import itertools
import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from saq_jax import main as program
from saq_jax.analysis import flatness_plot, flatness_report, flatness_run
from saq_jax.analysis.__main__ import main
from saq_jax.analysis.flatness_page import write_page
from saq_jax.analysis.flatness_plot import draw_all
from saq_jax.data.datasets import load_examples
from saq_jax.training.checkpoint import find_checkpoint, restore_subtrees
from saq_jax.training.config import ModelConfig, QuantConfig
from saq_jax.training.metrics import MetricWriter
from saq_jax.training.network import FLOATING, build_network

COUNT, RHOS = 40, (0.05, 0.2)
QUANT = QuantConfig(bits=2, act_bits=3)
TRAINING = [
  '--config.model.width=2',
  '--config.quant.bits=2',
  '--config.quant.act_bits=3',
  '--config.data.batch_size=128',
  "--config.methods=('saq',)",
  '--config.float_stage.epochs=3',
  '--config.quant_stage.epochs=2',
]
# The second batch is padded.
MEASURING = ['--examples=40', '--batch=24', '--rhos=0.2,0.05', '--grid=3', '--eigenvalues=1']


@pytest.fixture(scope='module')
def workdir(tmp_path_factory, digits_dir):
  path = tmp_path_factory.mktemp('run') / 'digits'
  arguments = [f'--workdir={path}', f'--config.data.data_dir={digits_dir}', *TRAINING]
  assert program.main(arguments) == 0
  return path


@pytest.fixture(scope='module')
def report(workdir):
  assert main([f'--workdir={workdir}', *MEASURING]) == 0
  text = (workdir / 'flatness' / 'flatness.json').read_text(encoding='utf-8')
  return json.loads(text, parse_constant=pytest.fail)


@pytest.fixture(scope='module')
def page(workdir, report):
  return (workdir / 'flatness' / 'flatness.html').read_text(encoding='utf-8')


class Network:
  """A trained network and its loss, put together without the report's code."""

  def __init__(self, workdir, digits_dir, name):
    self.params, self.stats = restore_subtrees(workdir / name, 'params', 'batch_stats')
    self.params.setdefault('scales', {})
    net = build_network(ModelConfig(width=2), FLOATING if name == 'float' else QUANT, 10)
    self.quantize, self.model = net.quantize, net.model
    examples = load_examples('digits', 'train', digits_dir)
    self.labels = examples.labels[:COUNT]
    self.images = (examples.images[:COUNT] / np.float32(255) - 0.305) / 0.376
    self.z = jax.jit(self.quantize)(self.params)
    self.flat, self.tree = ravel_pytree(self.moved_part(self.z))
    self.value_and_grad = jax.jit(jax.value_and_grad(self.loss))

  def moved_part(self, z):
    """What a perturbation may move: all but the scales of quantizers."""
    leaves = jax.tree_util.tree_flatten_with_path(z['model'])[0]
    paths = {jax.tree_util.keystr(path): x for path, x in leaves}
    return {path: x for path, x in paths.items() if 'quant_scale' not in path}

  def logits(self, flat):
    part = self.tree(flat)
    model = jax.tree_util.tree_map_with_path(
      lambda path, x: part.get(jax.tree_util.keystr(path), x), self.z['model']
    )
    variables = {'params': model, 'batch_stats': self.stats}
    return self.model.apply(variables, self.images, train=False)

  def loss(self, flat):
    logits = self.logits(flat)
    chosen = jnp.take_along_axis(logits, self.labels[:, None], 1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(logits, 1) - chosen)


@pytest.fixture(scope='module', params=['float', 'saq'])
def pair(request, workdir, digits_dir, report):
  """A stage of the report, and the network again."""
  stage = next(stage for stage in report['stages'] if stage['name'] == request.param)
  return stage, Network(workdir, digits_dir, request.param)


def test_loss_accuracy_and_sharpness(pair, workdir):
  stage, net = pair
  loss, g = net.value_and_grad(net.flat)
  right = int(np.sum(np.argmax(jax.jit(net.logits)(net.flat), 1) == net.labels))
  assert stage['loss'] == pytest.approx(float(loss), rel=1e-4)
  assert (stage['correct'], stage['examples']) == (right, COUNT)
  assert stage['step'] == stage['total_steps'] == int(find_checkpoint(workdir / stage['name']).name)
  size = jnp.abs(net.flat) + 0.01
  steps = {'sharpness': g / jnp.linalg.norm(g),
           'adaptive_sharpness': size**2 * g / jnp.linalg.norm(size * g)}  # fmt: skip
  for kind, factor in (('sharpness', 1), ('adaptive_sharpness', 10)):
    assert [point['rho'] for point in stage[kind]] == [factor * rho for rho in RHOS]
    # The smaller radius, where rounding activations jumps the least.
    point = stage[kind][0]
    rise = net.value_and_grad(net.flat + point['rho'] * steps[kind])[0] - loss
    assert point['rise'] == pytest.approx(float(rise), rel=2e-2, abs=2e-3)


def test_the_largest_eigenvalue_and_the_trace_of_the_float_network(report, workdir, digits_dir):
  stage, net = report['stages'][0], Network(workdir, digits_dir, 'float')
  product = jax.jit(lambda v: jax.jvp(jax.grad(net.loss), (net.flat,), (v,))[1])
  v = jax.random.normal(jax.random.key(5), net.flat.shape)
  for _ in range(150):
    v = product(v) + 5 * v  # shifted, so that the largest is also the largest in size
    v = v / jnp.linalg.norm(v)
  found = stage['eigenvalues'][0]
  assert found['value'] == pytest.approx(float(v @ product(v)), rel=2e-2)
  assert found['residual'] < 0.1 * found['value']
  ways = jax.random.rademacher(jax.random.key(6), (200, net.flat.size), float)
  traces = np.asarray(jax.lax.map(lambda v: v @ product(v), ways))
  error = math.hypot(stage['trace']['standard_error'], traces.std() / 200**0.5)
  assert abs(stage['trace']['mean'] - traces.mean()) < 4 * error


def test_lines_and_plane_meet_where_they_should(pair):
  stage, _ = pair
  gradient, random = stage['line']['gradient'], stage['line']['random']
  assert gradient['radii'] == pytest.approx([-0.2, -0.1, 0, 0.1, 0.2])
  assert random['radii'] == pytest.approx([-1, -0.5, 0, 0.5, 1])
  plane = np.array(stage['plane']['loss'])
  for centre in (gradient['loss'][2], random['loss'][2], plane[1, 1]):
    assert centre == pytest.approx(stage['loss'], rel=1e-4)
  assert gradient['loss'][-1] - stage['loss'] == pytest.approx(
    stage['sharpness'][-1]['rise'], rel=2e-2, abs=2e-3
  )
  np.testing.assert_allclose(plane[:, 1], np.array(random['loss'])[[0, 2, 4]], rtol=1e-4)


def test_what_rounding_does(pair):
  stage, net = pair
  if stage['name'] == 'float':
    assert stage['diminishment'] is None
    assert stage['mismatch'] is None
    return
  g = jax.tree.map(jnp.zeros_like, net.z)
  parts = net.tree(net.value_and_grad(net.flat)[1])
  g['model'] = jax.tree_util.tree_map_with_path(
    lambda path, x: parts.get(jax.tree_util.keystr(path), jnp.zeros_like(x)), g['model']
  )
  (p,) = jax.jit(lambda at, g: jax.vjp(net.quantize, at)[1](g))(net.params, g)
  kernels = net.quantize.assign(net.params['model'])
  one, two = (
    {path: _at(tree['model'], path) for path in kernels} for tree in (g, p)
  )  # fmt: skip
  u, v = (np.concatenate([np.ravel(x) for x in tree.values()]) for tree in (one, two))
  cosine = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
  assert stage['mismatch']['cosine'] == pytest.approx(cosine, rel=1e-3)
  assert stage['mismatch']['degrees'] == pytest.approx(np.degrees(np.arccos(cosine)), rel=1e-3)
  assert list(stage['mismatch']['by_path']) == list(kernels)
  # A code has changed where the quantized value has; the scales stand still.
  length = np.sqrt(sum(np.sum(x**2) for x in net.moved_part(p).values()))
  point = stage['diminishment'][1]
  moved = jax.tree.map(lambda x, d: x + point['rho'] * d / length, net.params, p)
  moved['scales'] = net.params['scales']
  before, after = net.z['model'], jax.jit(net.quantize)(moved)['model']
  jumps = [np.ravel(_at(after, path) - _at(before, path)) for path in kernels]
  flipped = np.concatenate([np.abs(jump) > 1e-4 for jump in jumps])
  assert point['flipped'] == pytest.approx(flipped.mean(), abs=2.5 / flipped.size)
  assert point['seen'] == pytest.approx(np.linalg.norm(np.concatenate(jumps)), rel=0.2)
  assert 0 < point['flipped'] < 0.5


def _at(tree, path):
  for key in path.split('/'):
    tree = tree[key]
  return tree


class Checker(html.parser.HTMLParser):
  """Notes what a page loads, and that its tags close in order."""

  def __init__(self):
    super().__init__()
    self.open, self.sources, self.headings = [], [], []

  def handle_starttag(self, tag, attrs):
    given = dict(attrs)
    self.sources += [given[name] for name in ('src', 'href', 'srcset', 'data') if name in given]
    assert tag not in ('script', 'link', 'iframe', 'object')
    assert tag != 'img' or given['alt']
    if tag not in ('meta', 'img'):
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if self.open and self.open[-1] in ('h1', 'h2'):
      self.headings.append(data)


def checked(text):
  checker = Checker()
  checker.feed(text)
  checker.close()
  assert not checker.open
  return checker


def test_the_page_is_whole_and_loads_nothing(page, report):
  checker = checked(page)
  assert 'http://' not in page
  assert 'https://' not in page
  assert not re.search(r'@import|url\(', page)
  assert len(checker.sources) == 6
  for source in checker.sources:
    kind, code = source.split(',', 1)
    assert kind == 'data:image/svg+xml;base64'
    drawing = ElementTree.fromstring(base64.b64decode(code))
    assert drawing.tag.endswith('svg')
    for element in drawing.iter():  # a picture in a picture would be loaded too
      link = element.get('{http://www.w3.org/1999/xlink}href', '#')
      assert link.startswith(('#', 'data:'))
  assert [heading.split(':')[0] for heading in checker.headings] == [
    'Flatness of digits', 'Sharpness', 'Curvature', 'The loss along a line', 'The loss in a plane',
    'Diminishment', 'Mismatch', 'How this was made',
  ]  # fmt: skip
  assert f'python -m saq_jax.analysis {report["command"].split()[3]}' in page
  assert f'jax {jax.__version__}' in page
  for stage in report['stages']:
    assert f'({stage["correct"]}/40)' in page


def test_the_test_accuracy_is_that_of_the_runs_own_report(report, workdir):
  results = json.loads((workdir / 'results.json').read_text())['results']
  known = {result['name']: result['accuracy'] for result in results}
  assert {stage['name']: stage['test_accuracy'] for stage in report['stages']} == known


@pytest.mark.filterwarnings('error')
def test_figures_that_are_not_finite_and_names_that_look_like_html(report):
  odd = copy.deepcopy(report)
  stage = odd['stages'][1] | {'name': 'qat', 'label': 'QAT'}
  odd['stages'].append(stage)
  stage |= {'loss': math.nan, 'step': 3, 'test_accuracy': None}
  stage['sharpness'] = [{'rho': rho, 'rise': math.nan} for rho in RHOS]
  stage['eigenvalues'] = [{'value': math.nan, 'residual': math.nan}]
  stage['trace'] |= {'mean': math.inf}
  stage['line']['random']['loss'] = [math.nan] * 5
  stage['plane']['loss'] = [[math.nan] * 3] * 3
  odd['title'] = 'Flatness of <b>"me" & you</b>'
  text = write_page(odd, draw_all(odd['stages']))
  checked(text)
  assert 'Flatness of &lt;b&gt;' in text
  assert 'not finite' in text
  assert 'QAT was not trained to its end: its newest checkpoint is of step 3' in text
  assert json.loads(json.dumps(flatness_report._plain(odd)), parse_constant=pytest.fail)


def test_a_run_that_follows_its_codes_has_them_drawn(report, tmp_path):
  rows = [(step, {'loss': 1.0} | codes) for step, codes in (
    (10, {'codes_changed': 0.2, 'codes_oscillating': 0.0}),
    (15, {}),
    (20, {'codes_changed': 0.1, 'codes_oscillating': 0.05}),
  )]  # fmt: skip
  with MetricWriter(tmp_path) as writer:
    for step, figures in rows:
      writer.write(step, figures)
  codes = flatness_run._codes(tmp_path)
  assert codes == {'step': [10, 20], 'changed': [0.2, 0.1], 'oscillating': [0.0, 0.05]}
  followed = copy.deepcopy(report)
  followed['stages'][1]['oscillation'] = codes
  text = write_page(followed, draw_all(followed['stages']))
  assert 'Oscillation during training' in checked(text).headings


def test_no_two_labels_of_a_picture_are_in_one_place(report):
  with flatness_plot.mpl.rc_context(flatness_plot._STYLE):
    for draw in (flatness_plot._line, flatness_plot._plane, flatness_plot._sharpness):
      figure = draw(report['stages'])
      figure.draw_without_rendering()
      for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
          boxes = [t.get_window_extent() for t in axis.get_ticklabels() if t.get_text()]
          assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def refused(capsys, *arguments, code=2):
  capsys.readouterr()
  assert main(list(arguments)) == code
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('saq_jax: ')
  return line


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ([], '--workdir is missing'),
    (['--workdir'], '--workdir needs a value'),
    (
      ['--workdir=W', '--stages=saq,best'],
      "'best' is not a stage; W has checkpoints of: float, saq.",
    ),
    (['--workdir=W', '--bogus=1'], "'--bogus=1' is not a flag"),
    (['--workdir=W', '--examples=0'], '--examples=0: must be a whole number from 1'),
    (['--workdir=W', '--examples=many'], '--examples=many: must be a whole number'),
    (['--workdir=W', '--batch=-4'], '--batch=-4: must be'),
    (['--workdir=W', '--grid=4'], '--grid=4: must be odd'),
    (['--workdir=W', '--eigenvalues=0'], '--eigenvalues=0: must be'),
    (['--workdir=W', '--rhos=0.1,x'], '--rhos=0.1,x: must be numbers above 0'),
    (['--workdir=W', '--rhos=0'], '--rhos=0: must be'),
    (['--workdir=W', '--seed=1.5'], '--seed=1.5: must be'),
    (['--workdir=W', '--output=W/config.json/x'], 'W/config.json/x cannot be written'),
    (['--workdir=W', '--data_dir=W/config.json'], 'config.data: '),
  ],
)
def test_wrong_input_is_one_line(workdir, capsys, monkeypatch, arguments, words):
  monkeypatch.setattr('saq_jax.analysis.flatness_report.measure', pytest.fail)
  line = refused(capsys, *(argument.replace('W', str(workdir)) for argument in arguments))
  assert words.replace('W', str(workdir)) in line


def test_a_directory_that_is_no_finished_run_is_one_line(workdir, capsys, tmp_path):
  assert 'there is no such directory' in refused(capsys, f'--workdir={tmp_path}/nowhere')
  assert 'is no run of this package' in refused(capsys, f'--workdir={tmp_path}')
  (tmp_path / 'config.json').write_text('{"config": 3}')
  assert 'config.json' in refused(capsys, f'--workdir={tmp_path}')
  (tmp_path / 'config.json').write_text('{"config": {"sead": 3}}')
  assert 'config.sead is not a setting' in refused(capsys, f'--workdir={tmp_path}')
  shutil.copy(workdir / 'config.json', tmp_path)
  line = refused(capsys, f'--workdir={tmp_path}')
  assert 'no stage' in line
  assert 'saq_jax.main' in line
  line = refused(capsys, f'--workdir={tmp_path}', '--stages=qat')
  assert "no checkpoint of 'qat'" in line


def test_a_damaged_checkpoint_exits_1(workdir, capsys, tmp_path):
  shutil.copy(workdir / 'config.json', tmp_path)
  shutil.copytree(workdir / 'saq', tmp_path / 'saq')
  for path in (tmp_path / 'saq').rglob('*'):
    if path.is_file() and path.stat().st_size > 2000:
      path.write_bytes(b'x' * 100)
  line = refused(capsys, f'--workdir={tmp_path}', '--examples=4', code=1)
  assert 'checkpoint' in line


def test_help_fits_on_a_screen(capsys):
  assert main(['--help']) == 0
  text = capsys.readouterr().out
  assert len(text.splitlines()) <= 24
  assert max(map(len, text.splitlines())) <= 100
