// COCO's run-length encoding of masks: runs go down the columns, and the first run is background.
//
// A mask is {size: [height, width], counts: "compressed runs"}, as in pycocotools and
// sam3_jax/outputs/rle.py. Runs are arrays of lengths that alternate between outside and inside.

/** The run lengths of a mask; throws an Error if they are damaged. */
export function decodeRuns({ size, counts }) {
  const runs = [];
  let total = 0;
  for (let i = 0; i < counts.length; ) {
    let value = 0;
    let shift = 0;
    for (let more = true; more; shift += 5) {
      const code = counts.charCodeAt(i++) - 48;
      if (!(code >= 0 && code < 64) || shift > 30) throw new Error("the mask's runs are damaged");
      value += (code & 31) * 2 ** shift;
      more = code > 31;
      if (!more && code & 16) value -= 2 ** (shift + 5);
    }
    // From the fourth run on, a value is the difference to the run before the previous one.
    if (runs.length > 2) value += runs[runs.length - 2];
    if (value < 0) throw new Error("the mask's runs are damaged");
    total += value;
    runs.push(value);
  }
  if (total !== size[0] * size[1]) {
    throw new Error(`the mask's runs cover ${total} pixels, not ${size[1]} x ${size[0]}`);
  }
  return Uint32Array.from(runs);
}

/** COCO's compressed string of run lengths. */
export function encodeRuns(runs) {
  let text = "";
  for (let i = 0; i < runs.length; i++) {
    let value = i > 2 ? runs[i] - runs[i - 2] : runs[i];
    for (let more = true; more; ) {
      let code = value & 31;
      value >>= 5;
      more = code & 16 ? value !== -1 : value !== 0;
      if (more) code |= 32;
      text += String.fromCharCode(code + 48);
    }
  }
  return text;
}

/** The end of each run, for `contains`. */
export function runEnds(runs) {
  const ends = new Uint32Array(runs.length);
  let end = 0;
  for (let i = 0; i < runs.length; i++) ends[i] = end += runs[i];
  return ends;
}

/** Whether the pixel at x, y is inside the mask with these run ends and this height. */
export function contains(ends, height, x, y) {
  const position = x * height + y;
  let low = 0;
  let high = ends.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ends[middle] <= position) low = middle + 1;
    else high = middle;
  }
  return low < ends.length && low % 2 === 1;
}

/** The number of pixels inside. */
export function area(runs) {
  let sum = 0;
  for (let i = 1; i < runs.length; i += 2) sum += runs[i];
  return sum;
}

/** The box [x0, y0, x1, y1] around the pixels inside; zeros if there are none. */
export function bounds(runs, height) {
  let [x0, y0, x1, y1] = [Infinity, Infinity, 0, 0];
  let position = 0;
  for (let i = 0; i < runs.length; i++) {
    if (i % 2 && runs[i]) {
      const last = position + runs[i] - 1;
      const [left, right] = [Math.floor(position / height), Math.floor(last / height)];
      x0 = Math.min(x0, left);
      x1 = Math.max(x1, right + 1);
      y0 = left === right ? Math.min(y0, position % height) : 0;
      y1 = left === right ? Math.max(y1, (last % height) + 1) : height;
    }
    position += runs[i];
  }
  return x1 ? [x0, y0, x1, y1] : [0, 0, 0, 0];
}

/** The runs of the union of two masks of the same size. */
export function union(a, b) {
  const runs = [];
  let inside = false;
  let length = 0;
  const next = [a, b].map((source) => ({ source, index: 0, left: source[0] ?? 0 }));
  const skip = (one) => {
    while (one.left === 0 && one.index < one.source.length - 1) one.left = one.source[++one.index];
  };
  for (;;) {
    next.forEach(skip);
    const step = Math.min(next[0].left, next[1].left);
    if (!step) break;
    const now = next[0].index % 2 === 1 || next[1].index % 2 === 1;
    if (now !== inside) {
      runs.push(length);
      length = 0;
      inside = now;
    }
    length += step;
    for (const one of next) one.left -= step;
  }
  runs.push(length);
  return Uint32Array.from(runs);
}

/** A mask from runs. */
export const fromRuns = (runs, size) => ({ size: [...size], counts: encodeRuns(runs) });

/**
 * Samples a mask within a box on a grid: 1 for inside.
 *
 * `box` is [x0, y0, x1, y1] in whole pixels; the grid has `width` x `height` samples of it, row by
 * row. Costs one step per run and per sample inside, whatever the size of the image.
 */
export function rasterize(runs, imageHeight, box, width, height) {
  const grid = new Uint8Array(width * height);
  const [x0, y0, x1, y1] = box;
  const [dx, dy] = [(x1 - x0) / width, (y1 - y0) / height];
  const rowAfter = (y) => Math.max(0, Math.min(height, Math.ceil((y - y0) / dy - 0.5)));
  const columnAfter = (x) => Math.max(0, Math.min(width, Math.ceil((x - x0) / dx - 0.5)));
  let position = 0;
  for (let i = 0; i < runs.length; position += runs[i++]) {
    if (i % 2 === 0 || !runs[i]) continue;
    const end = position + runs[i];
    const first = Math.floor(position / imageHeight);
    const last = Math.floor((end - 1) / imageHeight);
    for (let column = columnAfter(first); column < columnAfter(last + 1); column++) {
      const start = Math.floor(x0 + (column + 0.5) * dx) * imageHeight;
      const top = rowAfter(Math.max(position - start, 0));
      const bottom = rowAfter(Math.min(end - start, imageHeight));
      for (let row = top; row < bottom; row++) grid[row * width + column] = 1;
    }
  }
  return grid;
}
