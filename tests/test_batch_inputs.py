"""Lists of inputs: their content and order, and the messages for faulty lists."""

import errno
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import textwrap
from pathlib import Path

import pytest
from batches import broken, load_images
from PIL import Image

from sam3_jax import Prompt, Tokenizer
from sam3_jax.batch.inputs import check_phrases, list_inputs, read_phrases
from sam3_jax.batch.prompt_schema import parse_prompts, prompt_to_json
from sam3_jax.utils.notes import ListingNotes


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ("b.jpg", "a.PNG", "sub/c.webp", "sub/deep/d.tiff", ".hidden.jpg", ".git/e.jpg"):
    path = tmp_path / "images" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), "red").save(path)
  (tmp_path / "images" / "notes.txt").write_text("no image")
  (tmp_path / "images" / "folder.jpg").mkdir()
  return tmp_path


def names(inputs):
  return [one.name for one in inputs]


def write_lines(path, *lines):
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def write_tar(path, **members):
  with tarfile.open(path, "w") as tar:
    for name, data in members.items():
      member = tarfile.TarInfo(name.replace("__", "/").replace("_", "."))
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return str(path)


def png(color="red", size=(3, 2)):
  file = io.BytesIO()
  Image.new("RGB", size, color).save(file, "png")
  return file.getvalue()


def test_directory(folder):
  found = list_inputs("images", "cat")
  assert names(found) == ["a.PNG", "b.jpg", "sub/c.webp", "sub/deep/d.tiff"]
  assert {one.prompts for one in found} == {(Prompt("cat"),)}


def test_pattern_and_single_file(folder):
  assert names(list_inputs("images/*.jpg", "cat")) == ["images/b.jpg"]
  assert names(list_inputs("images/**/*.[jt]*", "cat")) == [
    "images/b.jpg", "images/notes.txt", "images/sub/deep/d.tiff",
  ]  # fmt: skip
  assert names(list_inputs("images/b.jpg", "cat")) == ["images/b.jpg"]


def test_phrases(folder):
  assert [one.text for one in read_phrases("a, b,, a ,yellow bus")] == ["a", "b", "yellow bus"]
  (folder / "list").write_text("\ufeffred, blue\n\n  cat \ncat\n", encoding="utf-8")
  assert [one.text for one in read_phrases("list")] == ["red, blue", "cat"]
  with pytest.raises(FileNotFoundError, match=r"there is no file of phrases none\.txt"):
    read_phrases("none.txt")
  for nothing in ("", " , "):
    with pytest.raises(ValueError, match="there is no phrase in --prompts"):
      read_phrases(nothing)


def test_json_lines(folder):
  box = {"boxes": [[1, 2, 3, 4]], "box_labels": [0]}
  path = write_lines(
    folder / "list.jsonl",
    {"image": "images/b.jpg", "prompts": ["cat", {"text": "dog", **box}]},
    {"image": "images/a.PNG"},
    {"image": str(folder / "elsewhere.jpg"), "prompts": [box]},
  )
  found = list_inputs(path, "bus")
  dog = Prompt("dog", [[1, 2, 3, 4]], [0])
  assert found[0].prompts == (Prompt("cat"), dog)
  assert found[1].prompts == (Prompt("bus"),)
  assert found[2].prompts == (Prompt(boxes=[[1, 2, 3, 4]], box_labels=[0]),)
  assert found[0].path == str(folder / "images/b.jpg")
  assert Prompt(**prompt_to_json(dog)) == dog


def test_image_listed_twice_is_one_input_with_all_prompts(folder):
  path = write_lines(
    folder / "list.jsonl",
    {"image": "images/b.jpg", "prompts": ["cat", "dog"]},
    {"image": "images/a.PNG", "prompts": ["cat"]},
    {"image": "./images/sub/../b.jpg", "prompts": ["dog", "bus"]},
    {"image": "images/a.PNG", "prompts": ["cat"]},
  )
  found = list_inputs(path)
  assert names(found) == ["images/b.jpg", "images/a.PNG"]
  assert [[prompt.text for prompt in one.prompts] for one in found] == [
    ["cat", "dog", "bus"], ["cat"],
  ]  # fmt: skip


