"""Listing the images of a directory or a pattern: each file is listed or counted as skipped."""

import errno
import glob
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sam3_jax.inputs.image_file import IMAGE_SUFFIXES
from sam3_jax.inputs.image_listing import find_files
from sam3_jax.utils.notes import ListingNotes


@pytest.fixture
def here(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  return tmp_path


def make(*names):
  for name in names:
    directory = os.path.dirname(name)
    if directory:
      os.makedirs(directory, exist_ok=True)
    with open(name, "wb") as file:
      file.write(b"x")


def listed(given):
  notes = ListingNotes()
  return [one.name for one in find_files(given, notes)], notes.line()


def test_skipped_files_are_counted(here):
  make(*(f"d/{i}.txt" for i in range(8)), "d/a.jpg", "d/.b.jpg", "d/._c.jpg", "d/.git/d.jpg")
  make("d/a.sam3.png", "d/a.sam3.json", "d/README", "d/odd.\x1b[31m", "d/__MACOSX/._e.jpg")
  os.symlink("nowhere.jpg", "d/broken.jpg")
  os.symlink("circle.jpg", "d/circle.jpg")
  os.mkfifo("d/pipe.jpg")
  found, line = listed("d")
  assert found == ["a.jpg", "pipe.jpg"]
  assert line == (
    "skipped 17 files: 8 .txt, 2 broken links, 2 macOS metadata, 2 results of segment, 1 hidden, "
    "1 with other extensions, 1 without an extension and 1 directory: 1 hidden"
  )


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_suffixes_of_all_formats(here, suffix):
  make(f"d/a{suffix}", f"d/A{suffix.upper()}")
  assert listed("d") == ([f"A{suffix.upper()}", f"a{suffix}"], "")


def test_linked_directories_are_followed_once(here):
  make("d/real/a.jpg", "elsewhere/b.jpg", "elsewhere/deep/c.jpg")
  os.symlink("real", "d/a-link")
  os.symlink("../elsewhere", "d/other")
  os.symlink("../d", "elsewhere/back")
  os.symlink("..", "elsewhere/deep/upwards")
  os.symlink("/", "d/root")
  found, line = listed("d")
  assert found == ["other/b.jpg", "other/deep/c.jpg", "real/a.jpg"]
  assert line == (
    "skipped 4 directories: 3 link to a directory listed too, 1 link to a directory above"
  )


def test_many_link_cycles_are_fast(here):
  make("d/a.jpg")
  for i in range(50):
    os.symlink(".", f"d/{i}")
  assert listed("d")[0] == ["a.jpg"]


def test_patterns(here):
  make("d/a.jpg", "d/a.sam3.png", "d/b", "d/sub/c.jpg")
  os.symlink("nowhere", "d/broken")
  assert listed("d/*") == (
    ["d/a.jpg", "d/b"],
    "skipped 2 files: 1 broken link, 1 result of segment and 1 directory: 1 matched by the pattern",
  )
  os.symlink(".", "d/sub/circle")
  assert listed("d/**/*.jpg")[0] == ["d/a.jpg", "d/sub/c.jpg"]
  assert listed("d/**")[0] == ["d/a.jpg", "d/b", "d/sub/c.jpg"]
  assert listed("nothing/*") == listed("d/a.jpg/**") == ([], "")
  assert "matched by the pattern" not in listed("d/**/*")[1]


@settings(
  max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
  st.sets(st.lists(st.sampled_from(["a", "b.jpg", "ab", ".h"]), min_size=1, max_size=3).map(tuple)),
  st.lists(
    st.sampled_from(["*", "**", "a*", "?", "[ab]", "a", ".*", "b.jpg"]), min_size=1, max_size=4
  ),
)
def test_patterns_match_like_glob(tmp_path, files, parts):
  top = tmp_path / str(len(os.listdir(tmp_path)))
  for names in sorted(files, key=len, reverse=True):
    path = top.joinpath(*names)
    if not path.exists() and not any(one.is_file() for one in path.parents):
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(b"x")
  pattern = f"{top}/{'/'.join(parts)}"
  if glob.has_magic(pattern):
    wanted = {name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)}
    assert listed(pattern)[0] == sorted(wanted)


def test_patterns_with_unreadable_directories(here, monkeypatch):
  make("d/a/x.jpg", "d/b/x.jpg")
  scandir, code = os.scandir, errno.EACCES

  def fail(path):
    if str(path) == "d/a":
      raise OSError(code, os.strerror(code))
    return scandir(path)

  monkeypatch.setattr("os.scandir", fail)
  assert listed("d/*/*.jpg") == (
    ["d/b/x.jpg"], "1 directory is skipped, as permission to read it is denied (d/a)"
  )  # fmt: skip
  code = errno.EIO
  for pattern in ("d/*/*.jpg", "d/**/*.jpg"):
    with pytest.raises(ValueError, match="d/a cannot be read"):
      listed(pattern)


def test_single_files(here):
  make("a[1].jpg", "b.txt", "c.sam3.png", "d.sam3.png", "d.sam3.json")
  assert listed("a[1].jpg") == (["a[1].jpg"], "")
  assert listed("b.txt") == (["b.txt"], "")
  assert listed("c.sam3.png") == (["c.sam3.png"], "")
  assert listed("d.sam3.png") == ([], "skipped 1 file: 1 result of segment")
  with pytest.raises(FileNotFoundError, match="there is no directory, file or pattern none"):
    listed("none")


NAMES = st.one_of(
  st.sampled_from(["a.jpg", ".b.png", "c.txt", "d", "._e.gif", "f.sam3.png", "g.TGA", "h.tar"]),
  st.binary(min_size=1, max_size=6).map(lambda name: name.replace(b"/", b"_").replace(b"\0", b"")),
)
TREES = st.recursive(st.none(), lambda inner: st.dictionaries(NAMES, inner, max_size=4))


def grow(path, tree):
  if tree is None:
    path.write_bytes(b"x")
    return
  path.mkdir()
  for name, inner in tree.items():
    name = os.fsdecode(name)
    if name not in ("", ".", "..") and not os.path.lexists(path / name):
      grow(path / name, inner)


@settings(
  max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(TREES.filter(lambda tree: tree is not None))
def test_every_file_is_listed_or_counted(tmp_path, tree):
  top = tmp_path / str(len(os.listdir(tmp_path)))
  grow(top, tree)
  notes = ListingNotes()
  found = [one.name for one in find_files(str(top), notes)]
  files = 0
  for _, directories, names in os.walk(top):
    directories[:] = [name for name in directories if not name.startswith(".")]
    files += len(names)
  assert found == sorted(set(found))
  assert len(found) + sum(notes._files.values()) == files
  assert notes.line().isprintable()


def test_note_is_short_for_many_kinds():
  notes = ListingNotes()
  for i in range(1000):
    notes.skip_suffix(f"a.x{i}")
    notes.remark("image is empty", "images are empty", "n" * 10_000)
  assert len(notes.line()) < 400
  assert "992 of other kinds" in notes.line()
  assert ListingNotes().line() == ""
  ListingNotes().refuse()
