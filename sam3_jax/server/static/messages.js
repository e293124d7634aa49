// What the page tells: a status line that screen readers read, times, and alerts.

import { $, plural } from "./dom.js";
import { instancesOf } from "./instances.js";
import * as prompts from "./prompts.js";

const LONGEST = 40; // characters of a prompt's name in an alert

let timer = 0;
let repeat = null;

/** A line of text about what has just happened. */
export function say(text) {
  $("#status").textContent = text;
}

/** Text for screen readers only, such as the place of the cursor; the last of several counts. */
export function announce(text) {
  clearTimeout(timer);
  timer = setTimeout(() => {
    $("#live").textContent = text;
  }, 250);
}

/**
 * A message about a fault; it stays until it is closed or the next action succeeds. `again` repeats
 * the action.
 */
export function warn(text, again = null) {
  $("#alert-text").textContent = text;
  $("#alert").hidden = false;
  $("#alert-retry").hidden = !again;
  repeat = again;
}

export function clearWarning() {
  $("#alert").hidden = true;
}

$("#alert-close").addEventListener("click", () => {
  clearWarning();
  $("#canvas").focus();
});

$("#alert-retry").addEventListener("click", () => {
  clearWarning();
  $("#canvas").focus();
  repeat?.();
});

const ms = (value) => (value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`);

export function showTimes(parts) {
  const texts = Object.entries(parts).map(([name, value]) => `${name} ${ms(value)}`);
  $("#times").textContent = texts.join(" · ");
}

/** Tells what the asker does; see asker.js. `known()` is the list of all concepts, if there is one. */
export function createReport(store, known) {
  const busy = (on) => {
    $("#busy").hidden = !on;
    document.body.toggleAttribute("data-busy", on);
  };
  return {
    started(work) {
      busy(true);
      if (work[0].type === "everything") say("Segmenting everything…");
    },
    idle: () => busy(false),
    done({ total, milliseconds, work, failing }) {
      if (!failing) clearWarning();
      const texts = new Set(work.map(({ key }) => countOf(prompts.find(store.get().doc, key), known())));
      say([...texts].filter(Boolean).join(", "));
      showTimes({ decode: milliseconds.decode, total });
    },
    failed(error, work, again) {
      busy(false);
      const names = [...new Set(work.map(({ prompt }) => shortened(prompt.name)))].join(", ");
      say("");
      const place = /^(concepts|visual)(\[\d+\])?: /; // says which prompt it is, as `names` does
      warn(`${names}: ${error.message.replace(place, "")}`, again);
    },
  };
}

const shortened = (name) => (name.length > LONGEST ? `${name.slice(0, LONGEST - 1)}…` : name);

function countOf(prompt, known) {
  if (!prompt?.answer) return "";
  const count = instancesOf(prompt).filter((one) => one.shown).length;
  const unknown = !count && known && prompt.phrase && !known.includes(prompt.phrase.toLowerCase());
  return `${prompt.name}: ${plural(count, "instance")}${unknown ? " (the model may not know it)" : ""}`;
}