def test_visual_prompts_from_json_and_back(folder, tokenizer_path):
  click, box = {"points": [[1, 2]]}, {"box": [0, 0, 3, 2], "visual": True}
  refined = {"points": [[1, 2], [0, 1]], "point_labels": [1, 0], "box": [0, 0, 3, 2]}
  path = write_lines(
    folder / "list.jsonl",
    {"image": "images/b.jpg", "prompts": ["cat", click, box, {**click, "text": None}]},
    {"image": "images/a.PNG", "prompts": [refined]},
    {"image": "images/b.jpg", "prompts": [{**box, "points": []}, click, refined]},
  )
  first, second = list_inputs(path)
  assert [prompt_to_json(one) for one in first.prompts[1:]] == [
    {"points": [[1, 2]], "point_labels": [1], "box": None, "visual": True},
    {"points": [], "point_labels": [], "box": [0, 0, 3, 2], "visual": True},
    prompt_to_json(second.prompts[0]),
  ]
  assert prompt_to_json(second.prompts[0]) == {**refined, "visual": True}
  for one in first, second:
    values = [prompt_to_json(prompt) for prompt in one.prompts]
    parsed = parse_prompts({"prompts": values})
    assert [prompt_to_json(prompt) for prompt in parsed] == values
  check_phrases([first, second], Tokenizer(tokenizer_path))


def test_faulty_visual_prompts_are_named(folder):
  faults = {
    '{"points": [[1, 2]], "point_labels": [2]}': "point labels are 1 (on the object) or 0",
    '{"points": [[1, 2]], "point_labels": [1, 0]}': "point_labels needs one label for each point",
    '{"points": [[NaN, 2]]}': "NaN is not a JSON number",
    '{"text": "\\ud800"}': "has an unpaired surrogate",
    '"\\udfff"': "has an unpaired surrogate",
    "[" * 100_000: "it is nested too deeply",
    '{"points": [1, 2]}': "point 0 must be two numbers x, y in pixels",
    '{"box": [1, 1, 3, 3]}': 'needs "visual": true',
    '{"points": [[1, 2]], "visual": false}': "got visual False",
    '{"box": [3, 1, 1, 3], "visual": true}': "the box has a negative extent",
    '{"visual": true}': "a visual prompt needs points, a box or a mask",
    '{"text": "cat", "points": [[1, 2]]}': "points is for visual prompts",
    '{"boxes": [[1, 1, 3, 3]], "visual": true}': "make them two prompts",
  }
  for given, said in faults.items():
    (folder / "list.jsonl").write_text(f'{{"image": "a.jpg", "prompts": [{given}]}}\n')
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
      list_inputs("list.jsonl")
    assert "line 1: " in str(caught.value)
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_all_faults_of_a_list_are_named(folder):
  path = folder / "list.jsonl"
  lines = [
    '{"image": "a.jpg", "prompts": ["cat"]}', "{", '["a.jpg"]', '{"image": 3}', "",
    '{"image": "a.jpg", "prompt": "cat"}', '{"image": "a.jpg", "prompts": "cat"}',
    '{"image": "a.jpg", "prompts": [{"box": [1]}]}', '{"image": "a.jpg", "prompts": [" "]}',
    '{"image": "a.jpg", "prompts": [{"boxes": [[3, 3, 1, 1]]}]}', '{"image": "b.jpg"}',
    '{"image": "a.jpg", "prompts": [7]}', '{"image": "a.jpg", "prompts": []}',
  ]  # fmt: skip
  path.write_text("\n".join(lines))
  with pytest.raises(ValueError, match=r"list.jsonl, 11 faults: line 2: ") as caught:
    list_inputs(str(path))
  message = str(caught.value)
  assert "\n" not in message
  for number in (2, 3, 4, 6, 7, 8, 9, 10, 12, 13):
    assert f"line {number}: " in message
  assert "1 image has no prompts (b.jpg)" in message
  assert "negative extent" in message


