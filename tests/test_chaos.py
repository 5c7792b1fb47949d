"""The chaos of benchmarks/chaos.py in its short form: four kills, one of them on a full disk."""

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / 'benchmarks' / 'chaos.py'


def test_four_kills_lose_nothing(digits_dir, user_env):
  # The prepared digits are found where tfds looks for them.
  env = user_env | {'TFDS_DATA_DIR': digits_dir}
  done = subprocess.run(
    [sys.executable, str(SCRIPT), '--short', '--seed=1'],
    check=False,
    capture_output=True,
    text=True,
    env=env,
    timeout=300,
  )
  assert done.returncode == 0, done.stdout + done.stderr
  rows = dict(re.findall(r'^\| \d+ \| ([a-z ,]+) \| .* \| (-?\d+) \|', done.stdout, re.M))
  assert rows.pop('full disk, stop') in ('0', '1')
  assert rows == {'kill': '-9', 'kill in a save': '-9', 'stop': '0'}
  assert done.stdout.endswith('bit for bit the unbroken run\n')
