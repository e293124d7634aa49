// Draws an image with its instances and prompts on a canvas context.

import { css, ink } from "./colors.js";
import { shapeOf } from "./shapes.js";

const LINE = 2; // CSS pixels of an outline
const POSITIVE = "#1f9d55";
const NEGATIVE = "#d6336c";

/** Draws masks: largest first, so that small ones stay on top. `unit` is a CSS pixel in the image. */
export function drawInstances(context, instances, { opacity, outlines, unit, active = [] }) {
  const sorted = [...instances].sort((a, b) => b.area - a.area);
  for (const one of sorted) {
    const { path } = shapeOf(one.mask);
    const strong = active.includes(one.id);
    context.fillStyle = css(one.color, strong ? Math.min(1, opacity + 0.25) : opacity);
    context.fill(path, "evenodd");
    if (!outlines && !strong) continue;
    context.lineJoin = "round";
    context.lineWidth = (strong ? LINE + 3.5 : LINE + 2) * unit;
    context.strokeStyle = strong ? "#fff" : "rgb(0 0 0 / 0.55)"; // a rim, visible on any background
    context.stroke(path);
    context.lineWidth = (strong ? LINE + 0.5 : LINE) * unit;
    context.strokeStyle = css(one.color);
    context.stroke(path);
  }
}

/** The name and the score of an instance above its box. */
export function drawLabel(context, instance, { unit, width, size = 12 }) {
  const text = label(instance);
  const height = (size + 7) * unit;
  context.font = `600 ${size * unit}px system-ui, sans-serif`;
  const across = context.measureText(text).width + 10 * unit;
  const [x0, y0] = instance.box;
  const x = Math.max(0, Math.min(x0, width - across));
  const y = Math.max(0, y0 - height - 2 * unit);
  context.fillStyle = css(instance.color);
  context.beginPath();
  context.roundRect(x, y, across, height, 4 * unit);
  context.fill();
  context.fillStyle = ink(instance.color);
  context.textBaseline = "middle";
  context.fillText(text, x + 5 * unit, y + height / 2 + 0.5 * unit);
}

const label = ({ name, score }) => (score == null ? name : `${name} ${score.toFixed(2)}`);

/** An exemplar box, or a box around one object; negative boxes are dashed. */
export function drawBox(context, [x0, y0, x1, y1], positive, unit) {
  const strokes = [
    ["#fff", 4],
    [positive ? POSITIVE : NEGATIVE, 2],
  ];
  context.lineJoin = "miter";
  for (const [style, line] of strokes) {
    context.setLineDash(positive || line === 4 ? [] : [6 * unit, 4 * unit]);
    context.strokeStyle = style;
    context.lineWidth = line * unit;
    context.strokeRect(x0, y0, x1 - x0, y1 - y0);
  }
  context.setLineDash([]);
  drawSign(context, [x0, y0], positive, unit);
}

/** A click: a disc with a plus or a minus. */
export const drawPoint = (context, { x, y, label: positive }, unit) =>
  drawSign(context, [x, y], Boolean(positive), unit);

function drawSign(context, [x, y], positive, unit) {
  context.beginPath();
  context.arc(x, y, 8 * unit, 0, 2 * Math.PI);
  context.fillStyle = positive ? POSITIVE : NEGATIVE;
  context.fill();
  context.lineWidth = 2 * unit;
  context.strokeStyle = "#fff";
  context.stroke();
  context.beginPath();
  context.moveTo(x - 4 * unit, y);
  context.lineTo(x + 4 * unit, y);
  if (positive) {
    context.moveTo(x, y - 4 * unit);
    context.lineTo(x, y + 4 * unit);
  }
  context.stroke();
}

/** The keyboard cursor: a cross with a white rim. */
export function drawCursor(context, [x, y], unit) {
  for (const [style, line] of [["#fff", 5], ["#111", 2]]) {
    context.strokeStyle = style;
    context.lineWidth = line * unit;
    context.beginPath();
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      context.moveTo(x + 4 * dx * unit, y + 4 * dy * unit);
      context.lineTo(x + 14 * dx * unit, y + 14 * dy * unit);
    }
    context.stroke();
  }
}
