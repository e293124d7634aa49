"""Downloads repositories of the Hugging Face hub with its own client.

The client caches, resumes, and handles tokens and offline use. Only files that a conversion reads
are downloaded. Errors become one line that says what to do.
"""

import re
from pathlib import Path

SCHEME = "hf://"
WEIGHTS = ["*.safetensors", "*.h5"]
OTHER_WEIGHTS = ["*.pt", "*.bin"]  # if there are no `WEIGHTS`; facebook/sam3 has both
BESIDE = ["*.json", "*merges.txt", "*.txt.gz"]
TIMEOUT = 10.0  # seconds to wait for the hub to resolve a revision
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})$")  # the client's directory of a commit
_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", re.ASCII)


def check_name(name: str) -> tuple[str, str | None]:
  """Splits `org/name` or `org/name@revision`, with or without `hf://`, into its two parts."""
  name = name.removeprefix(SCHEME)
  if not _NAME.fullmatch(name) or ".." in name:
    raise ValueError(
      f"{SCHEME}{name} does not name a repository; expected {SCHEME}org/name, with @revision (a "
      "branch, a tag or a commit) for another revision than main."
    )
  repository, _, revision = name.partition("@")
  return repository, revision or None


def resolve(repository: str, revision: str | None) -> tuple[str | None, str]:
  """Asks the hub for the current commit of a revision.

  Returns:
    The commit; or None, and why the hub did not say. Returns a commit as it is, without asking.
  """
  if revision and _COMMIT.fullmatch(revision):
    return revision, ""
  try:
    from huggingface_hub import HfApi  # pyright: ignore[reportMissingImports]
  except ImportError:
    return None, "the package huggingface_hub is missing"
  try:
    commit = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT).sha
  except Exception as error:  # from the client, its HTTP library, or the system
    reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return None, f"{reason:.150}".rstrip(".")
  return (commit, "") if commit and _COMMIT.fullmatch(commit) else (None, "it names no commit")


def commit_of(folder: Path) -> str | None:
  """The commit of a directory of the client's cache; None for other directories."""
  found = _SNAPSHOT.search(folder.absolute().as_posix())
  return found[1] if found else None


def download(name: str) -> Path:
  """Downloads a repository's weights, configuration and vocabulary; returns their directory.

  Resumes an earlier download.

  Args:
    name: `hf://org/name`, or `hf://org/name@revision`.

  Raises:
    ImportError: the package huggingface_hub is missing.
    FileNotFoundError: the repository or its revision does not exist, or the hub cannot be reached
      and the cache is incomplete.
    PermissionError: its licence has not been accepted, or the token is missing or wrong.
    ValueError: the name is invalid.
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
      f"{repository} is gated: accept its licence at {page}, then log in with `hf auth login`, or "
      "set the environment variable HF_TOKEN to a token."
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise FileNotFoundError(
      f"there is no {repository} on the hub, or it is private: see {page}; a private repository "
      "needs a token, from `hf auth login` or in the environment variable HF_TOKEN."
    ) from error
  except errors.RevisionNotFoundError as error:
    raise FileNotFoundError(f"{repository} has no revision {revision}; see {page}.") from error
  except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as error:
    status = _status(error) or _status(error.__cause__)
    if status in (401, 403):
      raise PermissionError(
        f"the hub refuses {repository} (status {status}): the token in HF_TOKEN or of `hf auth "
        f"login` is wrong or has no permission; see {page}."
      ) from error
    if status:
      raise FileNotFoundError(
        f"the hub failed for {repository} (status {status}); try again later, the download resumes."
      ) from error
    raise FileNotFoundError(
      f"{repository} cannot be reached, and the hub's cache is incomplete: connect, and unset "
      "HF_HUB_OFFLINE; the download resumes."
    ) from error
  except Exception as error:
    if not _is_connection_error(error):
      raise
    raise FileNotFoundError(
      f"downloading {repository} failed ({str(error).partition(chr(10))[0]:.150}); try again, "
      "complete files are kept."
    ) from error


def _is_connection_error(error: Exception) -> bool:
  """Whether an error is from the client's HTTP library, which depends on its version."""
  libraries = {base.__module__.partition(".")[0] for base in type(error).__mro__}
  return isinstance(error, OSError) or not libraries.isdisjoint(("httpx", "httpx2", "requests"))


def _status(error: BaseException | None) -> int | None:
  """The status of the hub's response, if there was one."""
  return getattr(getattr(error, "response", None), "status_code", None)
