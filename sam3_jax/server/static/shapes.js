// Masks as paths to draw and as runs to test points against; both are made once for each mask.

import { toPath, trace } from "./contour.js";
import { bounds, contains, decodeRuns, rasterize, runEnds } from "./rle.js";

const FINEST = 1024; // samples along the longer side of a mask's box

const shapes = new WeakMap(); // mask -> {path, ends, bounds}

/** The path, in pixels of the image, and the run ends of a mask. */
export function shapeOf(mask) {
  if (!shapes.has(mask)) shapes.set(mask, build(mask));
  return shapes.get(mask);
}

function build(mask) {
  const [imageHeight] = mask.size;
  const runs = decodeRuns(mask);
  const box = bounds(runs, imageHeight);
  const [x0, y0, x1, y1] = box;
  const factor = Math.min(1, FINEST / Math.max(x1 - x0, y1 - y0, 1));
  const [width, height] = [x1 - x0, y1 - y0].map((side) => Math.ceil(side * factor));
  const rings = width && height ? trace(rasterize(runs, imageHeight, box, width, height), width, height) : [];
  const path = toPath(rings, [x0, y0], [(x1 - x0) / width, (y1 - y0) / height]);
  return { path, ends: runEnds(runs), bounds: box };
}

/** The smallest shown instance whose mask contains a point of the image, or null. */
export function instanceAt(instances, [u, v]) {
  const [x, y] = [Math.floor(u), Math.floor(v)];
  let hit = null;
  for (const one of instances) {
    const [height, width] = one.mask.size;
    if (x < 0 || y < 0 || x >= width || y >= height) continue;
    const { ends, bounds: [x0, y0, x1, y1] } = shapeOf(one.mask);
    if (x < x0 || x >= x1 || y < y0 || y >= y1 || !contains(ends, height, x, y)) continue;
    if (!hit || one.area < hit.area) hit = one;
  }
  return hit;
}
