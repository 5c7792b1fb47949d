"""Settings every test shares: eight virtual CPU devices and a compilation cache, set before jax."""

import os
import tempfile
from pathlib import Path

import pytest

# Scripts that make records; they need PyTorch.
collect_ignore_glob = ['make_*.py']

_CACHE = Path(os.environ.get('SAQ_TEST_CACHE', Path(tempfile.gettempdir()) / 'saq_jax_test_cache'))

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# Programs are compiled in less than half the time, and run more slowly; where last bits matter,
# optimised.py compiles them as users do, and so do processes that tests start (`user_env`).
# SAQ_TEST_OPTIMISED=1 is for all tests as users compile.
_QUICK = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
  '--xla_cpu_use_fusion_emitters=false'
)
os.environ['XLA_FLAGS'] = ' '.join(
  [
    os.environ.get('XLA_FLAGS', ''),
    '--xla_force_host_platform_device_count=8',
    '' if 'SAQ_TEST_OPTIMISED' in os.environ else _QUICK,
  ]
)
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')


# The files that take longest, the longest first: a worker that begins one of them last keeps the
# others waiting. pytest-xdist by itself begins with the files of the most tests.
_LONGEST = (
  'test_layouts', 'test_authors_steps', 'test_compare', 'test_divergence', 'test_cluster',
  'test_run_on_images', 'test_resume', 'test_configs', 'test_main', 'test_pretrained_run',
  'test_chaos', 'test_flatness', 'test_reference_steps', 'test_profile', 'test_passes',
  'test_study', 'test_watch_stall', 'test_loader', 'test_checkpoint_damage', 'test_mobilenetv2',
  'test_strategies_devices', 'test_two_processes', 'test_checkpoint_processes', 'test_hessian',
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
  """Leaves the order of files to the function below."""
  if hasattr(config.option, 'loadscopereorder'):
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Puts the longest files first and leaves the others as they are."""
  rank = {name: i for i, name in enumerate(_LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


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


@pytest.fixture(scope='session')
def quick_env(user_env: dict[str, str]) -> dict[str, str]:
  """The same, where programs are compiled as quickly as in the tests: for many processes."""
  return {**user_env, 'XLA_FLAGS': _QUICK}
