"""Prints the lowest versions that pyproject.toml allows, as constraints for pip."""

import re
import tomllib
from pathlib import Path

EXTRAS = ("plots", "hub", "gcs", "s3", "export", "video", "serve", "geo")
project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
requirements = project["dependencies"]
for extra in EXTRAS:
  requirements += project["optional-dependencies"][extra]
for requirement in requirements:
  name, version = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", requirement).groups()
  print(f"{name}=={version}")
