"""Checksums of a checkpoint's files: when faults are found, and the messages."""

import hashlib
import json
import shutil
import subprocess

import bundle_flips
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layouts import TOKENIZER, layout, write_folder
from PIL import Image
from sam3_jax.converters import convert

from sam3_jax import Sam3
from sam3_jax.checkpoint import bundle, checksums, fingerprint
from sam3_jax.checkpoint.orbax_items import read_item, save_item
from sam3_jax.cli.main import main

NAMES = st.text("abcxyz_-. /", min_size=1, max_size=12).filter(checksums._is_listable)
SUMS = st.dictionaries(NAMES, st.binary(max_size=9), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  return bundle_flips.make(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture
def copy(made, tmp_path):
  return shutil.copytree(made, tmp_path / "tiny")


@pytest.fixture
def old(copy):
  """A checkpoint of earlier versions: the manifest has checksums of the files in params/ only."""
  sums = checksums.read(copy)
  manifest = json.loads((copy / "manifest.json").read_text())
  del manifest["checksums_file"], manifest["unread_files"]
  manifest["checksums"] = {
    item: {name: sums[f"params/{item}/{name}"] for name in names}
    for item, names in manifest["files"].items()
  }
  (copy / "manifest.json").write_text(json.dumps(manifest))
  (copy / checksums.FILE).unlink()
  return copy


def flip(path, position=-2):
  data = bytearray(path.read_bytes())
  data[position] ^= 1
  path.write_bytes(data)


def refused(path, match, **options):
  with pytest.raises(ValueError, match=match) as caught:
    bundle.begin(path, **options)
  assert "\n" not in str(caught.value)


def largest(path, folder="params"):
  return max((path / folder).rglob("d/*"), key=lambda file: file.stat().st_size)


# --- SHA256SUMS


@given(SUMS)
def test_write_and_read_checksums(tmp_path_factory, files):
  folder = tmp_path_factory.mktemp("sums")
  written = {}
  for name, content in files.items():
    if not any(other.startswith(f"{name}/") or name.startswith(f"{other}/") for other in written):
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_bytes(content)
      written[name] = hashlib.sha256(content).hexdigest()
  written = {name: digest for name, digest in written.items() if not name.startswith(".")}
  assert checksums.write(folder) == checksums.read(folder) == written
  assert list(checksums.read(folder)) == sorted(written)
  assert checksums.compare(folder, written) == []


@given(SUMS, st.data())
def test_flipped_bit_in_the_checksums(tmp_path_factory, files, data):
  """The line is invalid, or has another digest or name."""
  folder = tmp_path_factory.mktemp("sums")
  sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
  text = "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode()
  position, bit = data.draw(st.integers(0, len(text) - 1)), data.draw(st.integers(0, 7))
  changed = bytearray(text)
  changed[position] ^= 1 << bit
  (folder / checksums.FILE).write_bytes(changed)
  try:
    found = checksums.read(folder)
  except ValueError as error:
    found, message = None, str(error)
    assert message.startswith(f"{folder / checksums.FILE} is damaged: ")
  assert found != sums


@pytest.mark.parametrize(
  "line",
  ["", "0" * 64, f"{'0' * 63}  a", f"{'0' * 64} a", f"{'0' * 64}  ../a", f"{'0' * 64}  /a",
   f"{'A' * 64}  a", f"{'0' * 64}  SHA256SUMS", f"{'0' * 64}  a\n{'1' * 64}  a", "[" * 99_999],
)  # fmt: skip
def test_invalid_lines(tmp_path, line):
  (tmp_path / checksums.FILE).write_text(f"{'0' * 64}  first\n{line}\n")
  with pytest.raises(ValueError, match=r"SHA256SUMS is damaged: line [23] \(") as caught:
    checksums.read(tmp_path)
  assert len(str(caught.value)) < 400 + len(str(tmp_path))


def test_sha256sum_checks_all_files(made):
  done = subprocess.run(
    ["sha256sum", "--check", "--strict", checksums.FILE],
    cwd=made, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  files = {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()}
  assert checksums.read(made).keys() | {checksums.FILE} == files
  assert {"README.md", "LICENSE", "fingerprint.json", "tokenizer.model"} < files


def test_progress_of_reading_files(made, monkeypatch):
  monkeypatch.setattr(checksums, "TICK", 0.0)
  fractions = []
  bundle.verify(made, progress=fractions.append)
  assert fractions == sorted(fractions)
  assert all(0 <= fraction <= 1 for fraction in fractions)


# --- faults


@pytest.mark.slow
def test_faults_are_found_before_a_job():
  """`benchmarks/bundle_flips.py` tests 650 faults."""
  assert [one for one in bundle_flips.run(6, 1, seed=1) if one.missed] == []


def test_verify_finds_a_flipped_bit_in_a_large_file(copy):
  flip(largest(copy), 2**19)
  bundle.begin(copy)
  refused(copy, f"{largest(copy)} differs from its checksum", verify=True)
  with pytest.raises(ValueError, match="differs from its checksum"):
    Sam3.from_checkpoint(copy, verify=True)


@pytest.mark.parametrize("name", ["tokenizer.model", "params"])
def test_batch_refuses_a_damaged_checkpoint(copy, tmp_path, capsys, name):
  flip(largest(copy) if name == "params" else copy / name, 2**14)
  Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
  typed = ["--images", tmp_path / "*.png", "--prompts", "a, b", "--out", tmp_path / "out"]
  typed += ["--checkpoint", copy, "--quiet"]
  assert main(["batch", *map(str, typed)]) == 2
  assert "differs from its checksum" in capsys.readouterr().err
  assert not any((tmp_path / "out").glob("**/*.json*"))


def test_missing_checksums(copy):
  (copy / checksums.FILE).unlink()
  refused(copy, f"SHA256SUMS is missing. .*`sam3-jax inspect {copy} --add-checksums`")


def test_verify_compares_additional_files(copy):
  flip(copy / "README.md")
  bundle.begin(copy)
  refused(copy, "README.md differs from its checksum", verify=True)
  (copy / "README.md").unlink()
  refused(copy, "README.md cannot be read: No such file", verify=True)
  shutil.copy(copy / "LICENSE", copy / "README.md")
  (copy / "notes").mkdir()
  (copy / ".git").mkdir()
  (copy / ".git" / "HEAD").write_text("x")
  assert "no checksums of notes/; --add-checksums adds" in bundle.inspect(copy).checks["checksums"]
  assert bundle.add_checksums(copy) == ["README.md"]
  bundle.verify(copy)


def test_item_rewritten_by_orbax(copy):
  arrays = read_item(copy / "params" / "trunk")
  shutil.rmtree(copy / "params" / "trunk")
  save_item(copy / "params" / "trunk", arrays)
  checks = bundle.inspect(copy).checks["checksums"]
  assert checks.endswith("params/trunk was rewritten by Orbax")
  bundle.load(copy, verify=True)
  shutil.rmtree(copy / "params" / "trunk")
  arrays["trunk"]["norm_pre"]["scale"] = arrays["trunk"]["norm_pre"]["scale"] + 1
  save_item(copy / "params" / "trunk", arrays)
  refused(copy, "1 fault: trunk/norm_pre/scale differs from its checksum", verify=True)
  with pytest.raises(ValueError, match="trunk/norm_pre/scale differs"):
    bundle.add_checksums(copy)


# --- edited on purpose, and of earlier versions


@pytest.mark.slow
def test_edited_configuration(copy, capsys):
  before = bundle.inspect(copy).identity
  settings = json.loads((copy / "config.json").read_text())
  settings["model"]["dropout"] = 0.25
  (copy / "config.json").write_text(json.dumps(settings))
  assert main(["inspect", str(copy)]) == 2
  said = capsys.readouterr().err
  assert "config.json differs from its checksum" in said
  assert f"if you changed it on purpose, run `sam3-jax inspect {copy} --add-checksums`" in said
  assert main(["inspect", str(copy), "--add-checksums", "--json"]) == 0
  out, err = capsys.readouterr()
  assert f"{copy}: SHA256SUMS has new checksums of config.json, manifest.json\n" in err
  assert json.loads(out)["config"]["dropout"] == 0.25
  assert json.loads(out)["identity"] == bundle.load(copy, verify=True).identity != before
  settings["model"]["heads"] = 0
  (copy / "config.json").write_text(json.dumps(settings))
  assert main(["inspect", str(copy), "--add-checksums"]) == 2
  assert "config.json: heads must be at least 1; got 0" in capsys.readouterr().err
  refused(copy, "config.json differs from its checksum")


@pytest.mark.slow
def test_checkpoint_of_an_earlier_version(old, made):
  assert bundle.load(old, verify=True).identity == bundle.inspect(made).identity
  for verify, end in ((False, ""), (True, "tensors match; ")):
    checks = bundle.inspect(old, verify=verify).checks["checksums"]
    lacking = "LICENSE, README.md, config.json, fingerprint.json, manifest.json, tokenizer.model"
    assert checks.endswith(f"{end}no checksums of {lacking}; --add-checksums adds them")
  file = largest(old)
  flip(file, 2**19)
  bundle.begin(old)
  refused(old, f"{file} differs from its checksum; .* differs", verify=True)
  with pytest.raises(ValueError, match=r"1 fault: .* differs from its checksum"):
    bundle.add_checksums(old)
  flip(file, 2**19)
  flip(old / "params" / "rest" / "_METADATA")
  refused(old, "_METADATA differs from its checksum")


def test_add_checksums_to_an_earlier_version(old):
  names = bundle.add_checksums(old)
  assert set(names) == checksums.read(old).keys()
  manifest = json.loads((old / "manifest.json").read_text())
  assert manifest["checksums_file"] == checksums.FILE
  assert "checksums" not in manifest
  checks = bundle.inspect(old, verify=True).checks["checksums"]
  assert checks.startswith(f"all {len(names)} files match")
  flip(old / "tokenizer.model")
  refused(old, "tokenizer.model differs from its checksum")


def test_flipped_bits_in_an_earlier_version(old):
  flip(largest(old, "unread"), 0)
  bundle.begin(old)
  refused(old, r"tracker\.\d differs from its checksum|cannot be read", verify=True)


# --- identity


@pytest.mark.slow
def test_conversions_of_the_same_weights_have_the_same_identity(tmp_path):
  """From two files in two layouts, under two names."""
  identities = set()
  for name, kind, shards in (("a", "hub", 1), ("b", "doubled", 2)):
    source = write_folder(tmp_path / f"source-{name}", layout(kind), shards)
    convert(source, tmp_path / name, tokenizer=TOKENIZER, verify=False)
    identities.add(bundle.inspect(tmp_path / name).identity)
  assert len(identities) == 1


def test_inspect_shows_the_identity(made, capsys):
  identity = bundle.load(made).identity
  assert main(["inspect", str(made)]) == 0
  assert f" {identity[:16]} " in capsys.readouterr().out
  assert main(["inspect", str(made), "--json"]) == 0
  assert json.loads(capsys.readouterr().out)["identity"] == identity


def test_embedded_checkpoint_is_complete():
  path = bundle_flips.Path(__file__).parents[1] / "checkpoints" / "sam3-tiny"
  checks = bundle.inspect(path, verify=True).checks["checksums"]
  assert "no checksums of" not in checks
  assert checks.startswith("all ")


# --- what is not a checkpoint


def test_message_for_another_layout_or_the_parent_folder(made, tmp_path):
  source = write_folder(tmp_path / "source", {"x": np.ones(1)})
  refused(source, r"holds weights in another layout \(model.safetensors\).*`sam3-jax convert ")
  refused(made.parent, f"{made.parent} is not a checkpoint, but {made} is; use that")
  (tmp_path / "sam3.pt").write_bytes(b"")
  refused(
    tmp_path / "sam3.pt", "is a file, but a checkpoint is a directory; .*convert it: `sam3-jax"
  )


def test_checksum_of_the_fingerprint(copy):
  flip(copy / fingerprint.FILE)
  refused(copy, "fingerprint.json differs from its checksum")
