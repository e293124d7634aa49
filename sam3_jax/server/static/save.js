// Saves results as files: COCO JSON, one PNG for each mask in a zip archive, the overlay.

import { toCoco } from "./coco.js";
import { download } from "./dom.js";
import { drawInstances, drawLabel } from "./painter.js";
import { bounds, decodeRuns, rasterize } from "./rle.js";
import { visibleInstances } from "./viewer.js";
import { zip } from "./zip.js";

const LONGEST = 8192; // pixels of an overlay's longer side

const stem = (name) => name.replace(/\.[^.]*$/, "") || "image";

export function saveCoco(state, image, model) {
  const text = `${JSON.stringify(toCoco(state, image, model))}\n`;
  download(new Blob([text], { type: "application/json" }), `${stem(image.name)}.sam3.json`);
}

export async function saveMasks(state, image) {
  const files = [];
  const instances = visibleInstances(state);
  for (const [i, { name, mask }] of instances.entries()) {
    const number = String(i + 1).padStart(String(instances.length).length, "0");
    const safe = name.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "instance";
    files.push({ name: `${number}-${safe}.png`, bytes: await maskPng(mask) });
  }
  download(zip(files), `${stem(image.name)}.masks.zip`);
}

/** A mask as PNG of the image's size: white inside, black outside. */
async function maskPng(mask) {
  const [height, width] = mask.size;
  const runs = decodeRuns(mask);
  const [x0, y0, x1, y1] = bounds(runs, height);
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { alpha: false });
  context.fillRect(0, 0, width, height);
  if (x1 > x0) {
    const grid = rasterize(runs, height, [x0, y0, x1, y1], x1 - x0, y1 - y0);
    const pixels = new ImageData(x1 - x0, y1 - y0);
    const words = new Uint32Array(pixels.data.buffer);
    for (let i = 0; i < grid.length; i++) words[i] = grid[i] ? 0xffffffff : 0xff000000;
    context.putImageData(pixels, x0, y0);
  }
  const blob = await canvas.convertToBlob({ type: "image/png" });
  return new Uint8Array(await blob.arrayBuffer());
}

export async function saveOverlay(state, image) {
  const [width, height] = image.size;
  const scale = Math.min(1, LONGEST / Math.max(width, height));
  const canvas = new OffscreenCanvas(Math.round(width * scale), Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.scale(scale, scale);
  context.drawImage(image.full, 0, 0, width, height);
  const unit = Math.max(1, Math.sqrt(width * height) / 700);
  const instances = visibleInstances(state);
  const { opacity, outlines } = state.view;
  drawInstances(context, instances, { opacity, outlines, unit });
  for (const one of instances) drawLabel(context, one, { unit, width });
  download(await canvas.convertToBlob({ type: "image/png" }), `${stem(image.name)}.sam3.png`);
}
