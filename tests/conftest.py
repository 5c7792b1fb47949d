"""Settings every test shares: eight virtual CPU devices and a compilation cache, set before jax."""

import os
import tempfile
from pathlib import Path

import pytest

# Scripts that make records; they need PyTorch.
collect_ignore_glob = ['make_*.py']

_CACHE = Path(os.environ.get('SAQ_TEST_CACHE', Path(tempfile.gettempdir()) / 'saq_jax_test_cache'))

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')


@pytest.fixture(scope='session')
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
  """A tfds data dir in which the digits are prepared."""
  from saq_jax.data.digits import prepare_digits

  data_dir = str(tmp_path_factory.mktemp('tfds'))
  prepare_digits(data_dir)
  return data_dir


@pytest.fixture(scope='session')
def user_env() -> dict[str, str]:
  """The environment of a user with one device, for processes that tests start."""
  return {name: value for name, value in os.environ.items() if name != 'XLA_FLAGS'}
