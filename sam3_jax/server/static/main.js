// Connects the parts: state, server, canvas, panel, keys, files.

import * as api from "./api.js";
import { createAsker } from "./asker.js";
import { fromCoco } from "./coco.js";
import { openHelp, prepareDialogs, showModel } from "./dialogs.js";
import { $ } from "./dom.js";
import { attachExamples } from "./examples.js";
import { attachCamera, attachFiles, isImage, isVideo } from "./files.js";
import { attachGestures } from "./gestures.js";
import { createInstanceList } from "./instance_list.js";
import { attachKeys } from "./keys.js";
import { announce, clearWarning, createReport, say, showTimes, warn } from "./messages.js";
import { createOptions } from "./options.js";
import { createPhraseForm } from "./phrase_form.js";
import { createPromptList } from "./prompt_list.js";
import { clean, empty } from "./prompts.js";
import { saveCoco, saveMasks, saveOverlay } from "./save.js";
import { createSession } from "./session.js";
import { createStore } from "./store.js";
import { attachTheme } from "./theme.js";
import { createTools } from "./tools.js";
import { createVideoPage } from "./video_page.js";
import { createViewer, decodeImage } from "./viewer.js";

const VIEW = {
  mode: "phrase", positive: true, active: null, selected: [], hovered: null, hidden: [],
  opacity: 0.45, masks: true, outlines: true, ready: false,
};
const SINGLE_KEYS = "sam3-single-keys";

api.takeToken();
let model = null;
const store = createStore(empty(), VIEW, clean);
const session = createSession(say);
const viewer = createViewer($("#canvas"), store);
const imageTools = createTools(store, viewer, say);
const video = createVideoPage({ viewer, store, say, warn, clearWarning, showTimes });
const tools = {
  click: (...at) => (video.isOpen() ? video.tools : imageTools).click(...at),
  drawn: (...at) => (video.isOpen() ? video.tools : imageTools).drawn(...at),
};
const asker = createAsker(store, session, createReport(store, () => model?.concepts));
const form = createPhraseForm(store, say, () => (video.isOpen() ? video.phrases : null));
const renderPrompts = createPromptList(store, asker.hasFailed, say);
const rows = createInstanceList(store, say);
const options = createOptions(store, imageTools, say);
const held = new Set();

async function open(file, phrases = []) {
  clearWarning();
  const name = file.name || "image";
  if (/json$/.test(file.type) || /\.json$/i.test(name)) return importCoco(file);
  if (await isVideo(file)) return openVideo(file);
  const fault = await faultOf(file, name);
  if (fault) return warn(fault);
  let image;
  try {
    image = { ...(await decodeImage(file)), name };
  } catch {
    return warn(`The browser cannot show ${name}: it is damaged, or in a format for other programs. Save it again as PNG or JPEG.`);
  }
  const [width, height] = image.size;
  const { pixels = Infinity } = model?.limits ?? {};
  const most = pixels.toLocaleString("en");
  if (width * height > pixels) return warn(`${name} has ${width} x ${height} pixels; the server takes ${most} at most.`);
  await show(file, image, phrases);
}

async function openVideo(file) {
  await video.open(file, model, () => {
    if (viewer.image()) close();
    keys.reset();
  });
}

async function faultOf(file, name) {
  if (!(await isImage(file))) return `${name} is not an image. Open a PNG, JPEG, WebP or another image file.`;
  const { bytes = Infinity } = model?.limits ?? {};
  const text = (count) => `${count.toLocaleString("en")} bytes`;
  return file.size > bytes ? `${name} has ${text(file.size)}; the server takes ${text(bytes)} at most.` : null;
}

/** Shows an image at once and uploads it. */
async function show(file, image, phrases) {
  const start = performance.now();
  video.close();
  asker.reset();
  store.reset(empty(), { active: null, selected: [], hovered: null, hidden: [], ready: true });
  viewer.show(image);
  keys.reset();
  $("#welcome").hidden = true;
  $("#zoom").hidden = false;
  $("#canvas").setAttribute("aria-label", `Image: ${image.name}, ${image.size.join(" by ")} pixels`);
  form.suggest(phrases);
  form.focus();
  say("Encoding the image…");
  showTimes({});
  const upload = session.open(file);
  try {
    const { milliseconds, width, height } = await upload;
    if (viewer.image() !== image) return;
    if (`${[width, height]}` !== `${image.size}`) {
      throw new Error(`the server reads ${width} x ${height} pixels, the browser ${image.size.join(" x ")}`);
    }
    say("The image is ready.");
    showTimes({ encode: milliseconds.encode, total: performance.now() - start });
  } catch (error) {
    if (viewer.image() !== image) return;
    close();
    warn(`${image.name}: ${error.message}`);
  }
}

