"""Creates the sheet of drawings and the background photographs. Not needed for training.

  npm pack @iconify-json/noto @iconify-json/noto-v1 @iconify-json/fluent-emoji-flat \
    @iconify-json/twemoji
  for file in *.tgz; do mkdir -p ${file%-*} && tar xzf $file -C ${file%-*}; done
  pip install resvg-py scikit-image
  python sam3_jax/datasets/synthetic/drawings/make_sheet.py .

Concepts are read from concepts.tsv and new.tsv beside this file.
"""

import io
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

HERE = Path(__file__).parent
CELL = 128  # pixels of a drawing's longer side
COLUMNS = 13
RENDERED = 512  # width in pixels before a drawing is cropped and reduced
FAINT = 12  # borders with at most this alpha are cropped
PACKAGES = {
  "noto": "iconify-json-noto",
  "noto-v1": "iconify-json-noto-v1",
  "fluent": "iconify-json-fluent-emoji-flat",
  "twemoji": "iconify-json-twemoji",
}
# Crops of scikit-image's images: left, top, right, bottom. None shows a concept. Other images do or
# might (chelsea is a cat, astronaut has a rocket, camera a camera, hubble stars), or do not state
# their licence.
PHOTOGRAPHS = {
  "brick.png": (0, 0, 512, 512),
  "coffee.png": (0, 0, 600, 400),
  "coins.png": (0, 0, 384, 303),
  "grass.png": (0, 0, 512, 512),
  "gravel.png": (0, 0, 512, 512),
  "ihc.png": (0, 0, 512, 512),
  "retina.jpg": (300, 300, 1100, 1100),
}
PHOTOGRAPH = 320  # pixels of a photograph's longer side


def main(packages: Path) -> None:
  parts = [drawn(packages, HERE / file) for file in ("concepts.tsv", "new.tsv")]
  cells = [one for _, styles in parts for style in styles.values() for one in style]
  sheet = Image.new("RGBA", (COLUMNS * CELL, -(-len(cells) // COLUMNS) * CELL))
  for number, drawing in enumerate(cells):
    sheet.paste(drawing, (number % COLUMNS * CELL, number // COLUMNS * CELL))
  sheet.save(HERE / "sheet.webp", lossless=True, quality=100, method=6)
  known, new = (
    {"concepts": names, "sizes": {style: [one.size for one in styles[style]] for style in styles}}
    for names, styles in parts
  )
  index = {"cell": CELL, "columns": COLUMNS, **known, "new": new}
  (HERE / "sheet.json").write_text(json.dumps(index) + "\n")
  photographs()


def drawn(packages: Path, file: Path) -> tuple[list[str], dict[str, list[Image.Image]]]:
  """Names of the concepts in a file, and each artist's drawings of them."""
  lines = file.read_text().splitlines()
  names = [line.split("\t")[0] for line in lines if not line.startswith("#")]
  return names, {style: drawings(packages / folder, names) for style, folder in PACKAGES.items()}


def drawings(package: Path, names: list[str]) -> list[Image.Image]:
  """The drawings of a package, tightly cropped, with a longer side of `CELL` pixels."""
  [file] = package.rglob("icons.json")
  icons = json.loads(file.read_text())
  return [reduced(render(icons, name)) for name in names]


def render(icons: dict[str, Any], name: str) -> Image.Image:
  import resvg_py  # pyright: ignore[reportMissingImports]

  icon = icons["icons"][name]
  left, top = icon.get("left", 0), icon.get("top", 0)
  width, height = (icon.get(key, icons.get(key, 16)) for key in ("width", "height"))
  svg = (
    '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
  )
  png = resvg_py.svg_to_bytes(
    svg_string=svg, width=RENDERED, height=round(RENDERED * height / width)
  )
  return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def reduced(drawing: Image.Image) -> Image.Image:
  drawn = drawing.getchannel("A").point([255 * (alpha > FAINT) for alpha in range(256)])
  drawing = drawing.crop(drawn.getbbox())
  scale = CELL / max(drawing.size)
  width, height = (max(1, round(side * scale)) for side in drawing.size)
  return drawing.resize((width, height), Image.Resampling.LANCZOS)


def photographs() -> None:
  import skimage.data

  (HERE / "photographs").mkdir(exist_ok=True)
  for name, cut in PHOTOGRAPHS.items():
    with Image.open(Path(skimage.data.__file__).parent / name) as image:
      image = image.convert("L" if image.mode == "L" else "RGB").crop(cut)
    image.thumbnail((PHOTOGRAPH, PHOTOGRAPH), Image.Resampling.LANCZOS)
    image.save(HERE / "photographs" / f"{Path(name).stem}.jpg", quality=80, optimize=True)


if __name__ == "__main__":
  main(Path(sys.argv[1]))
