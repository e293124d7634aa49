"""The command `sam3-jax`: registers the subcommands, and turns errors into one line and a status.

JAX and everything that imports it is imported inside the commands, so that help and usage errors
appear at once.
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
  compile,
  concept,
  convert,
  evaluate,
  export,
  inspect,
  scenes,
  segment,
  serve,
  track,
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
  help="SAM 3 in JAX: find, box and mask every instance of a concept in an image; track objects "
  "through videos.",
  add_completion=False,
  rich_markup_mode="markdown",
  pretty_exceptions_enable=False,
  context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
  segment.segment,
  track.track,
  serve.serve,
  batch.batch,
  concept.concept,
  convert.convert,
  export.export,
  evaluate.evaluate,
  inspect.inspect,
  scenes.scenes,
  train.train,
  compile.compile,
  benchmark.benchmark,
):
  app.command()(command)

# The base class of all usage errors, which only some versions of typer export.
_UsageError: Any = typer.BadParameter.__bases__[0]


def entry() -> NoReturn:
  """The entry point: runs `main` with the compilation cache, and ends the process."""
  cache.use()
  status = main()
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)  # nothing remains to be done: keep the status
  # XLA would crash when torn down while it works, and a hanging thread would block the exit.
  if status in (INTERRUPTED, RESUME):
    with contextlib.suppress(OSError):
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def main(typed: Sequence[str] | None = None) -> int:
  """Runs a command and returns its exit status: 0; 2 after an error; 75 if rerunning the command
  resumes it; 130 after an interruption.

  Args:
    typed: the arguments after `sam3-jax`; None for those of the process.
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
      message = error.format_message().replace("Value error, ", "")  # typer adds it with pydantic
      stop = "" if message.endswith((".", "?", "!")) else "."
      print_error(f"{message}{stop} See `{command} --help`.")
    except BrokenPipeError:  # the reader of the output has exited
      _leave_pipe()
    except Exception as error:
      if debug:
        sys.stderr.write(printable(traceback.format_exc(), keep="\n"))
      if interrupted.is_set():  # XLA turns KeyboardInterrupt into other exceptions
        status = INTERRUPTED
      else:
        print_error(one_line(error))
    if status == INTERRUPTED:
      print_error("interrupted; files written before are complete.")
  return status


def _leave_pipe() -> None:
  """Keeps Python from writing to the closed pipe at exit, which would print an error."""
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
      help="Disable the compilation cache (default: `~/.cache/sam3-jax/programs`, which may be "
      "deleted at any time). The environment variable JAX_COMPILATION_CACHE_DIR selects another "
      "directory; JAX_ENABLE_COMPILATION_CACHE=0 has the same effect as this option.",
    ),
  ] = False,
) -> None:
  if no_cache:
    cache.switch_off()
