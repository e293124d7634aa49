// What the page tells: a status line that screen readers read, times, and alerts.

import { $, plural } from "./dom.js";
import { instancesOf } from "./instances.js";
import * as prompts from "./prompts.js";

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

/** Tells what the asker does; see asker.js. */
export function createReport(store) {
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
    done({ total, milliseconds, work }) {
      clearWarning();
      const texts = new Set(work.map(({ key }) => countOf(prompts.find(store.get().doc, key))));
      say([...texts].filter(Boolean).join(", "));
      showTimes({ decode: milliseconds.decode, total });
    },
    failed(error, work, again) {
      busy(false);
      const names = [...new Set(work.map(({ prompt }) => prompt.name))].join(", ");
      say("");
      const remedy = error.code === "unauthorized" ? " Open the address that the server printed, with its token." : "";
      warn(`${names}: ${error.message}${remedy}`, again);
    },
  };
}

function countOf(prompt) {
  if (!prompt?.answer) return "";
  const count = instancesOf(prompt).filter((one) => one.shown).length;
  return `${prompt.name}: ${plural(count, "instance")}`;
}
