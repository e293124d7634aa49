// Mouse, pen and touch on the canvas: click, drag, pinch, wheel.

import { boxOf, drawsBoxes } from "./tools.js";

const CLICK = 4; // CSS pixels that a click may move

/** `held` is a Set of keys; Space in it makes every drag pan. */
export function attachGestures(viewer, tools, store, held) {
  const { canvas } = viewer;
  const pointers = new Map(); // id -> [x, y]
  let drag = null; // {start, last, positive, pans, moved}

  const place = (event) => {
    const { left, top } = canvas.getBoundingClientRect();
    return [event.clientX - left, event.clientY - top];
  };

  canvas.addEventListener("pointerdown", (event) => {
    if (!viewer.image()) return;
    canvas.setPointerCapture(event.pointerId);
    const at = place(event);
    pointers.set(event.pointerId, at);
    viewer.setOverlay({ box: null, cursor: null });
    const { mode, positive } = store.get().view;
    const other = event.button === 2 || event.altKey || event.ctrlKey;
    const pans = event.button === 1 || held.has(" ") || !drawsBoxes(mode);
    drag = pointers.size === 1 ? { start: at, last: at, positive: positive !== other, pans } : null;
  });

  canvas.addEventListener("pointermove", (event) => {
    const at = place(event);
    if (!pointers.has(event.pointerId)) return hover(at);
    const before = [...pointers.values()];
    pointers.set(event.pointerId, at);
    if (pointers.size === 2) return pinch(before, [...pointers.values()]);
    if (drag) move(at);
  });

  function hover(at) {
    const hovered = viewer.image() ? (viewer.at(at)?.id ?? null) : null;
    if (hovered !== store.get().view.hovered) store.look({ hovered });
  }

  function move(at) {
    drag.moved ||= Math.hypot(at[0] - drag.start[0], at[1] - drag.start[1]) > CLICK;
    if (!drag.moved) return;
    if (drag.pans) {
      viewer.pan(at[0] - drag.last[0], at[1] - drag.last[1]);
      canvas.classList.add("panning");
    } else {
      const corners = [viewer.toImage(drag.start), viewer.toImage(at)];
      const positive = drag.positive || store.get().view.mode === "box";
      viewer.setOverlay({ box: { box: boxOf(viewer.image().size, ...corners), positive } });
    }
    drag.last = at;
  }

  function pinch([a, b], [c, d]) {
    const middle = (p, q) => [(p[0] + q[0]) / 2, (p[1] + q[1]) / 2];
    const apart = (p, q) => Math.max(1, Math.hypot(p[0] - q[0], p[1] - q[1]));
    const [from, to] = [middle(a, b), middle(c, d)];
    viewer.pan(to[0] - from[0], to[1] - from[1]);
    viewer.zoom(apart(c, d) / apart(a, b), to);
  }

  function end(event) {
    const done = drag;
    pointers.delete(event.pointerId);
    drag = null;
    canvas.classList.remove("panning");
    viewer.setOverlay({ box: null });
    if (event.type !== "pointerup" || !done) return;
    const at = place(event);
    if (!done.moved) {
      if (!held.has(" ")) tools.click(viewer.toImage(at), done.positive, viewer.at(at));
    } else if (!done.pans) {
      tools.drawn(viewer.toImage(done.start), viewer.toImage(at), done.positive);
    }
  }

  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("pointerleave", () => {
    if (store.get().view.hovered) store.look({ hovered: null });
  });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("dblclick", (event) => event.preventDefault());
  canvas.addEventListener(
    "wheel",
    (event) => {
      if (!viewer.image()) return;
      event.preventDefault();
      const lines = event.deltaMode === 1 ? 30 : 1;
      const speed = event.ctrlKey ? 0.01 : 0.0015; // a pinch on a touchpad is a wheel with Ctrl
      viewer.zoom(Math.exp(-event.deltaY * lines * speed), place(event));
    },
    { passive: false },
  );
}
