// The tools and their options: hint, positive or negative, new object, everything.

import { $ } from "./dom.js";

const HINTS = {
  exemplar: "Draw a box around one example to find all objects like it. Negative boxes exclude objects.",
  click: "Click on an object. Further clicks add to it, or remove with Negative.",
  box: "Draw a box around one object.",
  refine: "Select an instance, then click where it should grow, or with Negative where it should shrink.",
  everything: "Segments the whole image, with a grid of points.",
};
const SIGNED = ["exemplar", "click", "refine"];

export function createOptions(store, tools, say) {
  const radios = (name) => [...document.querySelectorAll(`input[name=${name}]`)];

  for (const radio of radios("mode")) {
    radio.addEventListener("change", () => setMode(radio.value));
  }
  for (const radio of radios("sign")) {
    radio.addEventListener("change", () => store.look({ positive: radio.value === "1" }));
  }
  $("#new-object").addEventListener("click", () => newObject());
  $("#segment-everything").addEventListener("click", () => tools.everything(Number($("#side").value)));

  function setMode(mode) {
    if (radios("mode").find((radio) => radio.value === mode).disabled) return;
    const { active } = store.get().view;
    const kind = store.get().doc.prompts.find(({ key }) => key === active)?.kind;
    const keeps = { exemplar: kind === "concept", click: kind === "object" }[mode] ?? true;
    store.look({ mode, positive: true, active: keeps ? active : null });
  }

  function newObject() {
    store.look({ active: null, positive: true });
    say("The next click or box starts a new object.");
  }

  function render({ view: { mode, positive, ready, active } }) {
    document.body.className = document.body.className.replace(/mode-\w+/, "").trim();
    document.body.classList.add(`mode-${mode}`);
    for (const radio of radios("mode")) radio.checked = radio.value === mode;
    for (const radio of radios("sign")) radio.checked = (radio.value === "1") === positive;
    $("#options").hidden = mode === "phrase";
    if ($("#hint").textContent !== HINTS[mode]) $("#hint").textContent = HINTS[mode] ?? "";
    $("#sign").hidden = !SIGNED.includes(mode);
    $("#new-object").hidden = mode !== "click" && mode !== "exemplar";
    $("#new-object").textContent = mode === "exemplar" ? "New concept" : "New object";
    $("#new-object").disabled = active === null;
    $("#side-label").hidden = $("#segment-everything").hidden = mode !== "everything";
    $("#segment-everything").disabled = $("#phrase").disabled = $("#add-phrase").disabled = !ready;
    $("#load-coco").disabled = !ready;
  }

  /** Turns off the tools that a model without a head for visual prompts lacks. */
  function restrict({ visual }) {
    for (const radio of radios("mode")) {
      const needs = ["click", "box", "refine", "everything"].includes(radio.value);
      radio.disabled = needs && !visual;
      if (radio.disabled) radio.parentElement.title = "This checkpoint has no head for visual prompts.";
    }
  }

  return { render, setMode, newObject, restrict };
}