def test_webdataset(folder):
  path = write_tar(
    folder / "0.tar",
    a__1_png=png("red"), a__1_json=b'{"prompts": ["cat"], "image": "ignored"}', a__1_txt=b"x",
    a__2_png=png("blue", (5, 4)), b__2_jpg=b"broken", b__2_json=b'{"caption": "no prompts"}',
  )  # fmt: skip
  write_tar(folder / "1.tar", z_png=png("green"))
  found = list_inputs(str(folder / "*.tar"), "bus")
  assert names(found)[:3] == [f"{path}/a/1.png", f"{path}/a/2.png", f"{path}/b/2.jpg"]
  assert names(found)[3:] == [f"{folder}/1.tar/z.png"]
  assert [one.prompts[0].text for one in found] == ["cat", "bus", "bus", "bus"]
  red, blue, broken, green = load_images(found)
  assert red.pixels[3, 3].tolist() == [255, 0, 0]
  assert blue.pixels[3, 3].tolist() == [0, 0, 255]
  assert green.pixels[3, 3].tolist() == [0, 128, 0]
  assert blue.size == (4, 5)
  assert broken.reason.startswith(f"{path}/b/2.jpg is not an image")


def test_faulty_tar_files(folder):
  whole = folder / "0.tar"
  write_tar(whole, a_png=png() * 100)
  (folder / "cut.tar").write_bytes(whole.read_bytes()[:700])
  (folder / "text.tar").write_text("text")
  (folder / "empty.tar").write_bytes(b"")
  for name in ("text", "empty"):
    with pytest.raises(ValueError, match=f"{name}.tar is not a tar file .*its first header is dam"):
      list_inputs(str(folder / f"{name}.tar"), "cat")
  with pytest.raises(ValueError, match="1 member, then the end of the file, at byte 700, inside"):
    list_inputs(str(folder / "cut.tar"), "cat")
  (folder / "zip.tar").write_bytes(gzip.compress(whole.read_bytes()))
  with pytest.raises(ValueError, match=r"but compressed \(gzip\); unpack it"):
    list_inputs(str(folder / "zip.tar"), "cat")
  (folder / "0.tar.gz").write_bytes(b"")
  with pytest.raises(ValueError, match="is compressed; unpack it"):
    list_inputs(str(folder / "0.tar.gz"), "cat")
  for notes, said in (
    (b"[1]", r"got \[1\]"),
    (b"{", "b'{' is not"),
    (b"\xff", ".* is not valid JSON"),
  ):
    write_tar(folder / "bad.tar", a_png=png(), a_json=notes)
    with pytest.raises(ValueError, match=rf"a.png: its .json: it must be .*prompts.*; {said}"):
      list_inputs(str(folder / "bad.tar"), "cat")


def test_missing_images(folder):
  with pytest.raises(FileNotFoundError, match="there is no directory, file or pattern none"):
    list_inputs("none", "cat")
  (folder / "nothing").mkdir()
  for images in ("nothing", "nothing/*.jpg"):
    with pytest.raises(ValueError, match="there is no image in"):
      list_inputs(images, "cat")
  (folder / "nothing" / "0.tar").write_bytes(b"")
  with pytest.raises(ValueError, match=r"no image in nothing \(skipped 1 file: 1 \.tar\); check"):
    list_inputs("nothing", "cat")
  with pytest.raises(
    ValueError, match=r"4 images have no prompts \(a.PNG, b.jpg, sub/c.webp and 1"
  ):
    list_inputs("images")


@pytest.mark.parametrize(("where", "code"), [("images", errno.EACCES), ("sub", errno.EIO)])
def test_unreadable_directory(folder, monkeypatch, where, code):
  unreadable(monkeypatch, where, code)
  with pytest.raises(ValueError, match=rf"{where} cannot be read \({os.strerror(code)}\); check"):
    list_inputs("images", "cat")


def test_subdirectory_without_permission_is_counted(folder, monkeypatch):
  unreadable(monkeypatch, "sub", errno.EACCES)
  notes = ListingNotes()
  assert names(list_inputs("images", "cat", notes)) == ["a.PNG", "b.jpg"]
  assert "1 directory is skipped, as permission to read it is denied (images/sub)" in notes.line()


