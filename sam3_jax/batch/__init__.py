"""Batch inference: segments any number of images, or tracks phrases through any number of videos,
into part files, and resumes after any failure.

The list of inputs is frozen when the job begins and is cut into parts of equal size. One process
does a part on its own devices, in batches that depend on the part alone. The bytes of a part are
therefore the same, whichever process does it and whenever. Process i of n takes the unfinished ones
of the parts i, i + n, i + 2 n, ..., each under a lease. No process waits for another. A job may be
resumed with a different number of processes, and processes started with the same number divide the
work between them.

  OUT/
    job.json                   the job: its input lists, part size, checkpoint and settings; created
                               once, and later runs must match it
    job.2.json ...             the job extended by --add; the last file counts
    inputs-0123456789ab.jsonl  an input list: name, size and time of each image, where it is in its
                               file, and a digest of its prompts
    leases/part-000012.*       which process holds a part, and which images it is reading
    parts/part-000012.jsonl    a line for each input that is done, in the order of the list
    parts/part-000012.json     the manifest; a part with a manifest is done
    parts/part-000012.begun.*  the same two files of an unfinished part: its process had to stop, or
                               images could not be read
    errors.jsonl               a line for each input that failed: {"input", "image", "reason"}
    annotations.json           all parts as one COCO file, written by `--merge`

A line of a part holds the input's index in the list, the file that was read, and masks as COCO run
lengths:

  {"input": 3072, "image": "a/b.jpg", "width": 640, "height": 480,
   "file": {"size": 81234, "modified": 1700000000000000000, "sha256": "..."}, "prompts": [
    {"text": "cat", "boxes": [], "box_labels": [], "instances": [
      {"id": 7, "score": 0.91, "bbox": [x, y, w, h], "area": 812, "segmentation": {...}}]},
    {"text": null, "concept": "cells.safetensors", "sha256": "...", "instances": [...]},
    {"points": [[x, y]], "point_labels": [1], "box": null, "visual": true, "instances": [...]}]}

A manifest describes the inputs that begin at index `first`:

  {"format_version": 2, "job": "...", "part": 12, "first": 3072, "inputs": 256, "done": 255,
   "failed": [{"input": 3100, "image": "a/c.jpg", "reason": "...", "identity": {...}}],
   "files_sha256": "...", "bytes": 81234, "sha256": "..."}

`job` is a digest of everything that determines the part: the settings, its list and the lists
before it. `files_sha256` is a digest of all image files that were read for the part.

A job of videos has the same files. In its lists and failures the key "image" is "video"; the record
of a video is several lines, see `video_records`; and `--merge` writes YouTube-VIS's format, see
`merge_videos`.

In a bucket, the records of a part are an object whose name has a digest of its content,
`parts/part-000012.0123456789abcdef.jsonl`, and the manifest names it as `records`. There is no
journal beside a lease.

Local files are written under a temporary name (`.NAME.PROCESS.partial`), synced and renamed.
Temporary files of a killed process are removed when its part is processed again.
"""
