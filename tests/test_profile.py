"""The profile of some steps: where it lies, what it leaves alone, and bad flags."""

import gzip
import json
import signal
import subprocess

import pytest
from runs import wait_for_line
from test_resume import command

from saq_jax.training.flags import UsageError, take_profile
from saq_jax.training.metrics import read_metrics
from saq_jax.training.profile import Profile


@pytest.mark.parametrize('text', ['10', '10:', 'a:b', '20:10', '0:5', '-1:4', '1:2:3', ''])
def test_what_is_no_pair_of_steps_is_one_line(text):
  with pytest.raises(UsageError, match=r'^--profile=.*: .*as in 10:20\.$'):
    take_profile([f'--profile={text}'])


def test_the_flag_is_taken_out_of_the_arguments():
  arguments = ['--config=a.py', '--profile', '3:4', '--workdir=b']
  profile = take_profile(arguments)
  assert arguments == ['--config=a.py', '--workdir=b']
  assert [step for step in range(1, 8) if profile.wants(step)] == [3, 4]
  assert take_profile(arguments) is None
  with pytest.raises(UsageError, match='needs a value'):
    take_profile(['--profile'])


def test_it_records_once_and_what_fails_is_told(tmp_path, monkeypatch, capsys):
  def fail(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr('jax.profiler.start_trace', lambda folder: None)
  monkeypatch.setattr('jax.profiler.stop_trace', fail)
  profile = Profile(3, 9)
  profile.end()  # nothing was begun
  assert capsys.readouterr().out == ''
  profile.begin(3, tmp_path)
  assert [profile.note(step) for step in (3, 4)] == [False, False]
  profile.end()  # the stage is over before step 9
  assert f'no profile in {tmp_path}/profile: No space left on device' in capsys.readouterr().out
  assert not profile.wants(5)


@pytest.mark.parametrize('fails', [False, True])
def test_the_processes_that_do_not_record_are_answered_alike(tmp_path, monkeypatch, fails):
  """So that all of them wait at the same steps, or none of them."""

  def start_trace(folder):
    calls.append(folder)
    if fails:
      raise OSError(28, 'No space left on device')

  def answers(index):
    monkeypatch.setattr('jax.process_index', lambda: index)
    profile, said = Profile(3, 4), []
    for step in range(1, 7):
      said.append(not profile.recording and profile.wants(step))
      if said[-1]:
        profile.begin(step, tmp_path)
      said.append(profile.note(step))
      if said[-1]:
        profile.end()
    return said

  calls = []
  monkeypatch.setattr('jax.profiler.start_trace', start_trace)
  monkeypatch.setattr('jax.profiler.stop_trace', lambda: None)
  assert answers(0) == answers(1)
  assert len(calls) == 1


def names_in(trace):
  with gzip.open(trace) as file:
    return [event.get('args', {}).get('step_num') for event in json.load(file)['traceEvents']]


def test_a_run_that_is_killed_and_resumed_has_its_profile_and_is_the_same_run(
  tmp_path, digits_dir, user_env
):
  def words(*more):
    short = '--config.methods=saq', '--config.quant_stage.epochs=1'
    return [*command(tmp_path / 'run', digits_dir), *short, *more]

  killed = subprocess.Popen(words('--profile=15:18'), stdout=subprocess.PIPE, env=user_env)
  wait_for_line(killed, tmp_path / 'run' / 'float' / 'metrics.jsonl', 9)
  killed.send_signal(signal.SIGKILL)
  killed.communicate()
  done = subprocess.run(
    words('--profile=15:18'), check=True, capture_output=True, text=True, env=user_env
  )
  folder = tmp_path / 'run' / 'float' / 'profile'
  assert f'profile of steps 15 to 18 in {folder}: tensorboard --logdir {folder}' in done.stdout
  (trace,) = folder.rglob('*.trace.json.gz')
  assert {str(step) for step in (15, 16, 17, 18)} == set(names_in(trace)) - {None}
  assert not (tmp_path / 'run' / 'saq' / 'profile').exists()
  steps = [line['step'] for line in read_metrics(tmp_path / 'run' / 'float') if 'loss' in line]
  assert steps == list(range(1, 23))
  # Without the flag it is the same experiment, which is done.
  subprocess.run(words(), check=True, capture_output=True, env=user_env)


def test_a_bad_profile_is_one_line_and_code_2(tmp_path, digits_dir, user_env):
  run = subprocess.run(
    [*command(tmp_path / 'run', digits_dir), '--profile=7'],
    check=False,
    capture_output=True,
    text=True,
    env=user_env,
  )
  assert run.returncode == 2
  assert run.stderr.startswith('saq_jax: --profile=7: name the first and the last step')
  assert not (tmp_path / 'run').exists()