def unreadable(monkeypatch, name, code):
  scandir = os.scandir

  def fail(path):
    if str(path).rstrip("/").endswith(name):
      raise OSError(code, os.strerror(code), str(path))
    return scandir(path)

  monkeypatch.setattr("os.scandir", fail)


def test_encodings_of_lists(folder):
  """A byte order mark, CRLF, names that are not UTF-8, and strings that cannot be names."""
  odd = os.fsdecode(b"caf\xe9\n.png")
  (folder / odd).write_bytes(png())
  lines = [json.dumps({"image": odd}), "", '{"image": "images/b.jpg"}']
  (folder / "list.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n")
  found = list_inputs("list.jsonl", "cat")
  assert names(found) == [odd, "images/b.jpg"]
  assert all(not image.reason for image in load_images(found))
  for name in ("\ud800.png", "a\0.png", ""):
    with pytest.raises(ValueError, match=r"line 1: .* cannot be the name of a file"):
      list_inputs(write_lines(folder / "list.jsonl", {"image": name}), "cat")


def test_images_that_will_fail_are_counted(folder):
  (folder / "empty.png").write_bytes(b"")
  path = write_lines(folder / "list.jsonl", *({"image": f"{i}.png"} for i in ("empty", 0, 1)))
  notes = ListingNotes()
  assert len(list_inputs(path, "cat", notes)) == 3
  assert notes.line() == "1 image is empty (empty.png); 2 images do not exist (such as 0.png)"
  with pytest.raises(ValueError, match="--strict: 1 image is empty"):
    notes.refuse()


def test_files_that_are_not_utf8(folder):
  for name in ("list.jsonl", "phrases.txt"):
    (folder / name).write_bytes(b"caf\xe9")
  for given in (("list.jsonl", None), ("images", "phrases.txt")):
    with pytest.raises(ValueError, match=r"(list.jsonl|phrases.txt) is not UTF-8 text; save"):
      list_inputs(*given)


def test_phrases_that_are_too_long(folder, tokenizer_path):
  tokenizer = Tokenizer(tokenizer_path)
  check_phrases(list_inputs("images", ", ".join(["cat " * 30, "x", "bus"])), tokenizer)
  with pytest.raises(
    ValueError, match=r"2 faults: phrase 'cat cat.* has 31 tokens, and at most 30"
  ) as e:
    check_phrases(list_inputs("images", ", ".join(["cat " * 31, "bus", "dog " * 40])), tokenizer)
  assert "'dog dog" in str(e.value)
  assert "has 40 tokens" in str(e.value)


def test_broken_images_yield_reasons(folder):
  """Of ten kinds; the good images between them are read."""
  lines = []
  for name, data in broken().items():
    (folder / name).write_bytes(data)
    lines += [{"image": name}, {"image": f"good-{name}"}]
    (folder / f"good-{name}").write_bytes(png())
  lines += [{"image": "missing.png"}, {"image": "images"}]
  found = list_inputs(write_lines(folder / "list.jsonl", *lines), "cat")
  images = load_images(found)
  for item, image in zip(found, images, strict=True):
    good = item.name.startswith("good")
    assert (image.reason == "") == good, (item.name, image.reason)
    assert good == bool(image.pixels.size)
    assert "\n" not in image.reason
    assert good or item.name in image.reason


@pytest.mark.slow
def test_reader_process_ends_with_a_killed_parent():
  program = """
    import os, sys
    from sam3_jax.batch.reader_process import ReaderProcess

    if __name__ == "__main__":
      reader = ReaderProcess(8, 10)
      sys.stdout.write(f"{reader._process.pid}\\n")
      sys.stdout.flush()
      os.kill(os.getpid(), 9)
  """
  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "program.py"
    path.write_text(textwrap.dedent(program))
    process = subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE)
    output, _ = process.communicate(timeout=300)  # returns when the reader has closed stdout too
  assert process.returncode == -signal.SIGKILL
  assert int(output) > 0


def test_no_images_to_load():
  assert load_images([]) == []
