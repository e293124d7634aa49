// What a click, a drag or the keyboard cursor does in each mode.

import * as prompts from "./prompts.js";
import { allInstances } from "./instances.js";

export const MODES = ["phrase", "exemplar", "click", "box", "refine", "everything"];

/** Whether a drag draws a box in this mode; otherwise it pans. */
export const drawsBoxes = (mode) => mode === "exemplar" || mode === "box";

export function createTools(store, viewer, say) {
  const view = () => store.get().view;
  const active = () => prompts.find(store.get().doc, view().active);

  /** A click at x, y in pixels of the image. */
  function click([x, y], positive, instance) {
    const { mode, selected } = view();
    const point = { ...inside(viewer.image().size, [x, y]), label: positive ? 1 : 0 };
    if (mode === "click") return addPoint(point);
    if (mode === "refine") {
      const target = allInstances(store.get().doc).find((one) => one.id === selected[0]);
      if (target) return refine(target, point);
      if (!instance) say("Choose an instance first: click on its mask or its row.");
    }
    if (!drawsBoxes(mode)) store.look({ selected: instance ? [instance.id] : [] });
  }

  function addPoint(point) {
    const prompt = active();
    if (prompt?.kind === "object") {
      const points = [...prompt.points, point];
      return store.commit((doc) => prompts.change(doc, prompt.key, { points }));
    }
    if (!point.label) return say("The first click on an object must be positive.");
    return addObject({ points: [point] });
  }

  function addObject(values) {
    store.commit((doc) => prompts.add(doc, { kind: "object", ...values }));
    store.look({ active: store.get().doc.next - 1 });
  }

  /** Refines an instance; one of a click or a box gets the point itself. */
  function refine({ key, index, mask }, point) {
    const prompt = prompts.find(store.get().doc, key);
    if (prompt.kind === "object" && !prompt.edits[index]?.mask) {
      const points = [...prompt.points, point];
      return store.commit((doc) => prompts.change(doc, key, { points }));
    }
    return store.commit((doc) => prompts.refine(doc, key, index, mask, point));
  }

  /** A box between two corners, in pixels of the image. */
  function drawn(from, to, positive) {
    const box = boxOf(viewer.image().size, from, to);
    if (box[2] - box[0] < 2 || box[3] - box[1] < 2) return;
    if (view().mode === "box") return addObject({ box });
    const one = { box, label: positive ? 1 : 0 };
    const prompt = active();
    if (prompt?.kind === "concept") {
      const boxes = [...prompt.boxes, one];
      return store.commit((doc) => prompts.change(doc, prompt.key, { boxes }));
    }
    if (!positive) return say("The first exemplar box must be positive, or choose a phrase first.");
    store.commit((doc) => prompts.add(doc, { kind: "concept", boxes: [one] }));
    store.look({ active: store.get().doc.next - 1 });
  }

  function everything(side) {
    store.commit((doc) => {
      const rest = { ...doc, prompts: doc.prompts.filter(({ kind }) => kind !== "everything") };
      return prompts.add(rest, { kind: "everything", side });
    });
    store.look({ active: store.get().doc.next - 1 });
  }

  return { click, drawn, everything };
}

/** A point, kept inside the image. */
const inside = ([width, height], [x, y]) => ({
  x: round(Math.min(width - 0.5, Math.max(0.5, x))),
  y: round(Math.min(height - 0.5, Math.max(0.5, y))),
});

/** The box between two corners, clipped to the image. */
export function boxOf([width, height], [u0, v0], [u1, v1]) {
  const clip = (value, limit) => round(Math.min(limit, Math.max(0, value)));
  return [
    clip(Math.min(u0, u1), width), clip(Math.min(v0, v1), height),
    clip(Math.max(u0, u1), width), clip(Math.max(v0, v1), height),
  ];
}

const round = (value) => Math.round(value * 10) / 10;
