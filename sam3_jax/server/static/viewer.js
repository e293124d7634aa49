// The canvas: shows the image, its instances and prompts; zooms and pans.

import { allInstances, instancesOf } from "./instances.js";
import { drawBox, drawCursor, drawInstances, drawLabel, drawPoint } from "./painter.js";
import { instanceAt } from "./shapes.js";
import { fit, pan, toImage, toScreen, zoomAt } from "./transform.js";

const SMALL = 2048; // longer side of the copy that is drawn while zoomed out

export function createViewer(canvas, store) {
  const context = canvas.getContext("2d");
  let image = null; // {full, small, size: [width, height]}
  let transform = { scale: 1, x: 0, y: 0 };
  let size = [1, 1]; // of the canvas in CSS pixels
  let fitted = true;
  let frame = 0;
  let overlay = { box: null, cursor: null }; // a box while it is drawn, and the keyboard cursor

  new ResizeObserver(([{ contentRect: { width, height } }]) => {
    size = [Math.max(1, width), Math.max(1, height)];
    canvas.width = Math.round(size[0] * devicePixelRatio);
    canvas.height = Math.round(size[1] * devicePixelRatio);
    if (image && fitted) transform = fit(image.size, size);
    else if (image) transform = pan(transform, 0, 0, image.size, size);
    draw();
  }).observe(canvas);

  function redraw() {
    frame ||= requestAnimationFrame(draw);
  }

  function draw() {
    cancelAnimationFrame(frame);
    frame = 0;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    if (!image) return;
    const ratio = devicePixelRatio;
    const { scale, x, y } = transform;
    context.setTransform(scale * ratio, 0, 0, scale * ratio, x * ratio, y * ratio);
    const [width, height] = image.size;
    const source = scale * ratio * Math.max(width, height) > SMALL ? image.full : image.small;
    context.imageSmoothingEnabled = scale < 4;
    context.drawImage(source, 0, 0, width, height);
    drawResults(1 / scale, width);
  }

  function drawResults(unit, width) {
    const { doc, view } = store.get();
    const instances = visibleInstances(store.get());
    const active = [view.hovered, ...view.selected].filter(Boolean);
    if (view.masks) {
      drawInstances(context, instances, { ...view, unit, active });
      for (const one of instances) {
        if (active.includes(one.id)) drawLabel(context, one, { unit, width });
      }
    }
    for (const prompt of doc.prompts.filter((one) => !view.hidden.includes(one.key))) {
      drawPrompt(prompt, unit);
    }
    if (overlay.box) drawBox(context, overlay.box.box, overlay.box.positive, unit);
    if (overlay.cursor) drawCursor(context, overlay.cursor, unit);
  }

  function drawPrompt(prompt, unit) {
    for (const { box, label } of prompt.boxes) drawBox(context, box, Boolean(label), unit);
    if (prompt.box) drawBox(context, prompt.box, true, unit);
    for (const point of prompt.points) drawPoint(context, point, unit);
    for (const [index, { refine, deleted }] of Object.entries(prompt.edits)) {
      if (deleted || !refine || !instancesOf(prompt).some((one) => one.index === Number(index))) continue;
      for (const point of refine.points) drawPoint(context, point, unit);
    }
  }

  function move(next, isFit = false) {
    if (!image) return;
    transform = next;
    fitted = isFit;
    redraw();
  }

  store.subscribe(redraw);
  return {
    canvas,
    redraw,
    image: () => image,
    show(next) {
      image?.full.close();
      image = next;
      if (next) move(fit(next.size, size), true);
      else redraw();
    },
    /** Shows another frame of the same size, where the last one is. */
    replace(next) {
      image = next;
      redraw();
    },
    fit: () => image && move(fit(image.size, size), true),
    zoom: (factor, center = [size[0] / 2, size[1] / 2]) =>
      image && move(zoomAt(transform, factor, center, image.size, size)),
    pan: (dx, dy) => image && move(pan(transform, dx, dy, image.size, size)),
    actualSize() {
      if (image) move(zoomAt(transform, 1 / (transform.scale * devicePixelRatio), [size[0] / 2, size[1] / 2], image.size, size));
    },
    setOverlay(change) {
      overlay = { ...overlay, ...change };
      redraw();
    },
    scale: () => transform.scale,
    size: () => size,
    toImage: (point) => toImage(transform, point),
    toScreen: (point) => toScreen(transform, point),
    at: (point) => instanceAt(visibleInstances(store.get()), toImage(transform, point)),
  };
}

/** The instances that are drawn: those above their threshold, of prompts that are not hidden. */
export const visibleInstances = ({ doc, view }) =>
  allInstances(doc).filter((one) => one.shown && !view.hidden.includes(one.key));

/** Decodes an image file; throws if the browser cannot show it. */
export async function decodeImage(blob) {
  const full = await createImageBitmap(blob);
  const factor = SMALL / Math.max(full.width, full.height);
  let small = full;
  if (factor < 1) {
    const sides = [full.width, full.height].map((side) => Math.max(1, Math.round(side * factor)));
    small = new OffscreenCanvas(...sides);
    const context = small.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(full, 0, 0, small.width, small.height);
  }
  return { full, small, size: [full.width, full.height] };
}
