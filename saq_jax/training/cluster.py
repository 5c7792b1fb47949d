"""Several processes as one run: how they find each other, and what they agree on."""

import dataclasses
import glob
import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from saq_jax.training.flags import UsageError, take_flag

# Seconds after which the others know of a process that is gone without a word.
_HEARTBEAT = 30
# How the runtime tells of a process that does not answer, by whatever way they are connected.
_PEER = re.compile(
  'UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|(?i:gloo|heartbeat|remote process|broken pipe'
  '|reset by peer|(connection|socket) (closed|reset|refused))'
)
# Without all of these JAX does not find the others.
_SLURM = 'SLURM_JOB_ID', 'SLURM_STEP_NODELIST', 'SLURM_PROCID', 'SLURM_LOCALID'
_OPEN_MPI = 'OMPI_MCA_orte_hnp_uri'


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The processes of a run.

  Attributes:
    coordinator: HOST:PORT of process 0; None where JAX finds it out from the cluster.
    processes: their number; None likewise.
    process: which one this is, from 0; None likewise.
  """

  coordinator: str | None = None
  processes: int | None = None
  process: int | None = None


def find_cluster(arguments: list[str], environ: Mapping[str, str] | None = None) -> Cluster | None:
  """Tells whether this process is one of several.

  It is, where `--coordinator`, `--processes` and `--process` say so, and where a step of SLURM,
  Open MPI 4 or a Cloud TPU's environment tell of more than one; a laptop, a single host and a shell
  within a job of SLURM are not.

  Args:
    arguments: of the command line; those flags are taken out of it.
    environ: the environment; that of the process by default.

  Returns:
    The cluster, or None for a run of one process.

  Raises:
    UsageError: if the three flags are not all there, or impossible, or Open MPI tells of others but
      not where they are.

  Example:
    >>> find_cluster(['--coordinator=a:1', '--processes=2', '--process=1'], {})
    Cluster(coordinator='a:1', processes=2, process=1)
    >>> find_cluster([], {'SLURM_NTASKS': '1'}) is None
    True
  """
  env = os.environ if environ is None else environ
  given = {
    name: take_flag(arguments, f'--{name}') for name in ('coordinator', 'processes', 'process')
  }
  if any(value is not None for value in given.values()):
    return _explicit(given)
  if _several(env.get('OMPI_COMM_WORLD_SIZE')):
    if _OPEN_MPI not in env:
      raise UsageError(
        f'Open MPI 5 and later do not tell where process 0 is ({_OPEN_MPI} is not set): give '
        '--coordinator, --processes and --process.'
      )
    return Cluster()
  if _several(env.get('SLURM_NTASKS')) and all(name in env for name in _SLURM):
    return Cluster()
  if ',' in env.get('TPU_WORKER_HOSTNAMES', '') or env.get('MEGASCALE_COORDINATOR_ADDRESS'):
    return Cluster()
  # On a Cloud TPU VM JAX asks the machine's metadata, which know of one host too.
  devices = glob.glob('/dev/accel*') + glob.glob('/dev/vfio/[0-9]*')
  on_tpu = bool(devices) and importlib.util.find_spec('libtpu') is not None
  return Cluster() if on_tpu and 'cpu' not in env.get('JAX_PLATFORMS', '') else None


def _several(count: str | None) -> bool:
  """Whether a variable names a number above 1."""
  return count is not None and count.isdigit() and int(count) > 1


def _explicit(given: dict[str, str | None]) -> Cluster:
  """The cluster that the flags describe."""
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if missing:
    raise UsageError(f'{missing[0]} is missing: give --coordinator, --processes and --process.')
  processes, process = str(given['processes']), str(given['process'])
  if not (processes.isdigit() and process.isdigit() and int(process) < int(processes)):
    raise UsageError(
      f'--processes={processes} --process={process}: must be whole numbers, the second below the '
      'first.'
    )
  host, colon, port = str(given['coordinator']).rpartition(':')
  if not (host and colon and port.isdigit()):
    raise UsageError(f'--coordinator={given["coordinator"]}: must be HOST:PORT.')
  return Cluster(given['coordinator'], int(processes), int(process))


def join(cluster: Cluster) -> None:
  """Starts `jax.distributed`; before anything asks for a device.

  Its preemption service is left out: nothing here asks it, and it would take each SIGTERM that
  comes before `preemption` listens.

  Args:
    cluster: of `find_cluster`.

  Raises:
    UsageError: if the others cannot be reached.
  """
  jax.config.update('jax_enable_preemption_service', False)
  try:
    jax.distributed.initialize(
      cluster.coordinator,
      cluster.processes,
      cluster.process,
      heartbeat_timeout_seconds=_HEARTBEAT,
    )
  except (RuntimeError, ValueError) as error:
    raise UsageError(
      f'the processes did not find each other: {str(error).splitlines()[0]}'
    ) from error


def all_agree(sound: bool) -> bool:
  """Whether every process says yes; each calls it at the same place.

  Args:
    sound: what this one says.

  Returns:
    True if all say true.
  """
  if jax.process_count() == 1:
    return sound
  return bool(multihost_utils.process_allgather(np.array(sound)).all())


def differing(values: Mapping[str, str]) -> list[str]:
  """Which values are not the same in every process; each calls it at the same place.

  Args:
    values: texts by their names, the same names everywhere.

  Returns:
    The names of those that differ.
  """
  if jax.process_count() == 1:
    return []
  sums = [hashlib.sha256(text.encode()).digest() for text in values.values()]
  gathered = multihost_utils.process_allgather(np.array([list(each) for each in sums], np.uint8))
  return [name for i, name in enumerate(values) if (gathered[:, i] != gathered[0, i]).any()]


def from_first(text: str) -> str:
  """What process 0 says; each calls it at the same place.

  Args:
    text: what it says; those of the others count for nothing.

  Returns:
    The text of process 0.
  """
  if jax.process_count() == 1:
    return text
  said = text.encode() if jax.process_index() == 0 else b''
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(said))))
  padded = np.frombuffer(said.ljust(size, b' '), np.uint8)
  return multihost_utils.broadcast_one_to_all(padded).tobytes().decode()


def tells_of_a_peer(error: BaseException) -> bool:
  """Whether an error of the runtime says that another process does not answer.

  Args:
    error: such as a `jax.errors.JaxRuntimeError`.

  Returns:
    True if so; False for one of this process's own, such as a lack of memory.

  Example:
    >>> tells_of_a_peer(RuntimeError('UNKNOWN: Gloo all-reduce failed: Connection closed by peer'))
    True
    >>> tells_of_a_peer(RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.'))
    False
  """
  words = str(error)
  return 'RESOURCE_EXHAUSTED' not in words and bool(_PEER.search(words))
