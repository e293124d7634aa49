"""Segments a folder with Ray Data: reading, retries, autoscaling and writing are Ray's.

  pip install ".[ray]"
  python examples/ray_batch.py images out --prompts "cat, dog" --workers 2

On a cluster, start it where `ray.init()` finds the cluster, and say what a worker holds:
`--resource TPU=4` for a whole TPU host, `--resource GPU=1` for a GPU. The output is Parquet: path,
record (JSON as in a part's file of `sam3-jax batch`), error.
"""

import argparse

from sam3_jax.batch.segmenter import Segmenter


def segment(images: str, out: str, *, workers: int, resources: dict[str, float], **settings) -> int:
  """Writes what is found in a folder of images to a folder of Parquet files.

  Args:
    images: the folder.
    out: another.
    workers: actors, each with a model.
    resources: that an actor holds, by Ray's names.
    settings: of `Segmenter`.

  Returns:
    How many images failed.
  """
  import ray

  files = ray.data.read_binary_files(images, include_paths=True)
  others = {name: count for name, count in resources.items() if name != "GPU"}
  found = files.map_batches(
    Segmenter,
    fn_constructor_kwargs=settings,
    batch_size=16,
    concurrency=workers,
    num_gpus=resources.get("GPU", 0),
    max_restarts=-1,  # an actor that is lost comes again,
    max_task_retries=-1,  # and does its blocks again
    **({"resources": others} if others else {}),
  ).materialize()
  found.write_parquet(out)
  return found.filter(lambda row: bool(row["error"])).count()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("images", help="folder of images")
  parser.add_argument("out", help="folder for Parquet files")
  parser.add_argument("--prompts", required=True, help="phrases with commas between them")
  parser.add_argument("--checkpoint", default="sam3-tiny")
  parser.add_argument("--threshold", type=float, default=0.5)
  parser.add_argument("--workers", type=int, default=2, help="actors")
  parser.add_argument("--resource", action="append", default=[], help="of an actor: GPU=1, TPU=4")
  arguments = parser.parse_args()
  resources = {
    name: float(value) for name, _, value in (r.partition("=") for r in arguments.resource)
  }
  failed = segment(
    arguments.images,
    arguments.out,
    workers=arguments.workers,
    resources=resources,
    prompts=[phrase.strip() for phrase in arguments.prompts.split(",")],
    checkpoint=arguments.checkpoint,
    threshold=arguments.threshold,
  )
  print(f"{arguments.out}: done, {failed} failed")


if __name__ == "__main__":
  main()
