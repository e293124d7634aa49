"""MkDocs hook: generated reference pages, and files of the repository that the pages link to."""

import commands
import fields
import outside
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files


def changelog() -> str:
  """CHANGELOG.md, with its links as on a page of docs/."""
  text = (outside.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
  return text.replace("](docs/", "](")


GENERATED = {
  "<!-- fields -->": fields.pages,
  "<!-- commands -->": commands.pages,
  "<!-- changelog -->": changelog,
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the outside files that pages link to, as `repository/PATH`."""
  pages = [file.src_uri for file in files.documentation_pages()]
  for path in outside.find(pages):
    content = (outside.ROOT / path).read_bytes()
    files.append(File.generated(config, f"{outside.FOLDER}/{path}", content=content))
  return files


def on_page_markdown(markdown: str, page, config: MkDocsConfig, files: Files) -> str:
  """Fills in the generated parts and leads links to outside files to their copies."""
  for marker, make in GENERATED.items():
    if marker in markdown:
      markdown = markdown.replace(marker, make())
  return outside.rewrite(markdown, page.file.src_uri)
