// The frames of a video: loads, shows and plays them.

import { $ } from "./dom.js";

const SIDE = 1600; // pixels of the longer side of a frame that is shown
const KEPT = 40; // decoded frames
const AHEAD = 4; // frames loaded ahead while playing

/**
 * `load(frame, side)` gives a frame as a blob; `shown(frame)` is called with each frame that is
 * shown; `failed(error)` with an error; `moved()` when the user chooses a frame.
 */
export function createPlayer(viewer, { load, shown, failed, moved }) {
  const slider = $("#video-frame");
  const frames = new Map(); // frame -> promise of a bitmap, the last one used last
  let video = null;
  let current = null; // {frame, bitmap} on the canvas
  let wanted = 0;
  let busy = false;
  let timer = null; // of the animation while playing

  function open(next) {
    close();
    video = next;
    slider.max = String(video.frames - 1);
    return show(0);
  }

  function close() {
    pause();
    for (const one of frames.values()) one.then((bitmap) => bitmap.close(), () => {});
    frames.clear();
    [video, current, wanted] = [null, null, 0];
  }

  function bitmapOf(frame) {
    const found = frames.get(frame) ?? load(frame, SIDE).then((blob) => createImageBitmap(blob));
    frames.delete(frame);
    frames.set(frame, found);
    found.catch(() => frames.delete(frame));
    for (const [old, one] of frames) {
      if (frames.size <= KEPT) break;
      if (old === current?.frame || old === frame) continue;
      frames.delete(old);
      one.then((bitmap) => bitmap.close(), () => {});
    }
    return found;
  }

  /** Shows a frame as soon as it is there; of several calls, the last one counts. */
  async function show(frame) {
    wanted = Math.max(0, Math.min(video.frames - 1, frame));
    label(wanted);
    if (busy) return;
    busy = true;
    const own = video;
    try {
      while (own === video && current?.frame !== wanted) {
        const next = wanted;
        const bitmap = await bitmapOf(next);
        if (own !== video) return;
        draw(next, bitmap);
      }
    } catch (error) {
      if (own !== video) return;
      pause();
      failed(error);
    } finally {
      busy = false;
    }
  }

  function draw(frame, bitmap) {
    const first = current === null;
    current = { frame, bitmap };
    const image = { full: bitmap, small: bitmap, size: [video.width, video.height], name: video.name };
    if (first) viewer.show(image);
    else viewer.replace(image);
    shown(frame);
  }

  function label(frame) {
    slider.value = String(frame);
    const seconds = (frame / (video.fps || 25)).toFixed(2);
    slider.setAttribute("aria-valuetext", `frame ${frame} of ${video.frames - 1}, ${seconds} s`);
    $("#video-time").textContent = `${frame} / ${video.frames - 1} · ${seconds} s`;
  }

  function step(by) {
    pause();
    moved();
    return show(wanted + by);
  }

  function play() {
    if (timer) return pause();
    const [first, start] = [wanted >= video.frames - 1 ? 0 : wanted, performance.now()];
    moved();
    button("Pause", "pause");
    const tick = () => {
      const frame = first + Math.floor(((performance.now() - start) / 1000) * (video.fps || 25));
      if (frame !== wanted) show(frame);
      if (frame >= video.frames - 1) return pause();
      timer = requestAnimationFrame(tick);
    };
    timer = requestAnimationFrame(tick);
    ahead();
  }

  /** Loads frames in order, a few ahead of the one that is shown. */
  async function ahead() {
    const own = video;
    let last = wanted;
    while (timer && own === video && last < video.frames - 1) {
      last = Math.max(last, wanted) + 1;
      await bitmapOf(Math.min(last, video.frames - 1)).catch(() => {});
      while (timer && last >= wanted + AHEAD) await new Promise(requestAnimationFrame);
    }
  }

  function pause() {
    cancelAnimationFrame(timer);
    timer = null;
    button("Play", "play");
  }

  function button(name, icon) {
    const play = $("#video-play");
    play.setAttribute("aria-label", name);
    play.title = `${name} (K)`;
    play.querySelector("use").setAttribute("href", `#i-${icon}`);
  }

  slider.addEventListener("input", () => {
    pause();
    moved();
    show(Number(slider.value));
  });
  $("#video-previous").addEventListener("click", () => step(-1));
  $("#video-next").addEventListener("click", () => step(1));
  $("#video-play").addEventListener("click", play);
  return { open, close, show, step, play, pause, frame: () => current?.frame ?? 0 };
}
