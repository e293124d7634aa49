"""Jobs whose images and results are in a bucket give the same dataset as local jobs.

The servers are local, see object_servers.py.
"""

import dataclasses
import json
import os
import tempfile

import batch_runs
import batches
import object_servers
import pytest
from batches import MODEL, QUIET, job
from rich.console import Console

from sam3_jax.batch import job_files
from sam3_jax.batch.merge import merge
from sam3_jax.batch.part_files import manifest_path
from sam3_jax.batch.run import run
from sam3_jax.cli.main import main
from sam3_jax.inference.predictor import Sam3
from sam3_jax.storage.object_lease import open_lease
from sam3_jax.storage.objects import ObjectPath
from sam3_jax.utils import lease

stub, images, undisturbed = batch_runs.stub, batch_runs.images, batch_runs.undisturbed
OUT = "gs://bucket/out"
MERGED = ("annotations.json", "errors.jsonl")


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
  monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
  return tmp_path / f"sam3-jax-{os.getuid()}"


@pytest.fixture
def faults(images, monkeypatch):
  """A bucket with the images, behind a server that makes faults."""
  proxy = object_servers.Faults()
  with object_servers.cloud_storage(monkeypatch, faults=proxy) as server:
    proxy.server = server
    for path in images.iterdir():
      server.put(f"images/{path.name}", path.read_bytes(), {})
    yield proxy


def in_bucket(out=OUT, **settings):
  return job("gs://bucket/images", out, **settings)


def outputs(server, prefix="out/") -> dict[str, bytes]:
  return {
    name.removeprefix(prefix): data
    for name, (_, data) in server.objects.items()
    if name.startswith(prefix)
  }


def check(server, undisturbed) -> None:
  """Merges the job and compares it with the local one."""
  merge(ObjectPath(OUT))
  found = outputs(server)
  for name in MERGED:
    assert found[name] == undisturbed[name]
  leases = [name for name in found if name.startswith("leases/")]
  begun = [name for name in found if ".begun." in name]
  assert not leases + begun


def test_a_job_in_a_bucket(faults, undisturbed, scratch):
  assert run(in_bucket(), MODEL, QUIET, QUIET)
  check(faults.server, undisturbed)
  found = outputs(faults.server)
  manifest = json.loads(found["parts/part-000001.json"])
  records = found[f"parts/{manifest['records']}"]
  assert len(records) == manifest["bytes"]
  assert len(found) == 3 + 1 + 2 * 6  # with the list of inputs
  assert not list(scratch.rglob("*.*"))


@pytest.mark.slow
def test_records_hold_versions(faults, undisturbed):
  run(in_bucket(), MODEL, QUIET, QUIET)
  (record, *_) = job_files.read_records(ObjectPath(OUT), 0)
  assert set(record["file"]) == {"size", "modified", "sha256", "version"}
  assert record["file"]["modified"] == 0
  local = json.loads(undisturbed["parts/part-000000.jsonl"].splitlines()[0])
  assert record["file"]["sha256"] == local["file"]["sha256"]
  del record["file"], local["file"]
  assert record == local


@pytest.mark.slow
def test_the_merged_file_of_local_results_is_the_same(faults, undisturbed, tmp_path):
  assert run(in_bucket(tmp_path / "out"), MODEL, QUIET, QUIET)
  merge(tmp_path / "out")
  assert (tmp_path / "out" / "annotations.json").read_bytes() == undisturbed["annotations.json"]


def test_a_stopped_job_resumes(faults, undisturbed):
  begun = set()
  for stop in (1, 1, 2, 1, 3):
    batches.Engine.started = 0
    run(in_bucket(), MODEL, QUIET, QUIET, lambda stop=stop: batches.Engine.started >= stop)
    begun |= {name for name in outputs(faults.server) if ".begun." in name}
  assert len(begun) > 2
  assert run(in_bucket(), MODEL, QUIET, QUIET)
  check(faults.server, undisturbed)


