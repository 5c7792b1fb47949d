"""Several processes as one run: how they find each other, and what they agree on."""

import dataclasses
import glob
import importlib.util
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from saq_jax.training.flags import UsageError, take_flag

# Seconds after which the others know of a process that is gone without a word.
_HEARTBEAT = 30


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

  It is, where `--coordinator`, `--processes` and `--process` say so, and where SLURM, Open MPI or a
  Cloud TPU's environment tell of more than one; a laptop and a single host are not.

  Args:
    arguments: of the command line; those flags are taken out of it.
    environ: the environment; that of the process by default.

  Returns:
    The cluster, or None for a run of one process.

  Raises:
    UsageError: if the three flags are not all there, or impossible.

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
  for name in ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'):
    if env.get(name, '1').isdigit() and int(env.get(name, '1')) > 1:
      return Cluster()
  if ',' in env.get('TPU_WORKER_HOSTNAMES', '') or env.get('MEGASCALE_COORDINATOR_ADDRESS'):
    return Cluster()
  # On a Cloud TPU VM JAX asks the machine's metadata, which know of one host too.
  devices = glob.glob('/dev/accel*') + glob.glob('/dev/vfio/[0-9]*')
  on_tpu = bool(devices) and importlib.util.find_spec('libtpu') is not None
  return Cluster() if on_tpu and 'cpu' not in env.get('JAX_PLATFORMS', '') else None


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

  Args:
    cluster: of `find_cluster`.

  Raises:
    UsageError: if the others cannot be reached.
  """
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
