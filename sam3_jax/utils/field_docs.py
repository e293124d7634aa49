"""The documentation of a dataclass's fields, from the comments beside them."""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize


def field_docs(cls: type) -> dict[str, str]:
  """Text for each field, in order: the comment lines directly above it and at the end of its line.

  A field without a comment has an empty text.
  """
  source = textwrap.dedent(inspect.getsource(cls))
  lines = source.splitlines()
  comments = {
    token.start[0]: token.string.removeprefix("#").strip()
    for token in tokenize.generate_tokens(io.StringIO(source).readline)
    if token.type == tokenize.COMMENT
  }
  definition = ast.parse(source).body[0]
  assigned = {}
  for node in getattr(definition, "body", []):
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      above = node.lineno - 1
      while above in comments and lines[above - 1].lstrip().startswith("#"):
        above -= 1
      numbers = range(above + 1, node.lineno + 1)
      assigned[node.target.id] = " ".join(comments[n] for n in numbers if n in comments)
  return {field.name: assigned.get(field.name, "") for field in dataclasses.fields(cls)}
