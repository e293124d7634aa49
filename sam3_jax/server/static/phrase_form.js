// The field for phrases: results while typing, a prompt for each phrase on Enter.

import { $, h } from "./dom.js";
import { clean, keep, preview } from "./prompts.js";

const PAUSE = 60; // milliseconds without a key before the phrase is tried
const SHORTEST = 3; // letters of a phrase that is tried while it is typed

/** `elsewhere()` is a function that takes the phrases of a video, or null. */
export function createPhraseForm(store, say, elsewhere) {
  const input = $("#phrase");
  let timer = 0;

  input.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(tryOut, PAUSE);
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    input.value = "";
    tryOut();
  });
  $("#phrase-form").addEventListener("submit", (event) => {
    event.preventDefault();
    clearTimeout(timer);
    const phrases = input.value.split(",").map((text) => text.trim()).filter(Boolean);
    input.value = "";
    submit(phrases);
  });

  function tryOut() {
    if (elsewhere()) return;
    const text = input.value.split(",").at(-1).trim();
    const known = store.get().doc.prompts.some((one) => !one.draft && one.phrase === text);
    store.preview((doc) => (text.length < SHORTEST || known ? clean(doc) : preview(doc, text)));
  }

  /** Adds a prompt for each phrase, or chooses the prompt that has it. */
  function submit(phrases) {
    const other = elsewhere();
    if (other) return other(phrases);
    const { doc } = store.get();
    const isNew = (phrase) => !doc.prompts.some((one) => !one.draft && one.phrase === phrase);
    const added = [...new Set(phrases)].filter(isNew);
    const draft = doc.prompts.find((one) => one.draft && !added.includes(one.phrase));
    if (draft) store.preview(clean);
    if (added.length) store.commit((current) => added.reduce(keep, current));
    const last = store.get().doc.prompts.findLast((one) => one.phrase === phrases.at(-1));
    if (last) store.look({ active: last.key });
    if (phrases.length && !added.length) say(`“${phrases.at(-1)}” is already among the prompts.`);
    return undefined;
  }

  function suggest(phrases) {
    const choose = (phrase) => () => {
      submit([phrase]);
      input.focus();
    };
    const buttons = phrases.map((phrase) =>
      h("li", {}, h("button", { type: "button", onClick: choose(phrase) }, phrase)),
    );
    $("#suggestions").replaceChildren(...buttons);
  }

  /** Hides the suggestions that are among the prompts. */
  function render({ doc }) {
    const phrases = new Set(doc.prompts.map(({ phrase }) => phrase));
    for (const item of $("#suggestions").children) item.hidden = phrases.has(item.textContent);
    $("#suggestions").hidden = [...$("#suggestions").children].every((item) => item.hidden);
  }

  return { render, submit, suggest, focus: () => input.focus() };
}
