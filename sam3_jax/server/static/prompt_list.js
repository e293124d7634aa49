// The list of prompts: color, name, count, visibility, threshold.

import { css } from "./colors.js";
import { $, h, icon, iconButton, keyed, put } from "./dom.js";
import { colorOf, instancesOf } from "./instances.js";
import * as prompts from "./prompts.js";

/** `hasFailed(prompt)` says whether the server refused a prompt. */
export function createPromptList(store, hasFailed, say) {
  const list = $("#prompts");

  function create({ key }) {
    const range = h("input", {
      type: "range", min: 0, max: 1, step: 0.01,
      onInput: ({ target }) => {
        const threshold = Number(target.value);
        store.commit((doc) => prompts.change(doc, key, { threshold }), `threshold ${key}`);
      },
    });
    const choose = () => {
      const { active } = store.get().view;
      store.look({ active: active === key ? null : key });
    };
    const toggle = () => {
      const { hidden } = store.get().view;
      store.look({ hidden: hidden.includes(key) ? hidden.filter((one) => one !== key) : [...hidden, key] });
    };
    const remove = () => {
      const next = document.activeElement?.closest("li")?.nextElementSibling;
      const { name } = prompts.find(store.get().doc, key);
      store.commit((doc) => prompts.remove(doc, key));
      say(`Removed ${name}.`);
      (next?.querySelector(".name") ?? $("#phrase")).focus();
    };
    return h(
      "li",
      { class: "prompt" },
      h(
        "div",
        { class: "row" },
        h("button", { type: "button", class: "name", onClick: choose },
          h("span", { class: "swatch" }), h("span", { class: "text" })),
        h("button", { type: "button", class: "secondary small choice", onClick: () => cycle(key) }),
        h("span", { class: "count" }),
        iconButton("eye", "Hide", toggle, { class: "icon-button eye" }),
        iconButton("close", "Remove", remove, { class: "icon-button remove" }),
      ),
      h("label", { class: "range" }, h("span", { class: "muted" }, "Threshold"), range, h("output", {})),
    );
  }

  /** The next of the multimask outputs of a click. */
  function cycle(key) {
    const { answer, choice } = prompts.find(store.get().doc, key);
    const next = (choice + 1) % answer.instances.length;
    store.commit((doc) => prompts.change(doc, key, { choice: next }));
  }

  function update(element, prompt) {
    const { view } = store.get();
    const instances = instancesOf(prompt);
    const several = prompt.kind === "everything" || (prompt.kind === "fixed" && instances.length > 1);
    const get = (selector) => element.querySelector(selector);
    element.classList.toggle("active", view.active === prompt.key);
    get(".name").setAttribute("aria-pressed", view.active === prompt.key);
    put(get(".text"), "textContent", titleOf(prompt));
    put(get(".text"), "title", titleOf(prompt));
    element.style.setProperty("--color", several ? "transparent" : css(colorOf(prompt)));
    const shown = instances.filter((one) => one.shown).length;
    const failed = hasFailed(prompt);
    const unanswered = failed ? "failed" : "…";
    put(get(".count"), "textContent", prompt.answer ? String(shown) : unanswered);
    get(".count").setAttribute("title", failed ? "The server refused it" : `${shown} of ${instances.length} above the threshold`);
    element.classList.toggle("failed", failed);
    showVisibility(get(".eye"), view.hidden.includes(prompt.key), prompt.name);
    get(".remove").setAttribute("aria-label", `Remove ${prompt.name}`);
    const masks = prompt.answer?.instances.length ?? 0;
    get(".choice").hidden = prompt.kind !== "object" || masks < 2;
    put(get(".choice"), "textContent", `Mask ${prompt.choice + 1} of ${masks}`);
    get(".range").hidden = prompt.kind === "object";
    get(".range input").setAttribute("aria-label", `Threshold of ${prompt.name}`);
    put(get(".range input"), "value", String(prompt.threshold));
    put(get(".range output"), "textContent", prompt.threshold.toFixed(2));
  }

  function showVisibility(button, hidden, name) {
    button.setAttribute("aria-label", `${hidden ? "Show" : "Hide"} ${name}`);
    button.title = hidden ? "Show" : "Hide";
    if (button.dataset.hidden === String(hidden)) return;
    button.dataset.hidden = hidden;
    button.replaceChildren(icon(hidden ? "eye-off" : "eye"));
  }

  return function render({ doc }) {
    keyed(list, doc.prompts, ({ key }) => key, create, update);
    $("#no-prompts").hidden = doc.prompts.length > 0;
  };
}

/** A prompt's name with the number of its exemplar boxes or clicks. */
function titleOf({ name, kind, boxes, points }) {
  const signs = kind === "object" ? points.map(({ label }) => label) : boxes.map(({ label }) => label);
  if (!signs.length) return name;
  const positive = signs.filter(Boolean).length;
  const parts = [positive && `${positive} +`, signs.length - positive && `${signs.length - positive} −`];
  return `${name} (${parts.filter(Boolean).join(", ")})`;
}
