// The video mode of the page: open a video, click on any frame, track, correct, export.

import * as api from "./api.js";
import { $, download, h, iconButton, keyed, plural, put } from "./dom.js";
import { createPlayer } from "./video_player.js";
import { createTimeline } from "./video_timeline.js";
import { createTracks, idOf, keyOf, nameOf } from "./video_tracks.js";
import { boxOf } from "./tools.js";
import { add, empty } from "./prompts.js";

const EXPORTS = {
  tracks: "tracks.jsonl", ytvis: "ytvis.json", "coco-vid": "coco-vid.json", mot: "mot.txt", overlay: "sam3.mp4",
};
const AGAIN = ["unknown_video", "offline", "busy", "not_ready"]; // errors after which to open it again
const stem = (name) => name.replace(/\.[^.]*$/, "") || "video";

export function createVideoPage({ viewer, store, say, warn, clearWarning, showTimes }) {
  let video = null; // {id, name, width, height, frames, fps, file}
  let opening = null;
  let tracks = null;
  let running = null; // {total, done}
  let following = false; // whether the frames that leave are shown
  let queue = Promise.resolve(); // requests about objects, one after another
  let pending = 0; // requests that the page waits for
  const player = createPlayer(viewer, {
    load: (frame, side) => api.videoFrame(video.id, frame, side),
    shown: () => showFrame(),
    failed: fail,
    moved: () => (following = false),
  });
  const timeline = createTimeline({ select: toggle, jump, remove });
  const selected = () => {
    const { active } = store.get().view;
    return active === null || !tracks?.find(idOf(active)) ? null : idOf(active);
  };

  /** Opens a video file; `begins()` is called when it replaces what was open. */
  async function open(file, model, begins = () => {}) {
    const { video_bytes: most = Infinity } = model?.limits ?? {};
    const name = file.name || "video";
    if (!model?.video) return warn("This server does not track videos: its checkpoint has no tracker, or it lacks PyAV.");
    const bytes = (count) => `${count.toLocaleString("en")} bytes`;
    if (file.size > most) return warn(`${name} has ${bytes(file.size)}; the server takes ${bytes(most)} at most.`);
    opening?.abort();
    const own = new AbortController();
    opening = own;
    busy(1);
    say("Uploading the video…");
    const start = performance.now();
    try {
      const found = await api.uploadVideo(file, own.signal);
      if (own.signal.aborted) return api.removeVideo(found.id).catch(() => {});
      close();
      begins();
      video = { ...found, name, file };
      await begin(performance.now() - start);
    } catch (error) {
      if (own.signal.aborted || error.name === "AbortError") return;
      const again = AGAIN.includes(error.code) ? () => open(file, model, begins) : null;
      say("");
      warn(`${name}: ${error.message}`, again);
    } finally {
      busy(-1);
      if (opening === own) opening = null;
    }
  }

  async function begin(total) {
    tracks = createTracks(video.frames);
    document.body.classList.add("video-open");
    $("#welcome").hidden = true;
    $("#zoom").hidden = false;
    store.reset(empty(), { active: null, selected: [], hovered: null, hidden: [], mode: "click", ready: true });
    say("The video is ready.");
    showTimes({ read: video.milliseconds.read, total });
    render();
    await player.open(video);
  }

  /** Closes the video, and gives up one that is being uploaded. */
  function leave() {
    opening?.abort();
    opening = null;
    close();
  }

  function close() {
    if (!video) return;
    api.removeVideo(video.id).catch(() => {});
    [video, tracks, running] = [null, null, null];
    player.close();
    viewer.show(null);
    document.body.classList.remove("video-open");
    timeline.render(null);
  }

  /** Makes the document of the frame that is shown, which the viewer draws. */
  function showFrame() {
    if (!video) return;
    const frame = player.frame();
    const found = new Map(tracks.at(frame).map((one) => [one.id, one]));
    let doc = empty();
    for (const one of tracks.list()) {
      const here = found.get(one.id);
      const { points, box } = tracks.clicksOf(one.id, frame);
      const answer = here && { signature: null, instances: [here] };
      doc = add(doc, { kind: "object", key: keyOf(one.id), name: nameOf(one), points, box, answer });
    }
    store.reset(doc, {});
    const size = `${video.width} by ${video.height} pixels`;
    viewer.canvas.setAttribute("aria-label", `Video: ${video.name}, frame ${frame} of ${video.frames - 1}, ${size}`);
    render();
  }

  function render() {
    if (!video) return;
    const id = selected();
    timeline.render(tracks, player.frame(), id);
    const chip = (phrase) => h("li", {}, h("span", {}), iconButton("close", "Remove", () => forget(phrase)));
    keyed($("#video-phrases"), tracks.phrases, String, chip, (element, phrase) => {
      put(element.firstElementChild, "textContent", phrase);
      element.lastElementChild.setAttribute("aria-label", `Remove ${phrase}`);
    });
    const count = tracks.list().length;
    $("#object-count").textContent = String(count);
    $("#object-remove").disabled = id === null;
    $("#object-text").textContent = id === null
      ? "Type a phrase, click on an object, or draw a box around it, on any frame. Then track through the video."
      : `${nameOf(tracks.find(id))} is selected: clicks on any frame correct it.`;
    $("#video-track").disabled = !count && !tracks.phrases.length && !running;
    $("#video-track").textContent = running ? "Stop" : "Track";
    $("#video-direction").disabled = Boolean(running);
    $("#video-progress").hidden = !running;
    if (running?.total) $("#video-progress").value = running.done / running.total;
    for (const button of document.querySelectorAll("[data-export]")) button.disabled = !count;
  }

  /** Selects an object, or deselects it. */
  function toggle(id) {
    select(id === selected() ? null : id);
  }

  function select(id) {
    store.look({ active: id === null ? null : keyOf(id), mode: id === null ? store.get().view.mode : "click" });
  }

  function jump(frame) {
    following = false;
    player.pause();
    player.show(frame);
  }

  /** Does requests one after another, and shows what they give. */
  function enqueue(work) {
    const own = video;
    busy(1);
    queue = queue
      .then(() => own === video && work())
      .then(() => own === video && clearWarning())
      .catch((error) => own === video && fail(error))
      .finally(() => busy(-1));
    return queue;
  }

  function point([x, y], positive) {
    const frame = player.frame();
    const clip = (value, limit) => Math.round(10 * Math.min(limit - 0.5, Math.max(0.5, value))) / 10;
    const click = { x: clip(x, video.width), y: clip(y, video.height), label: positive ? 1 : 0 };
    enqueue(() => {
      const id = selected();
      const { points, box } = id === null ? { points: [], box: null } : tracks.clicksOf(id, frame);
      if (id === null && !positive) return say("The first click on an object must be positive.");
      return ask(id, frame, { points: [...points, click], box });
    });
  }

  function drawn(from, to) {
    const box = boxOf([video.width, video.height], from, to);
    if (box[2] - box[0] < 2 || box[3] - box[1] < 2) return;
    const frame = player.frame();
    enqueue(() => ask(selected(), frame, { points: [], box }));
  }

  /** Adds an object (`id` null) or corrects it, by clicks and a box on a frame. */
  async function ask(id, frame, { points, box }) {
    const start = performance.now();
    const body = {
      frame, points: points.map(({ x, y }) => [x, y]), point_labels: points.map(({ label }) => label), box,
    };
    const found = id === null ? await api.promptVideo(video.id, body) : await api.correctObject(video.id, id, body);
    const [object] = found.objects;
    tracks.set(found.result);
    tracks.prompt(object, frame, { points, box });
    showFrame();
    if (id === null) store.look({ active: keyOf(object) });
    const one = tracks.find(object);
    const here = found.result.objects.some((other) => other.id === object);
    const after = one.present.reduce((sum, on) => sum + on, 0) > 1 ? " Track again to update the other frames." : "";
    if (!here) say(`${nameOf(one)} is not on frame ${frame}.${after}`);
    else say(`${id === null ? "Added" : "Corrected"} ${nameOf(one)} on frame ${frame}.${after}`);
    showTimes({ device: found.milliseconds.device, total: performance.now() - start });
  }

  /** Finds all instances of phrases on the frame that is shown. */
  function findAll(phrases) {
    const frame = player.frame();
    for (const phrase of new Set(phrases)) {
      enqueue(async () => {
        if (tracks.phrases.includes(phrase)) return say(`“${phrase}” is already among the phrases.`);
        const start = performance.now();
        const found = await api.promptVideo(video.id, { frame, phrase });
        tracks.phrases.push(phrase);
        tracks.set(found.result);
        for (const id of found.objects) tracks.prompt(id, frame, { points: [], box: null });
        showFrame();
        const count = plural(found.objects.length, "object");
        say(`${phrase}: ${count} on frame ${frame}. Track to find it on the other frames.`);
        showTimes({ device: found.milliseconds.device, total: performance.now() - start });
      });
    }
  }

  function forget(phrase) {
    enqueue(async () => {
      await api.removePhrase(video.id, phrase);
      tracks.forget(phrase);
      showFrame();
      $("#phrase").focus();
      say(`Removed ${phrase}.`);
    });
  }

  function remove(id = selected()) {
    if (id === null) return say("Select an object first.");
    const name = nameOf(tracks.find(id));
    enqueue(async () => {
      if (!tracks.find(id)) return;
      await api.removeObject(video.id, id);
      tracks.remove(id);
      if (store.get().view.active === keyOf(id)) store.look({ active: null });
      showFrame();
      $("#canvas").focus();
      say(`Removed ${name}.`);
    });
  }

  async function track() {
    if (running) return stop();
    const [own, run] = [video, { total: 0, done: 0 }];
    [running, following] = [run, true];
    player.pause();
    clearWarning();
    say("Tracking…");
    render();
    const body = { direction: $("#video-direction").value };
    try {
      await queue;
      for await (const line of api.trackVideo(own.id, body)) {
        if (own !== video) return;
        if (line.start) run.total = line.start.frames;
        else if (line.error) throw new api.ApiError(line.error.code, line.error.message);
        else if (line.end) finished(line.end);
        else arrived(line, run);
      }
    } catch (error) {
      if (own === video) fail(error);
    } finally {
      if (own === video) {
        running = null;
        showFrame();
      }
    }
  }

  function arrived(line, run) {
    run.done += 1;
    tracks.set(line);
    if (following) player.show(line.frame);
    if (line.frame === player.frame()) showFrame();
    else render();
  }

  function finished({ frames, stopped, seconds }) {
    say(`${stopped ? "Stopped after" : "Tracked"} ${plural(frames, "frame")}.`);
    showTimes({ total: 1000 * seconds });
  }

  function stop() {
    say("Stopping…");
    api.stopTracking(video.id).catch(fail);
  }

  async function save(format) {
    const own = video;
    busy(1);
    say("Exporting…");
    try {
      const blob = await api.exportVideo(own.id, format, own.name);
      download(blob, `${stem(own.name)}.${EXPORTS[format]}`);
      say("Exported.");
    } catch (error) {
      if (own === video) fail(error);
    } finally {
      busy(-1);
    }
  }

  function fail(error) {
    say("");
    const file = video?.file;
    const lost = ["unknown_video", "offline"].includes(error.code);
    warn(error.message, lost && file ? () => open(file, { video: true }) : null);
  }

  function busy(by) {
    pending += by;
    $("#busy").hidden = !pending;
    document.body.toggleAttribute("data-busy", pending > 0);
  }

  /** Selects the next or the previous object. */
  function step(by) {
    const ids = tracks.list().map(({ id }) => id);
    if (!ids.length) return;
    const at = ids.indexOf(selected());
    select(ids[at < 0 ? (by > 0 ? 0 : ids.length - 1) : (at + by + ids.length) % ids.length]);
    say(nameOf(tracks.find(selected())));
  }

  store.subscribe(({ view }, previous) => {
    if (!video || view.active === previous.view.active) return;
    store.look({ selected: view.active === null ? [] : [`${view.active}-0`] });
    render();
  });
  $("#video-track").addEventListener("click", track);
  $("#object-remove").addEventListener("click", () => remove());
  for (const button of document.querySelectorAll("[data-export]")) {
    button.addEventListener("click", () => save(button.dataset.export));
  }
  window.addEventListener("pagehide", ({ persisted }) => {
    if (video && !persisted) api.removeVideo(video.id, true).catch(() => {});
  });

  return {
    isOpen: () => video !== null,
    open,
    close: leave,
    phrases: findAll,
    tools: {
      click(at, positive, instance) {
        if (store.get().view.mode === "click") point(at, positive);
        else select(instance ? idOf(instance.key) : null);
      },
      drawn,
    },
    actions: {
      ",": () => player.step(-1), ".": () => player.step(1), k: player.play, t: track,
      "[": () => step(-1), "]": () => step(1), Delete: () => remove(), Backspace: () => remove(),
    },
  };
}
