"""Batch inference: a data set of any size in, part files out, nothing lost and nothing done twice.

The list of inputs is frozen when the job begins, and cut into parts of one size. A part is done by
one process on its own devices, in batches that depend on the part alone; so its bytes are the same,
whoever does it and when. Process i of n does the parts i, i + n, i + 2 n ... that are not done yet,
each under a lease: no process waits for another, a job may be resumed with another number of them,
and two that were started with the same number share the work.

  OUT/
    job.json                   of what the job is: its lists, size of a part, checkpoint, settings;
                               created once, and whoever comes later must want the same
    job.2.json ...             the same with what --add added; the last one counts
    inputs-0123456789ab.jsonl  a list: each image's name, size and time, and a digest of its prompts
    leases/part-000012.*       who is doing a part, and which images of it are being read
    parts/part-000012.jsonl    a line for each input that was done, in the list's order
    parts/part-000012.json     its manifest; a part is done once this is there
    parts/part-000012.begun.*  the same two of a part that is not done: its process had to stop, or
                               images could not be read
    errors.jsonl               a line for each input that failed: {"input", "image", "reason"}
    annotations.json           all of it as one COCO file, after `--merge`

A line of a part, with the input's index in the list, which file was read, and COCO's run lengths:

  {"input": 3072, "image": "a/b.jpg", "width": 640, "height": 480,
   "file": {"size": 81234, "modified": 1700000000000000000, "sha256": "..."}, "prompts": [
    {"text": "cat", "boxes": [], "box_labels": [], "instances": [
      {"id": 7, "score": 0.91, "bbox": [x, y, w, h], "area": 812, "segmentation": {...}}]},
    {"points": [[x, y]], "point_labels": [1], "box": null, "visual": true, "instances": [...]}]}

A manifest, of the inputs that begin at index first:

  {"format_version": 2, "job": "...", "part": 12, "first": 3072, "inputs": 256, "done": 255,
   "failed": [{"input": 3100, "image": "a/c.jpg", "reason": "...", "identity": {...}}],
   "files_sha256": "...", "bytes": 81234, "sha256": "..."}

`job` is a digest of what decides the part (settings, its list and the lists before it), and
`files_sha256` one of all files that were read for it.

Files are written under another name (`.NAME.PROCESS.partial`), synced and renamed; what a killed
process left of one goes when its part is done again.
"""
