"""The index and number of the processes of a job, from the launcher or from `jax.distributed`.

Processes do not communicate after they have started: each works on its own devices and its own
parts. If JAX must know all processes, as on a TPU slice, `jax.distributed` is initialized and shut
down again. After that, a lost process costs only its own parts, which a rerun does later, and the
others continue.
"""

import os
import threading
from typing import NamedTuple

from sam3_jax.utils.console import FAILED, print_error

# Environment variables with the number and the index: Slurm's srun, Open MPI's mpirun.
_VARIABLES = (
  ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
  ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)
MARGIN = 600  # seconds added to JAX's own timeout, so that ours ends first
MISSED = "the processes did not find each other"
_TPU_HOSTS = "TPU_WORKER_HOSTNAMES"  # of a TPU slice, separated by commas


class ProcessIndex(NamedTuple):
  """The index of this process, from 0, and the number of processes."""

  process: int
  processes: int


def initialize(
  *,
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  distributed: bool | None = None,
  timeout: int = 300,
) -> ProcessIndex:
  """Determines the index of this process, before anything is computed.

  Args:
    coordinator: HOST:PORT of process 0, for `jax.distributed`; needs `processes` and `process`.
      Without it those two make an independent process, of which JAX knows nothing.
    distributed: initialize `jax.distributed` from the environment (TPU VM, Slurm, Open MPI,
      Kubernetes). None initializes it on a TPU slice that the environment describes; elsewhere
      the index and number come from Slurm or Open MPI, and the processes are independent. False
      makes this the only process.
    timeout: seconds to wait for the other processes.

  Raises:
    ValueError: the numbers are inconsistent, or JAX cannot start. If the other processes do not
      start in time, the process ends with one line and exit status 2.
  """
  if (processes is None) != (process is None):
    raise ValueError(
      "--processes and --process go together: the number, and the index of this one."
    )
  if coordinator is not None and processes is None:
    raise ValueError("--coordinator needs --processes N and --process I.")
  if processes is not None and process is not None:
    if not 0 <= process < processes:
      raise ValueError(f"--process must be from 0 to {processes - 1}; got {process}.")
    if coordinator is None:
      return ProcessIndex(process, processes)
  elif distributed is None and len(os.environ.get(_TPU_HOSTS, "").split(",")) == 1:
    return from_environment()
  elif distributed is False:
    return ProcessIndex(0, 1)
  return _from_jax(coordinator, processes, process, timeout)


def from_environment() -> ProcessIndex:
  """The index from the variables of Slurm or Open MPI; process 0 of 1 without them."""
  for names in _VARIABLES:
    count, process = (os.environ.get(name, "") for name in names)
    if count.isdigit() and process.isdigit():
      return ProcessIndex(int(process), int(count))
  return ProcessIndex(0, 1)


def _from_jax(
  coordinator: str | None, processes: int | None, process: int | None, timeout: int
) -> ProcessIndex:
  import jax

  # If a process is missing, JAX aborts with a page of C++ messages; end before it does.
  guard = threading.Timer(timeout, _give_up, [timeout])
  guard.daemon = True
  guard.start()
  try:
    jax.distributed.initialize(
      coordinator, processes, process, initialization_timeout=timeout + MARGIN
    )
    jax.devices()  # starts the backends while all processes are connected
    index = ProcessIndex(jax.process_index(), jax.process_count())
    jax.distributed.shutdown()
  except (RuntimeError, ValueError) as error:
    raise ValueError(f"{MISSED} ({str(error).strip().partition(chr(10))[0]:.200}).") from error
  finally:
    guard.cancel()
  return index


def _give_up(timeout: int) -> None:
  print_error(f"{MISSED} within {timeout} seconds; start all of them, or set a longer timeout.")
  os._exit(FAILED)
