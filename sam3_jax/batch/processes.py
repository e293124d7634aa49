"""Which of how many processes this one is, from what started them.

Processes do not talk to each other once they have begun: each works on its own devices and on its
own parts. So where JAX has to know of all of them, as on a slice of TPUs, it is told, and lets go
again: afterwards a lost process costs its own parts, which the same command does later, and the
others go on.
"""

import os
import threading
from typing import NamedTuple

from sam3_jax.utils.console import FAILED, print_error

# How many processes an environment speaks of, and which this is: Slurm's srun, Open MPI's mpirun.
_NUMBERS = (
  ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
  ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
)
LATER = 600  # seconds by which JAX's own patience is longer
MISSED = "the processes did not find each other"
_HOSTS = "TPU_WORKER_HOSTNAMES"  # of a slice of TPUs, with commas between them


class Place(NamedTuple):
  """This process's number, from 0, and how many there are."""

  process: int
  processes: int


def join(
  *,
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
  distributed: bool | None = None,
  timeout: int = 300,
) -> Place:
  """Finds this process's place, before anything is computed.

  Args:
    coordinator: HOST:PORT of process 0, for `jax.distributed`; then `processes` and `process` are
      needed too. Without it those two make an independent worker, of which JAX knows nothing.
    distributed: start `jax.distributed` from the environment (TPU VM, Slurm, Open MPI,
      Kubernetes). None does on a slice of TPUs that the environment speaks of; elsewhere it takes
      Slurm's or Open MPI's numbers, and the processes are independent. False: this one is alone.
    timeout: seconds to wait for the others.

  Raises:
    ValueError: numbers that do not fit, or JAX cannot start. If the others do not come in time, the
      process ends with one line and exit status 2.
  """
  if (processes is None) != (process is None):
    raise ValueError("--processes and --process go together: how many, and which one this is.")
  if coordinator is not None and processes is None:
    raise ValueError("--coordinator needs --processes N and --process I.")
  if processes is not None and process is not None:
    if not 0 <= process < processes:
      raise ValueError(f"--process {process} is none of {processes}; they count from 0.")
    if coordinator is None:
      return Place(process, processes)
  elif distributed is None and len(os.environ.get(_HOSTS, "").split(",")) == 1:
    return told()
  elif distributed is False:
    return Place(0, 1)
  return _introduce(coordinator, processes, process, timeout)


def told() -> Place:
  """What Slurm's or Open MPI's variables say; process 0 of 1 without any."""
  for names in _NUMBERS:
    count, process = (os.environ.get(name, "") for name in names)
    if count.isdigit() and process.isdigit():
      return Place(int(process), int(count))
  return Place(0, 1)


def _introduce(
  coordinator: str | None, processes: int | None, process: int | None, timeout: int
) -> Place:
  import jax

  # Where others do not come in time, JAX aborts the process with a page of C++: be faster.
  guard = threading.Timer(timeout, _give_up, [timeout])
  guard.daemon = True
  guard.start()
  try:
    jax.distributed.initialize(
      coordinator, processes, process, initialization_timeout=timeout + LATER
    )
    jax.devices()  # the backends start now, while all processes are there
    place = Place(jax.process_index(), jax.process_count())
    jax.distributed.shutdown()
  except (RuntimeError, ValueError) as error:
    raise ValueError(f"{MISSED} ({str(error).strip().partition(chr(10))[0]:.200}).") from error
  finally:
    guard.cancel()
  return place


def _give_up(timeout: int) -> None:
  print_error(f"{MISSED} within {timeout} seconds; start all of them, or give a longer timeout.")
  os._exit(FAILED)
