// Where the image lies on the canvas: screen = image * scale + (x, y), in CSS pixels.

const MARGIN = 16; // CSS pixels around a fitted image
const MOST = 32; // CSS pixels per pixel of the image

export const toScreen = ({ scale, x, y }, [u, v]) => [u * scale + x, v * scale + y];

export const toImage = ({ scale, x, y }, [u, v]) => [(u - x) / scale, (v - y) / scale];

/** The whole image in the middle of the canvas; small images are enlarged up to 4 times. */
export function fit([width, height], [across, down]) {
  const free = [Math.max(1, across - 2 * MARGIN), Math.max(1, down - 2 * MARGIN)];
  const scale = Math.min(free[0] / width, free[1] / height, 4);
  return { scale, x: (across - width * scale) / 2, y: (down - height * scale) / 2 };
}

/** Zooms by a factor; the point at `center` on the screen stays where it is. */
export function zoomAt(transform, factor, center, image, canvas) {
  const least = Math.min(fit(image, canvas).scale, 1) / 2;
  const scale = Math.min(MOST, Math.max(least, transform.scale * factor));
  const [u, v] = toImage(transform, center);
  return keepInside({ scale, x: center[0] - u * scale, y: center[1] - v * scale }, image, canvas);
}

export const pan = (transform, dx, dy, image, canvas) =>
  keepInside({ ...transform, x: transform.x + dx, y: transform.y + dy }, image, canvas);

/** Keeps at least a part of the image on the canvas. */
function keepInside({ scale, x, y }, [width, height], [across, down]) {
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
  const [w, h] = [width * scale, height * scale];
  const edge = [Math.min(80, w, across), Math.min(80, h, down)];
  return {
    scale,
    x: clamp(x, edge[0] - w, across - edge[0]),
    y: clamp(y, edge[1] - h, down - edge[1]),
  };
}
