"""WebDataset tar files: all formats are read, and damage never loses a member silently."""

import contextlib
import io
import subprocess
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sam3_jax.batch.webdataset import list_samples
from sam3_jax.utils.notes import ListingNotes

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
LONG = "directory/" * 20 + "café.jpg"
SHARED = settings(
  max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def packed(*names, format=tarfile.GNU_FORMAT, content=lambda name: name.encode() * 40):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w", format=format) as tar:
    for name in names:
      data = content(name)
      member = tarfile.TarInfo(name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return file.getvalue()


def listed(path, data):
  """Name, content and sidecar of each image, and the note; raises as `list_samples`."""
  path.write_bytes(data)
  notes = ListingNotes()
  found = [
    (sample.name, data[sample.span[0] : sum(sample.span)], sample.sidecar)
    for sample in list_samples(str(path), notes)
  ]
  return found, notes.line()


def names(path, data):
  found, line = listed(path, data)
  return [name for name, *_ in found], line


@pytest.fixture
def path(tmp_path):
  return tmp_path / "0.tar"


@pytest.mark.parametrize("format", FORMATS)
def test_formats(path, format):
  given = ["a.jpg", "b/c.png"] if format == tarfile.USTAR_FORMAT else ["a.jpg", LONG]
  found, line = listed(path, packed(*given, format=format))
  assert found == [(name, name.encode() * 40, b"") for name in given]
  assert line == ""


def test_old_and_global_headers(path):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"k": "v"}):
    pass
  # A global header, then a member in the format before POSIX: no magic, and type zero.
  glob, old = file.getvalue()[:1024], bytearray(packed("a.jpg"))
  old[257:265], old[156] = bytes(8), 0
  total = sum(old[:148]) + sum(old[156:512]) + 8 * 32
  old[148:156] = b"%06o\0 " % total
  found, _ = listed(path, glob + bytes(old))
  assert found == [("a.jpg", b"a.jpg" * 40, b"")]


def test_skips_files_that_are_not_images(path):
  found, line = names(path, packed(
    "0001.jpg", "0001.seg.png", "0001.mask.PNG", "0001.txt", "0001.json", "._0001.jpg",
    "__MACOSX/x.jpg", "./.git/a.jpg", "s.sam3.png", "0002.meta.json",
  ))  # fmt: skip
  assert found == ["0001.jpg"]
  assert line == (
    "skipped 8 files: 2 label images, 2 macOS metadata, 1 .json, 1 .txt, 1 hidden, "
    "1 result of segment"
  )


def test_skips_members_that_are_not_files(path):
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as tar:
    for name, kind in (("d", tarfile.DIRTYPE), ("s.jpg", tarfile.SYMTYPE),
                       ("h.jpg", tarfile.LNKTYPE), ("f.jpg", tarfile.FIFOTYPE)):  # fmt: skip
      member = tarfile.TarInfo(name)
      member.type, member.linkname = kind, "a.jpg"
      tar.addfile(member)
  found, line = names(path, file.getvalue())
  assert (found, line) == ([], "skipped 3 files: 2 links, 1 not a regular file")


