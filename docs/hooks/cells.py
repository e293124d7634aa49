"""Cells of Markdown tables."""

import html
import re


def cell(text: str) -> str:
  """A cell's Markdown on one line; bars within it do not end the cell, in code spans either."""
  text = " ".join(text.split())
  text = re.sub(r"`([^`]*\|[^`]*)`", lambda match: f"<code>{html.escape(match[1])}</code>", text)
  return text.replace("|", "&#124;")
