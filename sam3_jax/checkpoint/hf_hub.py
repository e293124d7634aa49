"""Repositories of the Hugging Face hub, through its own client: cache, resuming, tokens, offline.

Only what a conversion reads is downloaded. What the client raises over several lines becomes one
that says what to do.
"""

import re
from pathlib import Path

SCHEME = "hf://"
WEIGHTS = ["*.safetensors", "*.h5"]
OTHER_WEIGHTS = ["*.pt", "*.bin"]  # only of a repository without `WEIGHTS`: facebook/sam3 has both
BESIDE = ["*.json", "*merges.txt", "*.txt.gz"]
ASK = 10.0  # seconds to wait for the hub to say which commit a name stands for
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})$")  # where the client keeps a commit's files
_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


def check_name(name: str) -> tuple[str, str | None]:
  """Repository and revision of `org/name` or `org/name@revision`, with or without `hf://`."""
  name = name.removeprefix(SCHEME)
  if not _NAME.fullmatch(name) or ".." in name:
    raise ValueError(
      f"{SCHEME}{name} names no repository; expected {SCHEME}org/name, with @revision (a branch, a "
      "tag or a commit) for another than main."
    )
  repository, _, revision = name.partition("@")
  return repository, revision or None


def resolve(repository: str, revision: str | None) -> tuple[str | None, str]:
  """Which commit a revision stands for now.

  Returns:
    The commit; or None, and why the hub did not say. A commit stands for itself, without asking.
  """
  if revision and _COMMIT.fullmatch(revision):
    return revision, ""
  try:
    from huggingface_hub import HfApi  # pyright: ignore[reportMissingImports]
  except ImportError:
    return None, "the package huggingface_hub is missing"
  try:
    commit = HfApi().model_info(repository, revision=revision, timeout=ASK).sha
  except Exception as error:  # of the client, of its library for HTTP, or of the system
    reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return None, f"{reason:.150}".rstrip(".")
  return (commit, "") if commit and _COMMIT.fullmatch(commit) else (None, "it names no commit")


def commit_of(folder: Path) -> str | None:
  """The commit that a folder of the client's cache holds; None of another folder."""
  found = _SNAPSHOT.search(folder.absolute().as_posix())
  return found[1] if found else None


def download(name: str) -> Path:
  """The folder of a repository's weights, configuration and vocabulary; resumes what was begun.

  Args:
    name: `hf://org/name`, or `hf://org/name@revision`.

  Raises:
    ImportError: the package huggingface_hub is missing.
    FileNotFoundError: the repository or its revision does not exist, or it cannot be reached and is
      not, or not wholly, in the cache.
    PermissionError: its licence has not been accepted, or the token is missing or wrong.
    ValueError: this is no name of a repository.
  """
  repository, revision = check_name(name)
  folder = _snapshot(repository, revision, WEIGHTS + BESIDE)
  if any(next(folder.glob(pattern), None) for pattern in WEIGHTS):
    return folder
  return _snapshot(repository, revision, OTHER_WEIGHTS + BESIDE)


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
  try:
    from huggingface_hub import errors, snapshot_download  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise ImportError(
      f"{SCHEME}{repository} needs the package huggingface_hub: pip install 'sam3-jax[hub]'."
    ) from error
  page = f"https://huggingface.co/{repository}"
  try:
    return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
  except errors.GatedRepoError as error:
    raise PermissionError(
      f"{repository} is gated: accept its licence at {page}, then say who you are with `hf auth "
      "login`, or put a token into the environment variable HF_TOKEN."
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise FileNotFoundError(
      f"there is no {repository} on the hub, or it is private: look at {page}; a private one needs "
      "a token, with `hf auth login` or in the environment variable HF_TOKEN."
    ) from error
  except errors.RevisionNotFoundError as error:
    raise FileNotFoundError(f"{repository} has no revision {revision}; look at {page}.") from error
  except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as error:
    status = _status(error) or _status(error.__cause__)
    if status in (401, 403):
      raise PermissionError(
        f"the hub refuses {repository} (status {status}): the token in HF_TOKEN or of `hf auth "
        f"login` is wrong or may not read it; look at {page}."
      ) from error
    if status:
      raise FileNotFoundError(
        f"the hub fails for {repository} (status {status}); try again later, what was downloaded "
        "already is kept."
      ) from error
    raise FileNotFoundError(
      f"{repository} cannot be reached and is not, or not wholly, in the hub's cache: connect, and "
      "unset HF_HUB_OFFLINE; what was downloaded already is kept."
    ) from error
  except Exception as error:
    if not _of_the_connection(error):
      raise
    raise FileNotFoundError(
      f"downloading {repository} broke off ({str(error).partition(chr(10))[0]:.150}); try again, "
      "files that came whole are kept."
    ) from error


def _of_the_connection(error: Exception) -> bool:
  """While files come: an error of the client's library for HTTP, which differs by its version."""
  libraries = {base.__module__.partition(".")[0] for base in type(error).__mro__}
  return isinstance(error, OSError) or not libraries.isdisjoint(("httpx", "httpx2", "requests"))


def _status(error: BaseException | None) -> int | None:
  """Of the hub's answer, if there was one."""
  return getattr(getattr(error, "response", None), "status_code", None)
