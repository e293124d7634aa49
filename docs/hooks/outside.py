"""Links from the docs to files of the repository outside docs/: published with the site.

The pages link to such files by relative paths, which work in a clone and on a code host. The site
gets a copy of each linked file under `repository/`, and the links lead there.
"""

import os
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)\s#]+)(#[^)\s]*)?(\))")
FOLDER = "repository"


def find(sources: list[str]) -> list[str]:
  """Paths, relative to the repository, of all outside files that pages of docs/ link to.

  Args:
    sources: paths of the Markdown pages, relative to docs/.
  """
  waiting = [f"docs/{source}" for source in sources]
  found: dict[str, None] = {}
  while waiting:
    page = waiting.pop()
    for _, target, _, _ in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
      path = _resolve(page, target)
      if path is None or path.startswith("docs/") or path in found:
        continue
      found[path] = None
      if path.endswith(".md"):
        waiting.append(path)
  return sorted(found)


def rewrite(markdown: str, page: str) -> str:
  """A page's Markdown with its links to outside files leading to their copies.

  Args:
    markdown: the page.
    page: its path in the site's sources: relative to docs/, or `repository/...` for a copy.
  """
  copied = page.startswith(f"{FOLDER}/")
  here = page.removeprefix(f"{FOLDER}/") if copied else f"docs/{page}"

  def change(match: re.Match) -> str:
    path = _resolve(here, match[2])
    if path is None or (path.startswith("docs/") and not copied):
      return match[0]
    inside = path.startswith("docs/")
    target = path.removeprefix("docs/") if inside else f"{FOLDER}/{path}"
    link = posixpath.relpath(target, posixpath.dirname(page) or ".")
    return f"{match[1]}{link}{match[3] or ''}{match[4]}"

  return LINK.sub(change, markdown)


def _resolve(page: str, target: str) -> str | None:
  """A link's path relative to the repository; None if it names no file of it."""
  if re.match(r"[a-z]+:", target):
    return None
  path = os.path.normpath(os.path.join(os.path.dirname(page), target))
  return path if (ROOT / path).is_file() else None
