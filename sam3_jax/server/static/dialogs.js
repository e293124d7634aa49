// The dialogs: keys and help, the model's card.

import { $, h, plural } from "./dom.js";
import { HELP } from "./keys.js";

const MODES = [
  ["Phrase", "finds all instances of a noun phrase, such as “lion”."],
  ["Exemplar", "finds everything like a positive box, and nothing like a negative one."],
  ["Click", "segments the object under a click; more clicks add or remove parts."],
  ["Box", "segments the object inside a box."],
  ["Refine", "changes the selected instance by clicks."],
  ["Everything", "segments the whole image with a grid of points."],
];

/** Makes the dialogs close by their button and by a click beside them. */
export function prepareDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector("[data-close]").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  }
  const keys = HELP.flatMap(([names, text]) => [
    h("dt", {}, ...names.flatMap((name, i) => [i ? " " : "", h("kbd", {}, name)])),
    h("dd", {}, text),
  ]);
  const modes = MODES.flatMap(([name, text]) => [h("dt", {}, name), h("dd", {}, text)]);
  $("#help-body").append(h("dl", { class: "facts" }, ...modes), h("dl", { class: "keys" }, ...keys));
}

export const openHelp = () => $("#help").showModal();

/** Fills the model's card; `use(phrase)` is called for a chosen concept. */
export function showModel(model, use) {
  const { name, licence, description, concepts, trained, version, image_size: side } = model;
  const short = concepts ? `${name} · knows ${plural(concepts.length, "object")}` : `${name} · ${licence ?? "license unknown"}`;
  $("#model-button").textContent = short;
  $("#model-button").title = "About the model";
  $("#model-button").addEventListener("click", () => $("#model").showModal());
  const facts = { Name: name, License: licence ?? "unknown", Input: `${side} × ${side} pixels`, "sam3-jax": version };
  const rows = Object.entries(facts).flatMap(([key, value]) => [h("dt", {}, key), h("dd", {}, String(value))]);
  const parts = [h("p", {}, description ?? ""), h("dl", { class: "facts" }, ...rows)];
  if (!trained) parts.unshift(h("p", { class: "hint" }, "This model is not trained: its results are meaningless."));
  if (concepts) parts.push(listOf(concepts, use));
  $("#model-body").replaceChildren(...parts);
}

function listOf(concepts, use) {
  const choose = (phrase) => () => {
    $("#model").close();
    use(phrase);
  };
  const buttons = concepts.map((phrase) =>
    h("li", {}, h("button", { type: "button", onClick: choose(phrase) }, phrase)),
  );
  return h(
    "section",
    { class: "dialog-body", "aria-label": "Concepts" },
    h("p", {}, h("strong", {}, `It knows ${plural(concepts.length, "object")}.`), " Choose one to use it as a phrase."),
    h("ul", { class: "concepts" }, ...buttons),
  );
}
