"""Segments a directory of images with Ray Data, which reads, retries, scales and writes.

  pip install ".[ray]"
  python examples/ray_batch.py images out --prompts "cat, dog" --workers 2

On a cluster, start it where `ray.init()` finds the cluster, and give the resources of a worker:
`--resource TPU=4` for a TPU host, `--resource GPU=1` for a GPU. The output is Parquet with the
columns path, record (JSON as in a part of `sam3-jax batch`) and error.
"""

import argparse

from sam3_jax.batch.segmenter import Segmenter


def segment(images: str, out: str, *, workers: int, resources: dict[str, float], **settings) -> int:
  """Segments a directory of images and writes the results as Parquet files.

  Args:
    images: input directory.
    out: output directory.
    workers: number of actors, each with a model.
    resources: resources of an actor, by Ray's names.
    settings: arguments of `Segmenter`.

  Returns:
    The number of failed images.
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
    max_restarts=-1,  # a lost actor is restarted,
    max_task_retries=-1,  # and its blocks are repeated
    **({"resources": others} if others else {}),
  ).materialize()
  found.write_parquet(out)
  return found.filter(lambda row: bool(row["error"])).count()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("images", help="directory of images")
  parser.add_argument("out", help="directory for Parquet files")
  parser.add_argument("--prompts", required=True, help="phrases separated by commas")
  parser.add_argument("--checkpoint", default="sam3-tiny")
  parser.add_argument("--threshold", type=float, default=0.5)
  parser.add_argument("--workers", type=int, default=2, help="number of actors")
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
