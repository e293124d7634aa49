"""Batch inference: a data set of any size in, part files out, nothing lost and nothing done twice.

The list of inputs is cut into parts of one size. A part is done by one process on its own devices,
in batches that depend on the part alone; so the same part comes out, to the byte, whoever does it
and when. Process i of n does the parts i, i + n, i + 2 n ... that are not done yet: no process
waits for another, and a job may go on with another number of them.

  OUT/
    job.json                   of what the job is: number and digest of the inputs, size of a part,
                               checkpoint, settings; whoever comes later must want the same
    parts/part-000012.jsonl    a line for each input that was done, in the list's order
    parts/part-000012.json     its manifest; a part is done once this is there
    parts/part-000012.begun.*  the same two of a part's beginning, when a process had to stop
    errors.jsonl               a line for each input that failed: {"input", "image", "reason"}
    annotations.json           all of it as one COCO file, after `--merge`

A line of a part, with the input's place in the list and COCO's run lengths:

  {"input": 3072, "image": "a/b.jpg", "width": 640, "height": 480, "prompts": [
    {"text": "cat", "boxes": [], "box_labels": [], "instances": [
      {"id": 7, "score": 0.91, "bbox": [x, y, w, h], "area": 812, "segmentation": {...}}]},
    {"points": [[x, y]], "point_labels": [1], "box": null, "visual": true, "instances": [...]}]}

A manifest, of the inputs first .. first + inputs - 1 of the list:

  {"format_version": 1, "part": 12, "first": 3072, "inputs": 256, "done": 255, "failed": [
    {"input": 3100, "image": "a/c.jpg", "reason": "..."}], "bytes": 81234, "sha256": "..."}

Files are written under another name (`.NAME.PROCESS.partial`), synced and renamed; what a killed
process left of one goes when its part is done again.
"""