@pytest.mark.slow
def test_processes_share_a_job(faults, undisturbed):
  for process in (1, 0, 2):
    assert run(in_bucket(process=process, processes=3), MODEL, QUIET, QUIET)
  check(faults.server, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_faults_change_nothing(faults, undisturbed, seed):
  faults.random.seed(seed)
  faults.rate = 0.2
  assert run(in_bucket(), MODEL, QUIET, QUIET)
  faults.rate = 0.0
  assert faults.faults > 5
  check(faults.server, undisturbed)


@pytest.mark.slow
def test_late_listings(faults, undisturbed):
  """Listings show objects as they were an hour ago."""
  job_now = in_bucket()
  faults.server.lag = 3600.0
  with pytest.raises(FileNotFoundError):
    in_bucket()
  assert run(job_now, MODEL, QUIET, QUIET)
  assert run(job_now, MODEL, QUIET, QUIET)
  check(faults.server, undisturbed)


def test_all_processes_use_the_first_list(faults, undisturbed):
  """Images are added while the processes of a job start; --add adds them."""
  first = in_bucket(process=0, processes=2)
  faults.server.put("images/005-new.png", b"", {})
  gone = faults.server.objects.pop("images/003.png")
  second = in_bucket(process=1, processes=2)
  assert [one.name for one in first.inputs] != [one.name for one in second.inputs]
  faults.server.objects["images/003.png"] = gone
  said = Console(record=True, width=200)
  assert run(first, MODEL, QUIET, QUIET)
  assert run(second, MODEL, said, said)
  assert "1 image is not in the list of the job; add --add" not in said.export_text()
  third = Console(record=True, width=200)
  assert run(in_bucket(), MODEL, third, third)
  assert "1 image is not in the list of the job; add --add to process them" in third.export_text()
  check(faults.server, undisturbed)
  assert run(in_bucket(add=True), MODEL, QUIET, QUIET)
  merge(ObjectPath(OUT))
  assert b"005-new.png" in outputs(faults.server)["errors.jsonl"]


def test_changed_objects_are_named(faults):
  run(in_bucket(), MODEL, QUIET, QUIET)
  data = faults.server.objects["images/003.png"][1]
  faults.server.put("images/003.png", data, {})  # another version of the same content
  assert run(in_bucket(), MODEL, QUIET, QUIET)
  faults.server.put("images/003.png", data[:-1] + b"x", {})
  with pytest.raises(ValueError, match=r"1 file modified \(003.png\)"):
    run(in_bucket(), MODEL, QUIET, QUIET)


@pytest.mark.slow
def test_failed_images_are_processed_again(faults, images, undisturbed):
  del faults.server.objects["images/011-text.jpg"]
  good = (images / "012.png").read_bytes()
  faults.server.put("images/011-text.jpg", good, {})
  run(in_bucket(), MODEL, QUIET, QUIET)
  faults.server.put("images/022-cut.png", good, {})
  with pytest.raises(ValueError, match=r"1 image that failed \(022-cut.png\) changed since"):
    run(in_bucket(), MODEL, QUIET, QUIET)
  assert run(in_bucket(retry_failed=True), MODEL, QUIET, QUIET)
  assert merge(ObjectPath(OUT))["failed"] == 1
  assert not any(".begun." in name for name in outputs(faults.server))


@pytest.mark.slow
def test_leases_of_other_machines(faults, undisturbed):
  """A lease is respected while its holder renews it, and taken over afterwards."""
  holder = dataclasses.replace(lease.Holder.this_process(), system="another machine")
  content = json.dumps(dataclasses.asdict(holder) | {"renewed": 0}).encode()
  name = "out/leases/part-000001.lease"
  faults.server.put(name, content, {})
  said = Console(record=True, width=200)
  assert not run(in_bucket(), MODEL, QUIET, said)
  assert "1 part is being processed by another process" in said.export_text()
  assert faults.server.objects[name][1] == content
  faults.server.updated[name] -= lease.STALE + 10
  assert run(in_bucket(), MODEL, QUIET, QUIET)
  check(faults.server, undisturbed)


def test_leases_are_renewed_and_lost(faults):
  path = ObjectPath("gs://bucket/a.lease")
  first, second = open_lease(path), open_lease(path)
  assert first.acquire()
  assert not second.acquire()
  before = path.entry()
  first.renew()
  assert first.held
  assert path.entry().version != before.version
  path.write(b"damaged")
  faults.server.updated["a.lease"] -= lease.STALE + 10
  assert second.acquire()
  first.renew()
  assert not first.held
  first.release()  # not the lease of the other one
  assert second.held
  second.release()
  assert not path.exists()


def test_a_part_that_another_process_finished_is_kept(faults, undisturbed):
  """A process is suspended, and another takes its lease over and finishes the part."""
  first = in_bucket()
  original = batches.Engine.start

  def start(self, slots):
    if batches.Engine.started == 1:
      batches.Engine.started += 1
      faults.server.objects.pop("out/leases/part-000000.lease")
      run(in_bucket(processes=6), MODEL, QUIET, QUIET)
      assert "out/parts/part-000000.json" in faults.server.objects
    return original(self, slots)

  batches.Engine.started = 0
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batches.Engine, "start", start)
    run(first, MODEL, QUIET, QUIET)
  assert run(in_bucket(), MODEL, QUIET, QUIET)
  check(faults.server, undisturbed)