function close() {
  session.close();
  viewer.show(null);
  store.reset(empty(), { ...VIEW, mode: store.get().view.mode });
  $("#welcome").hidden = false;
  $("#zoom").hidden = true;
  $("#canvas").setAttribute("aria-label", "Image: no image is open");
  form.suggest([]);
  say("");
}

async function importCoco(file) {
  clearWarning();
  if (!viewer.image() || video.isOpen()) return warn("Open the image of the COCO file first.");
  try {
    const doc = fromCoco(await file.text(), viewer.image());
    store.commit(() => doc);
    store.look({ active: null, selected: [], hidden: [] });
    say(`Imported ${file.name}.`);
  } catch (error) {
    warn(`${file.name} was not imported: ${error.message}.`);
  }
}

function clear() {
  store.commit((doc) => ({ ...doc, prompts: [] }));
  deselect();
  say("All prompts were cleared.");
}

function undo() {
  say(store.undo() ? "Undone." : "There is nothing to undo.");
}

function redo() {
  say(store.redo() ? "Done again." : "There is nothing to redo.");
}

function deselect() {
  store.look({ selected: [], active: null });
}

/** What a key does with a video, if one is open, or else with an image. */
const either = (key, ofImage = () => {}) => () => (video.isOpen() ? (video.actions[key] ?? (() => {})) : ofImage)();

const files = attachFiles(open);
const keys = attachKeys({
  viewer, tools, store, held, announce,
  allowed: () => $("#single-keys").checked,
  actions: {
    "/": form.focus, "?": openHelp, undo, redo, open: files.choose, Escape: deselect,
    p: () => options.setMode("phrase"), e: either("e", () => options.setMode("exemplar")),
    c: () => options.setMode("click"), b: () => options.setMode("box"),
    r: either("r", () => options.setMode("refine")), a: either("a", () => options.setMode("everything")),
    n: () => {
      store.look({ positive: !store.get().view.positive });
      say(store.get().view.positive ? "Positive" : "Negative");
    },
    o: () => options.newObject(),
    "[": either("[", () => rows.step(-1)), "]": either("]", () => rows.step(1)), m: either("m", () => rows.merge()),
    Delete: either("Delete", () => rows.remove()), Backspace: either("Backspace", () => rows.remove()),
    ",": either(","), ".": either("."), k: either("k"), t: either("t"),
    v: () => store.look({ masks: !store.get().view.masks }),
    "+": () => viewer.zoom(1.25), "=": () => viewer.zoom(1.25), "-": () => viewer.zoom(0.8),
    0: () => viewer.fit(), 1: () => viewer.actualSize(),
  },
});
attachGestures(viewer, tools, store, held);
attachCamera(open, files.choose, warn);
attachTheme();
attachExamples(open);
prepareDialogs();

const onClick = {
  "open-button": files.choose, "welcome-open": files.choose, "help-button": openHelp, undo, redo,
  clear,
  "zoom-in": () => viewer.zoom(1.25), "zoom-out": () => viewer.zoom(0.8), "zoom-fit": viewer.fit,
  "save-coco": () => saveCoco(store.get(), viewer.image(), model),
  "save-masks": () => saveMasks(store.get(), viewer.image()),
  "save-overlay": () => saveOverlay(store.get(), viewer.image()),
  "load-coco": () => $("#coco-input").click(),
};
for (const [id, run] of Object.entries(onClick)) $(`#${id}`).addEventListener("click", () => run());
$("#coco-input").addEventListener("change", ({ target }) => {
  const [file] = target.files;
  target.value = "";
  if (file) importCoco(file);
});
$("#opacity").addEventListener("input", ({ target }) => store.look({ opacity: Number(target.value) }));
$("#show-masks").addEventListener("change", ({ target }) => store.look({ masks: target.checked }));
$("#show-outlines").addEventListener("change", ({ target }) => store.look({ outlines: target.checked }));
$("#single-keys").checked = localStorage.getItem(SINGLE_KEYS) !== "no";
$("#single-keys").addEventListener("change", ({ target }) =>
  localStorage.setItem(SINGLE_KEYS, target.checked ? "yes" : "no"),
);

function render(state) {
  options.render(state);
  form.render(state);
  renderPrompts(state);
  rows.render(state);
  $("#undo").disabled = !store.canUndo();
  $("#redo").disabled = !store.canRedo();
  $("#clear").disabled = !state.doc.prompts.length;
  $("#show-masks").checked = state.view.masks;
}

store.subscribe((state, previous) => {
  render(state);
  if (state.doc !== previous.doc && viewer.image() && !video.isOpen()) asker.update();
});
render(store.get());

api
  .getModel()
  .then((found) => {
    model = found;
    showModel(model, (phrase) => (viewer.image() ? form.submit([phrase]) : warn("Open an image first.")));
    options.restrict(model);
  })
  .catch((error) => warn(error.message));
