"""Names of exported files, one for each image or video of a job."""

from pathlib import PurePosixPath

from sam3_jax.batch.record_files.listing import is_row_name


class ExportNames:
  """Names of files in a format with one file per image: the name of the image with another suffix.

  Images that would have the same file get different files; so do files and directories.
  """

  def __init__(self, suffix: str):
    self._suffix, self._taken = suffix, set[PurePosixPath]()

  def of(
    self, image: PurePosixPath, *, has_suffix: bool | None = None
  ) -> tuple[PurePosixPath, PurePosixPath]:
    """The file name for an image, and the usual name without conflicts.

    Args:
      image: its name, relative.
      has_suffix: whether the name has a suffix of its own; by default, all names but FILE#ROW do.
    """
    if has_suffix is None:
      has_suffix = not is_row_name(image.name)
    stem = image.stem if has_suffix else image.name
    usual = image.with_name(stem + self._suffix)
    parents = [part + "_" if part.endswith(self._suffix) else part for part in usual.parent.parts]
    folder, number = PurePosixPath(*parents), 1
    name = folder / usual.name
    while name in self._taken:
      counter = f"-{number}" if number > 1 else ""
      name, number = folder / f"{image.name}{counter}{self._suffix}", number + 1
    self._taken.add(name)
    return name, usual


def relative_parts(image: PurePosixPath) -> list[str]:
  """The components of an image name, relative to any directory: without root and `..`."""
  kept = [part.replace("\0", "_") for part in image.parts if part not in ("/", "//", "..")]
  return kept or ["_"]