@pytest.mark.parametrize(
  "options", [["gnu"], *(["posix", f"--sparse-version={one}"] for one in ("0.0", "0.1", "1.0"))]
)
def test_sparse_members_are_skipped_and_counted(path, options, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("a.jpg", "sparse.bmp", "z.jpg"):
    (tmp_path / name).write_bytes(name.encode() * 40)
  with (tmp_path / "sparse.bmp").open("r+b") as file:
    for offset in range(10**6, 10**7, 10**6):  # more holes than fit into a header
      file.seek(offset)
      file.write(b"x")
  given = ["a.jpg", "sparse.bmp", "z.jpg"]
  command = ["tar", "-cSf", "s.tar", "-H", *options, *given]
  if subprocess.run(command, capture_output=True).returncode:
    pytest.skip("needs GNU tar and a file system with holes")
  found, line = listed(path, (tmp_path / "s.tar").read_bytes())
  assert [name for name, *_ in found] == ["a.jpg", "z.jpg"]
  assert [data for _, data, _ in found] == [b"a.jpg" * 40, b"z.jpg" * 40]
  assert line == "skipped 1 file: 1 sparse member"


def test_names_with_dots(path):
  """Images with several dots are images if the sample has no image with a single dot."""
  found, line = listed(path, packed("IMG.2024.05.jpg", "IMG.2024.05.json", "IMG.2024.06.jpg"))
  assert [name for name, *_ in found] == ["IMG.2024.05.jpg", "IMG.2024.06.jpg"]
  assert [bool(notes) for *_, notes in found] == [True, False]
  assert line.startswith("2 members count as an image, although the name has several dots (such as")


def test_sidecar_of_a_sample(path):
  found, line = listed(path, packed("a/1.jpg", "b/1.json", "a/1.JSON", "a/1.meta.json"))
  assert found == [("a/1.jpg", b"a/1.jpg" * 40, b"a/1.JSON" * 40)]
  assert line == "skipped 2 files: 2 .json"


def test_later_member_of_the_same_name_replaces_the_earlier(path):
  turn = iter((b"old" * 200, b"b", b"new"))
  data = packed("a.jpg", "b.jpg", "./a.jpg", content=lambda _: next(turn))
  found, line = listed(path, data)
  assert found == [("b.jpg", b"b", b""), ("./a.jpg", b"new", b"")]
  assert line == "skipped 1 file: 1 member replaced by a later one"


def test_empty_archives_and_padding(path):
  assert names(path, bytes(1024)) == ([], "")
  assert names(path, packed()) == ([], "")
  assert names(path, packed("a.jpg") + bytes(3_000_000)) == (["a.jpg"], "")


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda tar: tar[:3072], r"3 members, then no end mark .* at byte 3,072"),
    (lambda tar: tar[:3072] + bytes(1023), r"3 members, then no end mark .* at byte 3,072"),
    (lambda tar: tar[:2148], "2 members, then the end of the file inside a header at byte 2,048"),
    (lambda tar: tar[:2700], "3 members, then the end of the file, at byte 2,700, inside 'c.jpg'"),
    (lambda tar: tar[:1024] + b"x" + tar[1025:], "1 member, then a damaged header at byte 1,024"),
    (lambda tar: tar + tar, "3 members, then the end mark, but more data follow at byte 10,240"),
    (lambda tar: b"x" + tar[1:], r"is not a tar file \(10,240 bytes\), or its first header is da"),
  ],
)
def test_damage_is_described(path, change, said):
  with pytest.raises(ValueError, match=said) as caught:
    listed(path, change(packed("a.jpg", "b.jpg", "c.jpg")))
  assert str(path) in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_malicious_headers(path, kind):
  """Thousands of extended headers in a row, and sizes that are huge or negative."""
  extended = tarfile.TarInfo("x")
  extended.type = kind
  for size, times in ((0, 5000), (2**60, 1), (2**32, 1)):
    extended.size = size
    with pytest.raises(ValueError, match=r"not a tar file|damaged"):
      listed(path, extended.tobuf(tarfile.GNU_FORMAT) * times + packed("a.jpg"))
  member = tarfile.TarInfo("a.jpg")
  for size in (-1, -512, -(2**40)):
    member.size = size
    with pytest.raises(ValueError, match=r"not a tar file|damaged"):
      listed(path, packed("a.jpg")[:1024] + member.tobuf(tarfile.GNU_FORMAT) + packed("b.jpg"))


COMPLETE = {format: packed("a.jpg", "b.seg.png", "b.jpg", "a.json", LONG[-90:], format=format)
         for format in FORMATS}  # fmt: skip


def headers(data):
  with tarfile.open(fileobj=io.BytesIO(data)) as tar:
    found = [at for one in tar for at in (one.offset, one.offset_data - 512)]
    return [*found, tar.offset, tar.offset + 512]


@SHARED
@given(st.sampled_from(FORMATS), st.data())
def test_flipped_bit_in_a_header_loses_nothing(tmp_path, format, data):
  whole = COMPLETE[format]
  at = data.draw(st.sampled_from(headers(whole))) + data.draw(st.integers(0, 511))
  flipped = bytearray(whole)
  flipped[at] ^= 1 << data.draw(st.integers(0, 7))
  wanted = listed(tmp_path / "whole.tar", whole)
  with contextlib.suppress(ValueError):  # either an error, or the same result
    assert listed(tmp_path / "0.tar", bytes(flipped)) == wanted


@SHARED
@given(st.sampled_from(FORMATS), st.data())
def test_truncation_loses_nothing(tmp_path, format, data):
  whole = COMPLETE[format]
  at = data.draw(
    st.integers(0, len(whole)) | st.integers(0, len(whole) // 512).map(lambda n: 512 * n)
  )
  wanted = listed(tmp_path / "whole.tar", whole)
  with contextlib.suppress(ValueError):
    assert listed(tmp_path / "0.tar", whole[:at]) == wanted
