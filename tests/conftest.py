"""Settings every test shares: eight virtual CPU devices and a compilation cache, set before jax."""

import os
import tempfile
from pathlib import Path

_CACHE = Path(os.environ.get('SAQ_TEST_CACHE', Path(tempfile.gettempdir()) / 'saq_jax_test_cache'))

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ['XLA_FLAGS'] = (
  os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8'
)
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(_CACHE))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES', '-1')
