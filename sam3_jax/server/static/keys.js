// Keyboard shortcuts, and the cursor that places points and boxes without a mouse.

import { boxOf, drawsBoxes } from "./tools.js";

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const STEP = 8; // CSS pixels of an arrow key; five times as much with Shift

/** What the help lists: keys and their effect. */
export const HELP = [
  [["/"], "Type a phrase; Enter keeps it"],
  [["P", "E", "C", "B", "R", "A"], "Tools: phrase, exemplar, click, box, refine, everything"],
  [["N"], "Switch between positive and negative (or use the right mouse button)"],
  [["O"], "New object: the next click starts another one"],
  [["←", "↑", "↓", "→"], "On the image: move the cursor; with Shift faster, with Ctrl move the image"],
  [["Enter"], "On the image: place a point, or the first and then the second corner of a box"],
  [["Esc"], "Cancel the box, deselect"],
  [["[", "]"], "Select the previous or the next instance"],
  [["Delete", "M"], "Delete or merge the selected instances"],
  [["V"], "Show or hide the masks"],
  [["+", "−", "0", "1"], "Zoom in, zoom out, fit, actual size"],
  [["Space"], "Hold and drag to move the image; also the middle mouse button"],
  [["Ctrl", "Z"], "Undo; with Shift redo"],
  [["Ctrl", "O"], "Open an image or a video; Ctrl+V pastes one"],
  [[",", "."], "Video: the previous or the next frame"],
  [["K"], "Video: play or pause"],
  [["T"], "Video: track, or stop"],
  [["?"], "This help"],
];

/**
 * `actions` has a function for each single key, "undo", "redo" and "open"; `held` is the Set of
 * keys that are down; `allowed()` says whether shortcuts of a single key are on.
 */
export function attachKeys({ viewer, tools, store, actions, held, allowed, announce }) {
  const { canvas } = viewer;
  let cursor = null; // pixels of the image
  let corner = null; // the first corner of a box

  document.addEventListener("keydown", (event) => {
    const { key, target } = event;
    if (document.querySelector("dialog[open]")) return;
    if ((event.ctrlKey || event.metaKey) && !event.altKey) return command(event);
    const writes = target.matches("input[type=text], select, textarea");
    if (writes || event.altKey) return;
    if (target === canvas && onCanvas(event)) return event.preventDefault();
    if (key === " " && !target.closest("button, input, label")) {
      held.add(" ");
      return event.preventDefault();
    }
    if (target.matches("input[type=range]") && movesSlider(target, key)) return;
    const action = actions[key.length === 1 ? key.toLowerCase() : key];
    if (!action || !allowed()) return;
    event.preventDefault();
    action();
  });
  document.addEventListener("keyup", ({ key }) => held.delete(key));
  window.addEventListener("blur", () => held.clear());
  canvas.addEventListener("blur", () => hide());

  function command(event) {
    const key = event.key.toLowerCase();
    const writes = event.target.matches("input[type=text]") && event.target.value;
    if (event.target === canvas && key in lower(ARROWS)) {
      const [dx, dy] = ARROWS[event.key];
      viewer.pan(-dx * 40, -dy * 40);
    } else if (key === "z" && !writes) actions[event.shiftKey ? "redo" : "undo"]();
    else if (key === "y" && !writes) actions.redo();
    else if (key === "o") actions.open();
    else return;
    event.preventDefault();
  }

  function onCanvas({ key, shiftKey }) {
    if (!viewer.image()) return false;
    if (key in ARROWS) {
      move(ARROWS[key], (shiftKey ? 5 : 1) * STEP);
      return true;
    }
    if (key === "Enter") {
      if (!cursor) move([0, 0], 0);
      else place();
      return true;
    }
    if (key === "Escape" && corner) {
      corner = null;
      viewer.setOverlay({ box: null });
      return true;
    }
    return false;
  }

  function move([dx, dy], step) {
    const [width, height] = viewer.image().size;
    const by = step / viewer.scale();
    const clamp = (value, limit) => Math.min(limit, Math.max(0, value));
    cursor ??= [width / 2, height / 2];
    cursor = [clamp(cursor[0] + dx * by, width), clamp(cursor[1] + dy * by, height)];
    follow();
    show();
    const over = viewer.at(viewer.toScreen(cursor));
    if ((over?.id ?? null) !== store.get().view.hovered) store.look({ hovered: over?.id ?? null });
    announce(`${cursor.map(Math.round).join(", ")}${over ? `, ${over.name}` : ""}`);
  }

  /** Moves the image so that the cursor stays on the canvas. */
  function follow() {
    const [x, y] = viewer.toScreen(cursor);
    const outside = (value, limit) => (value < 24 ? 24 - value : value > limit - 24 ? limit - 24 - value : 0);
    const [width, height] = viewer.size();
    viewer.pan(outside(x, width), outside(y, height));
  }

  function show() {
    const { mode, positive } = store.get().view;
    const box = corner && boxOf(viewer.image().size, corner, cursor);
    viewer.setOverlay({ cursor, box: box && { box, positive: positive || mode === "box" } });
  }

  function place() {
    const { mode, positive } = store.get().view;
    if (!drawsBoxes(mode)) return tools.click(cursor, positive, viewer.at(viewer.toScreen(cursor)));
    if (!corner) {
      corner = cursor;
      announce("First corner placed");
      return show();
    }
    const from = corner;
    corner = null;
    viewer.setOverlay({ box: null });
    return tools.drawn(from, cursor, positive);
  }

  function hide() {
    corner = null;
    viewer.setOverlay({ cursor: null, box: null });
  }

  return {
    /** For another image. */
    reset() {
      cursor = null;
      hide();
    },
  };
}

/** Whether a key is left to a slider; that of the frames takes those only that move it. */
const movesSlider = ({ id }, key) =>
  id === "video-frame" ? /^(Arrow|Home|End|Page)/.test(key) : !/^[a-z/?]$/i.test(key);

const lower = (keys) => Object.fromEntries(Object.keys(keys).map((key) => [key.toLowerCase(), key]));
