// Outlines of masks as paths, which stay sharp at every zoom.

const STEPS = [
  [1, 0],
  [0, 1],
  [-1, 0],
  [0, -1],
]; // right, down, left, up

/**
 * Traces the borders of the inside of a grid.
 *
 * The grid has `width` x `height` values, row by row; 1 is inside. Returns closed rings
 * [x0, y0, x1, y1, ...] in the grid's units through the middles of the pixels' edges, which cuts
 * the corners of staircases. Outer rings run clockwise, holes the other way, so both fill rules
 * work. Pixels that touch only at a corner belong to different rings.
 */
export function trace(grid, width, height) {
  const across = width + 1;
  const edges = new Uint8Array(across * (height + 1)); // one bit per direction that leaves a corner
  const inside = (x, y) => x >= 0 && y >= 0 && x < width && y < height && grid[y * width + x] === 1;
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (grid[y * width + x] !== 1) continue;
      const corner = y * across + x;
      if (!inside(x, y - 1)) edges[corner] |= 1;
      if (!inside(x + 1, y)) edges[corner + 1] |= 2;
      if (!inside(x, y + 1)) edges[corner + across + 1] |= 4;
      if (!inside(x - 1, y)) edges[corner + across] |= 8;
    }
  }
  const rings = [];
  for (let start = 0; start < edges.length; start++) {
    while (edges[start] & 1) rings.push(follow(edges, across, start));
  }
  return rings;
}

/** Follows one border from a corner, whose edge to the right it takes first, and removes it. */
function follow(edges, across, start) {
  const ring = [];
  let [corner, direction, turned] = [start, 0, true];
  do {
    edges[corner] &= ~(1 << direction);
    const [dx, dy] = STEPS[direction];
    const [x, y] = [corner % across, Math.floor(corner / across)];
    const next = corner + dx + dy * across;
    // Turning right first keeps to the same pixel where two touch at a corner.
    const turn = [1, 0, 3].find((one) => edges[next] & (1 << ((direction + one) % 4)));
    if (turned || turn !== 0) ring.push(x + dx / 2, y + dy / 2);
    turned = turn !== 0;
    if (turn === undefined) break;
    direction = (direction + turn) % 4;
    corner = next;
  } while (corner !== start || edges[start] & (1 << direction));
  return ring;
}

/** A Path2D of rings, scaled and moved. */
export function toPath(rings, [x0, y0], [sx, sy]) {
  const path = new Path2D();
  for (const ring of rings) {
    for (let i = 0; i < ring.length; i += 2) {
      const [x, y] = [x0 + ring[i] * sx, y0 + ring[i + 1] * sy];
      if (i) path.lineTo(x, y);
      else path.moveTo(x, y);
    }
    path.closePath();
  }
  return path;
}
