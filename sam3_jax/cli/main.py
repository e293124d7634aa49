"""The command `sam3-jax`: what all commands share, from the first word typed to the exit status.

JAX and everything that needs it is imported inside the commands, so that
help and usage errors come at once.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

import typer

from sam3_jax.cli import (
  batch,
  benchmark,
  cache,
  checkpoints,
  compile,
  evaluate,
  export,
  segment,
  train,
)
from sam3_jax.utils.console import (
  FAILED,
  INTERRUPTED,
  one_line,
  print_error,
  printable,
  replace_unencodable,
  silence,
)
from sam3_jax.utils.signals import RESUME, interruptible

app = typer.Typer(
  help="SAM 3 in JAX: find, box and mask every instance of a concept in an image.",
  add_completion=False,
  rich_markup_mode="markdown",
  pretty_exceptions_enable=False,
  context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
  segment.segment,
  batch.batch,
  checkpoints.convert,
  export.export,
  evaluate.evaluate,
  checkpoints.inspect,
  train.scenes,
  train.train,
  compile.compile,
  benchmark.benchmark,
):
  app.command()(command)

# The base of all errors of usage; typer exports it in some versions only.
_UsageError: Any = typer.BadParameter.__bases__[0]


def entry() -> NoReturn:
  """The program: `main` with the cache of compiled programs, and the process's end."""
  cache.use()
  status = main()
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)  # all is done and said: the status stays what it is
  # XLA, torn down in the middle of its work, would crash; a thread that hangs would be waited for.
  if status in (INTERRUPTED, RESUME):
    with contextlib.suppress(OSError):
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def main(typed: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status: 0, 2 after an error, 75 if running it again
  resumes it, 130 when interrupted.

  Args:
    typed: what stands after `sam3-jax`; None takes it from the process.
  """
  typed = list(sys.argv[1:] if typed is None else typed) or ["--help"]
  debug, status = "--debug" in typed, FAILED
  replace_unencodable()
  with silence(debug), interruptible() as interrupted:
    try:
      status = app(typed, prog_name="sam3-jax", standalone_mode=False) or 0
      if interrupted.is_set():
        raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
      status = INTERRUPTED
    except _UsageError as error:
      command = error.ctx.command_path if error.ctx else "sam3-jax"
      message = error.format_message()
      stop = "" if message.endswith((".", "?", "!")) else "."
      print_error(f"{message}{stop} See `{command} --help`.")
    except BrokenPipeError:  # whoever read the output has left
      _leave_pipe()
    except Exception as error:
      if debug:
        sys.stderr.write(printable(traceback.format_exc(), keep="\n"))
      if interrupted.is_set():  # what XLA makes of it
        status = INTERRUPTED
      else:
        print_error(one_line(error))
    if status == INTERRUPTED:
      print_error("interrupted; files written before are complete.")
  return status


def _leave_pipe() -> None:
  """Keeps Python from writing into a closed pipe, and from saying so, at its end."""
  with contextlib.suppress(OSError, ValueError):
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_version(wanted: bool) -> None:
  if wanted:
    print(f"sam3-jax {version('sam3-jax')}")
    raise typer.Exit


@app.callback()
def _root(
  version: Annotated[
    bool,
    typer.Option(
      "--version",
      is_eager=True,
      callback=_show_version,
      metavar="",
      help="Print the version and exit.",
    ),
  ] = False,
  no_cache: Annotated[
    bool,
    typer.Option(
      "--no-cache",
      metavar="",
      help="Compile anew. Else compiled programs are kept in the folder sam3-jax/programs of the "
      "user's cache, which may be deleted at any time; the environment variable "
      "JAX_COMPILATION_CACHE_DIR names another folder, and JAX_ENABLE_COMPILATION_CACHE=0 does "
      "the same as this.",
    ),
  ] = False,
) -> None:
  if no_cache:
    cache.switch_off()
