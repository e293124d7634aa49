"""Draws docs/layers.svg from the layers contract: `python docs/hooks/layers.py`."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SVG_FILE = ROOT / "docs" / "layers.svg"
TEXTS = {
  "cli": "the command line: options in, exit status out",
  "server": "the page, the HTTP API, label tools",
  "training": "losses, matchers, the loop, LoRA, FSDP",
  "evaluation": "cgF1, average precision, visual prompts, J&amp;F of videos",
  "batch": "datasets of any size, resumable parts",
  "datasets": "annotation files, synthetic scenes, still and moving",
  "compat": "KerasHub's class",
  "export": "StableHLO, ONNX",
  "inference": "Sam3, video sessions, jitted programs, sharding",
  "registry": "names, paths, hf:// and gs:// to checkpoints",
  "converters": "other layouts to checkpoints and back",
  "checkpoint": "checkpoints: open, check, load, write",
  "outputs": "instances, masks, run lengths, COCO JSON, tracks, drawing",
  "inputs": "images, videos, resize, tokenizer, prompts",
  "model": "the network in Flax Linen, without I/O",
  "ops": "attention, boxes, ROI align: pure functions",
  "types": "the pytrees between the parts",
  "config": "sizes of the model",
  "rules": "thresholds of tracking in video",
  "storage": "objects in buckets and on web servers",
  "utils": "files, console, validation",
}
WIDTH, ROW, GAP, MARGIN = 760, 34, 6, 16


def layers() -> list[list[str]]:
  """The layers from top to bottom; several names in one layer may not import each other."""
  contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
  [contract] = [one for one in contracts["contracts"] if one["type"] == "layers"]
  return [
    [name.strip(" ()").removeprefix("sam3_jax.") for name in layer.split("|")]
    for layer in contract["layers"]
  ]


def draw(rows: list[list[str]]) -> str:
  """The layers as SVG: a box for each package, an arrow for the direction of imports."""
  height = 2 * MARGIN + len(rows) * (ROW + GAP)
  parts = [
    f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
    'font-family="system-ui, sans-serif" font-size="14">',
    f'<rect width="{WIDTH}" height="{height}" fill="#ffffff" rx="10"/>',
  ]
  for i, names in enumerate(rows):
    y, wide = MARGIN + i * (ROW + GAP), (WIDTH - 90 - (len(names) - 1) * GAP) / len(names)
    for j, name in enumerate(names):
      x = 70 + j * (wide + GAP)
      parts.append(
        f'<rect x="{x:g}" y="{y}" width="{wide:g}" height="{ROW}" rx="6" fill="#dbeafe" '
        f'stroke="#2563eb"/><text x="{x + 12:g}" y="{y + 22}" fill="#1f2328">'
        f'<tspan font-weight="600">{name}</tspan><tspan dx="10" fill="#57606a">{TEXTS[name]}'
        "</tspan></text>"
      )
  end = height - MARGIN - GAP
  parts.append(
    f'<path d="M40 {MARGIN} V{end - 10}" stroke="#57606a" stroke-width="2"/>'
    f'<path d="M34 {end - 12} L40 {end} L46 {end - 12} z" fill="#57606a"/>'
    f'<text transform="translate(28 {height // 2}) rotate(-90)" text-anchor="middle" '
    'fill="#57606a">imports</text></svg>'
  )
  return "\n".join(parts) + "\n"


if __name__ == "__main__":
  SVG_FILE.write_text(draw(layers()))