def test_the_summary_counts_requests(faults):
  said = Console(record=True, width=200)
  job_now, faults.paths = in_bucket(), "images%2F"
  faults.plan.extend([None, "503", "503"])
  run(job_now, MODEL, said, QUIET)
  line = next(line for line in said.export_text().splitlines() if line.startswith("storage: "))
  assert line.startswith("storage: 28 requests for images (1.08 per image, 2 repeated), ")


@pytest.fixture
def command(monkeypatch, faults):
  """The command `batch`, whose engine needs no model."""
  monkeypatch.setattr(Sam3, "from_checkpoint", lambda *_, **__: MODEL)
  return ["batch", "--images", "gs://bucket/images", "--prompts", "cat, dog", "--out", OUT]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "count"), [("coco", 0), ("labelme", 23)])
def test_the_command(command, capsys, faults, undisturbed, layout, count):
  options = ["--max-error-rate", "1", "--part-size", "5", "--batch-images", "2"]
  assert main([*command, *options]) == 0
  assert "storage: 26 requests for images" in capsys.readouterr().out
  assert main(["batch", "--merge", "--out", OUT, "--to", layout]) == 0
  out, _ = capsys.readouterr()
  assert out.startswith(f"{OUT}/annotations.json: 23 images, ")
  found = outputs(faults.server)
  assert found["annotations.json"] == undisturbed["annotations.json"]
  assert sum("labelme" in name for name in found) == count


@pytest.mark.parametrize(
  ("typed", "message"),
  [
    (["--out", "hf://datasets/a/b"], "hf://datasets/a/b@main is read only; choose a directory, gs"),
    (["--out", "gs://other/x"], "there is no bucket other; check its name; check --out."),
    (["--out", "ftp://other/x"], "ftp://other/x has an unsupported scheme; give a local path"),
    (["--images", "https://host/a.jpg?key=abc"], "https://host/a.jpg is on a web server; add --al"),
    (["--prompts", "https://host/a.txt?key=abc"], "https://host/a.txt is on a web server; add"),
    (["--concept", "gs://bucket/none"], "there is no file of a concept gs://bucket/none; check"),
    (["--images", "gs://other/x"], "gs://other/x: there is no bucket other; check its name"),
    (
      ["--prompts", "gs://bucket/none.txt"],
      "gs://bucket/none.txt cannot be read (there is no such",
    ),
    (["--images", "gs://bucket/images/*.txt"], "there is no image in gs://bucket/images/*.txt"),
  ],
)
def test_errors_are_one_line(command, capsys, typed, message, faults):
  assert main([*command, *typed]) == 2
  out, err = capsys.readouterr()
  assert out == ""
  assert message in err
  assert err.count("\n") == 1
  assert "abc" not in err
  assert not outputs(faults.server)


def test_an_outage_can_be_resumed(command, capsys, faults, undisturbed):
  """Exit status 75, whatever was read or written."""
  options = ["--max-error-rate", "1", "--part-size", "5", "--batch-images", "2"]
  for path in ("/o?prefix=images", "out%2Fjob.json", "name=out%2Fleases", "name=out%2Fparts"):
    faults.paths = path
    faults.plan.extend(["503"] * 12)
    assert main([*command, *options]) == 75
    err = capsys.readouterr().err
    assert "the server limits the rate of requests (HTTP 503)" in err
    assert "rerun the same command" in err.lower()
    faults.plan.clear()
  assert main([*command, *options]) == 0
  check(faults.server, undisturbed)


def test_merging_nothing(capsys, faults):
  assert main(["batch", "--merge", "--out", OUT]) == 2
  assert "there are no results in gs://bucket/out; run batch with this" in capsys.readouterr().err


@pytest.mark.slow
def test_permission_to_write_is_missing(faults):
  faults.server.denied = ("out/parts",)
  with pytest.raises(ValueError, match=r"gs://bucket/out/parts/part-000000.*permission is denied"):
    run(in_bucket(), MODEL, QUIET, QUIET)
  faults.server.denied = ()
  assert run(in_bucket(), MODEL, QUIET, QUIET)


@pytest.mark.slow
def test_manifests_are_created_once(faults):
  run(in_bucket(), MODEL, QUIET, QUIET)
  path = manifest_path(ObjectPath(OUT), 0)
  generation = faults.server.objects["out/parts/part-000000.json"][0]
  assert run(in_bucket(), MODEL, QUIET, QUIET)
  assert faults.server.objects["out/parts/part-000000.json"][0] == generation
  assert path.exists()
