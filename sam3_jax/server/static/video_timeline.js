// The timeline: a row for each object, with the frames on which it is.

import { css } from "./colors.js";
import { $, h, iconButton, keyed, put } from "./dom.js";
import { colorOfObject, nameOf, nextAppearance, runsOf } from "./video_tracks.js";

/** `select(id)`, `jump(frame)` and `remove(id)` are what the rows do. */
export function createTimeline({ select, jump, remove }) {
  const list = $("#timeline");
  let shown = null; // {tracks, frame, selected}
  let request = 0;
  new ResizeObserver(() => redraw()).observe(list);

  function create({ id }) {
    const find = () => shown.tracks.find(id);
    const seek = (event) => {
      if (!event.detail) return jump(nextAppearance(find(), shown.frame)); // by keyboard
      const { left, width } = event.currentTarget.getBoundingClientRect();
      return jump(frameAt((event.clientX - left) / width));
    };
    return h(
      "li",
      { class: "track" },
      h("span", { class: "swatch" }),
      h("button", { type: "button", class: "name", onClick: () => select(id) }, h("span", { class: "text" })),
      h("button", { type: "button", class: "strip", onClick: seek }, h("canvas", { "aria-hidden": "true" })),
      iconButton("trash", "Remove", () => remove(id), { class: "icon-button", "data-remove": "" }),
    );
  }

  function update(element, one) {
    const name = nameOf(one);
    const runs = runsOf(one.present);
    const frames = runs.slice(0, 8).map(([first, last]) => (first === last ? `${first}` : `${first} to ${last}`));
    const text = frames.length ? `on frames ${frames.join(", ")}${runs.length > 8 ? " and more" : ""}` : "on no frame yet";
    element.style.setProperty("--color", css(colorOfObject(one.id)));
    put(element.querySelector(".text"), "textContent", name);
    const strip = element.querySelector(".strip");
    strip.setAttribute("aria-label", `${name} is ${text}. Go to its next appearance`);
    strip.title = "Go to this frame";
    const selected = one.id === shown.selected;
    element.classList.toggle("selected", selected);
    element.querySelector(".name").setAttribute("aria-pressed", String(selected));
    const button = element.querySelector("[data-remove]");
    button.setAttribute("aria-label", `Remove ${name}`);
    draw(strip.firstElementChild, one, runs);
  }

  function draw(canvas, one, runs) {
    const { width, height } = canvas.parentElement.getBoundingClientRect();
    const ratio = devicePixelRatio;
    canvas.width = Math.max(1, Math.round(width * ratio));
    canvas.height = Math.max(1, Math.round(height * ratio));
    const context = canvas.getContext("2d");
    const unit = canvas.width / shown.tracks.length;
    const at = (frame) => frame * unit;
    context.fillStyle = css(colorOfObject(one.id));
    for (const [first, last] of runs) {
      const left = at(first);
      context.fillRect(left, canvas.height * 0.25, Math.max(ratio, at(last + 1) - left), canvas.height * 0.5);
    }
    context.fillStyle = getComputedStyle(list).color;
    for (const frame of one.prompted) {
      context.beginPath();
      context.arc(at(frame + 0.5), canvas.height / 2, 3.5 * ratio, 0, 2 * Math.PI);
      context.fill();
    }
    context.fillRect(at(shown.frame + 0.5) - ratio / 2, 0, Math.max(1, ratio), canvas.height);
  }

  const frameAt = (share) => Math.min(shown.tracks.length - 1, Math.max(0, Math.floor(share * shown.tracks.length)));

  function redraw() {
    request = 0;
    if (shown) keyed(list, shown.tracks.list(), ({ id }) => id, create, update);
  }

  return {
    /** Shows the rows; drawn once for each image of the screen. */
    render(tracks, frame, selected) {
      shown = tracks && { tracks, frame, selected };
      if (!shown) list.replaceChildren();
      else request ||= requestAnimationFrame(redraw);
    },
  };
}
