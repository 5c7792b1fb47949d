"""The command line: what it prints, what it refuses, and that a refusal touches nothing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from saq_jax import main as program
from saq_jax.data.datasets import load_examples
from saq_jax.training.checkpoint import restore_subtrees
from saq_jax.training.parsing import default_config, to_json
from saq_jax.training.workdir import claim

CONFIGS = sorted((Path(__file__).parent.parent / 'configs').glob('*.py'))
TINY = [
  '--config.model.width=2',
  '--config.data.batch_size=128',
  '--config.float_stage.epochs=1',
  '--config.quant_stage.epochs=1',
]


def refused(capsys, *arguments):
  """Runs the program, which must exit with 2 and one line, and returns the line."""
  assert program.main(list(arguments)) == 2
  captured = capsys.readouterr()
  lines = captured.err.strip().splitlines()
  assert len(lines) == 1, captured.err
  assert lines[0].startswith('saq_jax: ')
  assert 'Traceback' not in captured.err + captured.out
  return lines[0]


def test_help_fits_on_a_screen(capsys):
  assert program.main(['--help']) == 0
  text = capsys.readouterr().out
  assert len(text.splitlines()) <= 24
  assert max(map(len, text.splitlines())) <= 100
  for word in ('--config', '--workdir', '--config.saq.rho'):
    assert word in text


@pytest.mark.parametrize(
  ('flag', 'words'),
  [
    ('--bogus', ["'--bogus'", '--help']),
    ('nonsense', ["'nonsense'"]),
    ('--config', ['--config=VALUE']),
    ('--config.saq.rho', ['--config.saq.rho needs a value']),
    ('--config=nowhere.py', ['nowhere.py', 'no such file']),
    ('--config.saq.roh=0.1', ['config.saq.roh', 'Did you mean config.saq.rho?']),
    ('--config.nothing=1', ['config.nothing', 'quant']),
    ('--config.saq=1', ['config.saq', 'group']),
    ('--config.saq.rho.x=1', ['config.saq.rho.x']),
    ('--config.saqq.rho=1', ['config.saqq is not', 'Did you mean config.saq?', 'config has: seed']),
    ('--config.quant.bits=four', ['config.quant.bits=four', 'whole number']),
    ('--config.quant.bits=0', ['config.quant.bits=0', '2 to 8']),
    ('--config.quant.act_bits=9', ['config.quant.act_bits=9', '2 to 8']),
    ('--config.saq.rho=-1', ['config.saq.rho=-1', 'at least 0']),
    ('--config.saq.rho=nan', ['config.saq.rho=nan', 'finite']),
    ('--config.saq.case=4', ['config.saq.case=4', '1 to 3']),
    ('--config.saq.adaptive=perhaps', ['config.saq.adaptive=perhaps', 'true or false']),
    ('--config.model.depth=9', ['depth=9', '6 n + 2']),
    ('--config.model.name=vgg', ["'vgg'", "'preresnet'"]),
    ('--config.methods=sgd', ["'sgd'", "'qat'"]),
    ('--config.methods=', ['config.methods', 'at least one']),
    ('--config.methods=qat,qat', ['config.methods', 'each once']),
    ('--config.quant_stage.warmup_epochs=30', ['warmup_epochs=30', 'below its epochs']),
    ('--config.saq.warmup_epochs=30', ['saq.warmup_epochs=30', 'rho is 0']),
    ('--config.saq.perturb_weight_scales=true', ['perturb_weight_scales', 'saq.case=2']),
    ('--config.float_stage.epochs=0', ['config.float_stage.epochs', 'above 0']),
    ('--config.data.std=0', ['config.data.std', 'above 0']),
    ('--config.strategy.period=0', ['config.strategy.period=0', 'at least 1']),
    ('--config.strategy.tensors=0', ['config.strategy.tensors=0', 'above 0 and at most 1']),
    ('--config.strategy.second_examples=1.5', ['second_examples=1.5', 'above 0 and at most 1']),
    ('--config.strategy.alpha=0.5', ['config.strategy.alpha', "'full' does not read it"]),
    ('--config.strategy.perturb_only=a(', ["only('a(')", 'not a regular expression']),
  ],
)
def test_wrong_input_is_one_line_and_code_2(capsys, tmp_path, flag, words):
  workdir = tmp_path / 'run'
  line = refused(capsys, f'--workdir={workdir}', flag)
  for word in words:
    assert word in line
  assert not workdir.exists()


@pytest.mark.parametrize(
  ('flag', 'words'),
  [
    ('--config.data.batch_size=100000', ['batch_size=100000', '1438 examples']),
    ('--config.data.train_split=nope', ['nope']),
    ('--config.data.name=cifar_unprepared', ['cifar_unprepared']),
    ('--config.init_from=/nowhere/at/all', ['config.init_from', '/nowhere/at/all']),
    ('--config.data.mean=0.5,0.5', ['config.data.mean']),
    ('--config.strategy.perturb_only=model/norm', ['perturb_only', 'matches no leaf']),
  ],
)
def test_what_does_not_fit_the_data_is_one_line(capsys, tmp_path, digits_dir, flag, words):
  line = refused(
    capsys, f'--workdir={tmp_path / "run"}', f'--config.data.data_dir={digits_dir}', flag
  )
  for word in words:
    assert word in line


@pytest.mark.parametrize(
  ('code', 'words'),
  [
    ('x = 1 / 0', ['line 1', 'ZeroDivisionError']),
    ('x = 1\ndef get_config(:', ['line 2', 'SyntaxError']),
    ('def get_config():\n  return {}["bitz"]', ['line 2', 'KeyError', 'bitz']),
    (
      'from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({"quant": 3})',
      ['config.quant=3', 'group'],
    ),
    ('x = 1', ['get_config']),
    ('def get_config():\n  return 3', ['ConfigDict']),
    (
      'from saq_jax.training.parsing import default_config\n'
      'def get_config():\n  c = default_config()\n  c.bitz = 3\n  return c',
      ['line 4', 'bitz'],
    ),
    (
      'from saq_jax.training.parsing import default_config\n'
      'def get_config():\n  c = default_config()\n  c.quant.bits = "x"\n  return c',
      ['line 4', 'bits'],
    ),
    (
      'from ml_collections import ConfigDict\n'
      'def get_config():\n  return ConfigDict({"saq": {"radius": 1.0}})',
      ['config.saq.radius', 'not a setting'],
    ),
  ],
)
def test_a_config_file_that_fails_is_one_line(capsys, tmp_path, code, words):
  path = tmp_path / 'broken.py'
  path.write_text(code)
  line = refused(capsys, f'--config={path}', f'--workdir={tmp_path / "run"}')
  for word in words:
    assert word in line
  assert not (tmp_path / 'run').exists()


def test_foreign_workdir_is_refused_and_left_alone(capsys, tmp_path):
  (tmp_path / 'thesis.tex').write_text('years of work')
  line = refused(capsys, f'--workdir={tmp_path}')
  assert 'another --workdir' in line
  assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_workdir_that_is_a_file_or_has_a_foreign_mark_is_refused(capsys, tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  assert 'cannot be used' in refused(capsys, f'--workdir={file}')
  marked = tmp_path / 'marked'
  marked.mkdir()
  (marked / 'config.json').write_text('{"other": "program"}')
  assert 'not of this package' in refused(capsys, f'--workdir={marked}')
  assert (marked / 'config.json').read_text() == '{"other": "program"}'


def test_workdir_under_a_place_where_nothing_can_be_made_is_refused(capsys):
  assert 'cannot be used' in refused(capsys, '--workdir=/proc/saq_jax_run')


def settings_of(*arguments):
  return to_json(program.read_flags(arguments)[0])


def test_workdir_with_another_config_is_refused(capsys, tmp_path):
  workdir = tmp_path / 'run'
  with claim(workdir, settings_of(), 'any'):
    pass
  before = (workdir / 'config.json').read_bytes()
  line = refused(capsys, f'--workdir={workdir}', '--config.saq.rho=0.3')
  assert 'another config' in line
  assert 'saq.rho=0.1 there, 0.3 here' in line
  assert (workdir / 'config.json').read_bytes() == before


def test_workdir_of_a_run_under_way_is_refused(capsys, tmp_path):
  with claim(tmp_path / 'run', settings_of(), 'any'):
    assert 'is in use' in refused(capsys, f'--workdir={tmp_path / "run"}')


def test_a_refused_run_leaves_the_mark_of_the_one_under_way(capsys, tmp_path):
  with claim(tmp_path / 'run', settings_of(), 'any'):
    before = (tmp_path / 'run' / 'config.json').read_bytes()
    refused(capsys, f'--workdir={tmp_path / "run"}', '--config.seed=2')
    assert (tmp_path / 'run' / 'config.json').read_bytes() == before


def test_a_mark_half_written_by_a_kill_is_no_foreign_file(tmp_path):
  (tmp_path / '.config.json.1234').write_text('{"saq')
  with claim(tmp_path, settings_of(), 'any') as folder:
    assert (folder / 'config.json').exists()


def test_a_refused_setting_leaves_the_workdir_free(capsys, tmp_path, digits_dir):
  there = [f'--config.data.data_dir={digits_dir}', '--config.data.batch_size=100000']
  refused(capsys, f'--workdir={tmp_path / "new"}', *there)
  assert not (tmp_path / 'new').exists()
  (tmp_path / 'empty').mkdir()
  refused(capsys, f'--workdir={tmp_path / "empty"}', *there)
  assert list((tmp_path / 'empty').iterdir()) == []


@pytest.mark.parametrize('path', CONFIGS, ids=lambda p: p.stem)
def test_every_config_parses_and_names_its_command(path):
  config, name, workdir = program.read_flags([f'--config={path}', '--config.seed=7'])
  assert (config.seed, name, workdir) == (7, path.stem, None)
  assert f'python -m saq_jax.main --config configs/{path.name}' in path.read_text()


def test_without_a_config_the_defaults_run():
  config, name, _ = program.read_flags([])
  assert name == 'digits_4bit'
  assert config == program.read_flags(['--config=configs/digits_4bit.py'])[0]
  assert config.quant.bits == 4


@pytest.mark.parametrize(
  ('flags', 'value'),
  [
    (['--config.quant.bits=None'], ('quant', 'bits', None)),
    (['--config.quant.bits', '3'], ('quant', 'bits', 3)),
    (['--config.compare.rhos=(0.1, 0.2)'], ('compare', 'rhos', (0.1, 0.2))),
    (['--config.augment.flip=true'], ('augment', 'flip', True)),
    (['--config.quant_stage.clip_norm=1'], ('quant_stage', 'clip_norm', 1.0)),
    (['--config.data.data_dir=a=b'], ('data', 'data_dir', 'a=b')),
  ],
)
def test_overrides_take_the_type_of_the_setting(flags, value):
  group, key, expected = value
  found = getattr(getattr(program.read_flags(flags)[0], group), key)
  assert found == expected
  assert type(found) is type(expected)


def test_settings_in_a_config_dict_are_checked_too():
  config = default_config()
  with pytest.raises(AttributeError):
    config.saq.roh = 1.0
  with pytest.raises(TypeError):
    config.saq.rho = 'large'


def assert_docs_snippet_runs(workdir):
  """The trained network in Python, as docs/training.md has it, scores what the report says."""
  text = (CONFIGS[0].parent.parent / 'docs' / 'training.md').read_text(encoding='utf-8')
  code = text.split('## The trained network in Python')[1].split('```python\n')[1].split('```')[0]
  code = code.replace('RUN/saq', f'{workdir}/saq')
  code = code.replace("configs/digits_4bit.py']", f"{CONFIGS[0].parent}/digits_4bit.py', *flags]")
  data = json.loads((workdir / 'config.json').read_text())['config']['data']
  test = load_examples('digits', 'test', data['data_dir'])
  images = (test.images / 255 - np.array(data['mean'])) / np.array(data['std'])
  found = {'flags': TINY, 'images': images.astype(np.float32)}
  exec(code, found)
  report = json.loads((workdir / 'results.json').read_text())['results'][-1]
  assert int(np.sum(np.argmax(found['logits'], -1) == test.labels)) == report['correct']
  assert found['codes'].dtype == np.int8


def test_the_whole_job_at_a_small_size(tmp_path, digits_dir, user_env):
  """As a user runs it: a process, its screen, its files; then again, with nothing left to do."""
  command = [sys.executable, '-m', 'saq_jax.main', f'--workdir={tmp_path / "run"}']
  command += [f'--config.data.data_dir={digits_dir}', *TINY]
  done = subprocess.run(command, capture_output=True, text=True, check=False, env=user_env)
  assert done.returncode == 0, done.stderr
  for words in ('Full precision', 'QAT 4-bit', 'SAQ 4-bit', 'BOPs', 'curves.png', '11/11'):
    assert words in done.stdout
  report = json.loads((tmp_path / 'run' / 'results.json').read_text())
  assert [r['name'] for r in report['results']] == ['float', 'qat', 'saq']
  assert all(r['examples'] == 359 for r in report['results'])
  assert (tmp_path / 'run' / 'curves.png').stat().st_size > 10_000
  assert list((tmp_path / 'run' / 'saq').glob('events.out.tfevents*'))
  again = subprocess.run(command, capture_output=True, text=True, check=False, env=user_env)
  assert again.returncode == 0
  assert '1/11' not in again.stdout  # no step was taken again
  assert json.loads((tmp_path / 'run' / 'results.json').read_text()) == report
  assert_docs_snippet_runs(tmp_path / 'run')
  other = [a.replace('=1', '=2') if 'quant_stage' in a else a for a in command]
  other = [a.replace('/run', '/other') for a in other]
  given = subprocess.run(
    [*other, f'--config.init_from={tmp_path / "run" / "float"}', "--config.methods=('qat',)"],
    capture_output=True,
    text=True,
    check=False,
    env=user_env,
  )
  assert given.returncode == 0, given.stderr
  assert 'Full precision' not in given.stdout
  start = f'weights from {tmp_path / "run" / "float" / "checkpoints" / "11"}'
  assert f'{start}\n' in given.stdout
  # The given network is the row that the others compare with: the float stage's own figures.
  results = json.loads((tmp_path / 'other' / 'results.json').read_text())['results']
  assert [r['name'] for r in results] == ['given', 'qat']
  for figure in ('correct', 'examples', 'loss', 'bops', 'size_bits'):
    assert results[0][figure] == report['results'][0][figure]
  assert 'at full precision, as given:' in given.stdout


def test_scales_are_kept_only_from_a_run_quantized_alike(tmp_path, digits_dir, user_env):
  command = [sys.executable, '-m', 'saq_jax.main', f'--config.data.data_dir={digits_dir}', *TINY]
  first = [*command, f'--workdir={tmp_path / "first"}', '--config.methods=qat']
  subprocess.run(first, check=True, capture_output=True, env=user_env)
  for bits, found_anew in ((4, False), (2, True)):
    other = [*command, f'--workdir={tmp_path / str(bits)}', f'--config.quant.bits={bits}']
    other += [f'--config.init_from={tmp_path / "first"}', '--config.methods=qat']
    other += ['--config.quant_stage.lr=0', '--config.quant_stage.scale_lr=0']
    done = subprocess.run(other, capture_output=True, text=True, check=True, env=user_env)
    assert ('found anew' in done.stdout) is found_anew
    (theirs,), (ours,) = (
      restore_subtrees(w / 'qat', 'params') for w in (tmp_path / 'first', tmp_path / str(bits))
    )
    path = 'layer2_0/conv1/kernel'
    assert bool(ours['scales'][path] == 1.0) is found_anew  # the clip that LIQ begins with
    assert bool(ours['scales'][path] == theirs['scales'][path]) is not found_anew
