// The list of instances: hover links it with the image; select, refine, rename, delete, merge.

import { css } from "./colors.js";
import { $, h, iconButton, keyed, put } from "./dom.js";
import { allInstances, merge } from "./instances.js";
import * as prompts from "./prompts.js";
import { visibleInstances } from "./viewer.js";

export function createInstanceList(store, say) {
  const list = $("#instances");
  const byId = (id) => allInstances(store.get().doc).find((one) => one.id === id);
  const hover = (hovered) => hovered !== store.get().view.hovered && store.look({ hovered });

  list.addEventListener("mouseover", ({ target }) => hover(target.closest("li")?.dataset.key ?? null));
  list.addEventListener("mouseleave", () => hover(null));
  list.addEventListener("focusin", ({ target }) => hover(target.closest("li")?.dataset.key ?? null));
  list.addEventListener("focusout", () => hover(null));

  function create({ id }) {
    const select = ({ ctrlKey, shiftKey, metaKey }) => {
      const { selected } = store.get().view;
      const several = ctrlKey || shiftKey || metaKey;
      const rest = selected.filter((one) => one !== id);
      const others = several ? rest : [];
      store.look({ selected: selected.includes(id) && (several || !rest.length) ? others : [...others, id] });
    };
    const check = ({ target }) => {
      const rest = store.get().view.selected.filter((one) => one !== id);
      store.look({ selected: target.checked ? [...rest, id] : rest });
    };
    return h(
      "li",
      { class: "instance" },
      h("input", { type: "checkbox", onChange: check }),
      h("span", { class: "swatch" }),
      h("button", { type: "button", class: "name", onClick: select }, h("span", { class: "text" })),
      h("span", { class: "score" }),
      h("span", { class: "actions" },
        iconButton("refine", "Refine", () => store.look({ mode: "refine", selected: [id] }), { "data-action": "Refine" }),
        iconButton("rename", "Rename", () => rename(id), { "data-action": "Rename" }),
        iconButton("trash", "Delete", () => remove([id]), { "data-action": "Delete" })),
    );
  }

  function update(element, { name, score, color }, number) {
    element.style.setProperty("--color", css(color));
    put(element.querySelector(".text"), "textContent", name);
    put(element.querySelector(".score"), "textContent", score == null ? "" : score.toFixed(2));
    element.querySelector("input[type=checkbox]").setAttribute("aria-label", `Select ${name} ${number}`);
    for (const button of element.querySelectorAll("[data-action]")) {
      button.setAttribute("aria-label", `${button.dataset.action} ${name} ${number}`);
    }
  }

  function rename(id) {
    const { key, index, name } = byId(id);
    const button = list.querySelector(`[data-key="${id}"] .name`);
    let done = false;
    const finish = (keep) => {
      if (done) return;
      done = true;
      const text = field.value.trim();
      field.replaceWith(button);
      button.focus();
      if (keep && text && text !== name) store.commit((doc) => prompts.edit(doc, key, index, { name: text }));
    };
    const field = h("input", {
      type: "text", value: name, maxlength: 200, "aria-label": `Name of ${name}`,
      onBlur: () => finish(true),
      onKeydown: (event) => {
        event.stopPropagation();
        if (event.key !== "Enter" && event.key !== "Escape") return;
        event.preventDefault(); // or Enter would also press the button that returns
        finish(event.key === "Enter");
      },
    });
    button.replaceWith(field);
    field.select();
    field.focus();
  }

  /** Those of the instances that still exist. */
  const existing = (ids) => ids.map(byId).filter(Boolean);

  function remove(ids = store.get().view.selected) {
    const chosen = existing(ids);
    if (!chosen.length) return say("Select an instance first.");
    const focused = list.contains(document.activeElement);
    const change = (doc, { key, index }) => prompts.edit(doc, key, index, { deleted: true });
    store.commit((doc) => chosen.reduce(change, doc));
    store.look({ selected: [], hovered: null });
    if (focused) (list.querySelector(".name") ?? $("#phrase")).focus();
    say(`Deleted ${chosen.length === 1 ? chosen[0].name : `${chosen.length} instances`}.`);
  }

  function mergeSelected() {
    const selected = existing(store.get().view.selected).map(({ id }) => id);
    if (selected.length < 2) return say("Select two or more instances to merge.");
    const first = allInstances(store.get().doc).find((one) => selected.includes(one.id));
    store.commit((doc) => merge(doc, selected));
    store.look({ selected: [first.id] });
    say(`Merged ${selected.length} instances.`);
  }

  /** Selects the next or the previous instance. */
  function step(by) {
    const ids = visibleInstances(store.get()).map((one) => one.id);
    if (!ids.length) return;
    const at = ids.indexOf(store.get().view.selected[0]);
    const id = ids[at < 0 ? (by > 0 ? 0 : ids.length - 1) : (at + by + ids.length) % ids.length];
    store.look({ selected: [id] });
    const { name, score, box } = byId(id);
    say(`${name}${score == null ? "" : ` ${score.toFixed(2)}`}, at ${box.slice(0, 2).map(Math.round).join(", ")}`);
  }

  $("#delete").addEventListener("click", () => remove());
  $("#merge").addEventListener("click", mergeSelected);
  let drawn = null; // the documents and hidden prompts of the rows

  function render(state) {
    const { doc, view } = state;
    if (drawn?.doc !== doc || drawn.hidden !== view.hidden) {
      drawn = { doc, hidden: view.hidden };
      const shown = visibleInstances(state);
      let number = 0;
      keyed(list, shown, ({ id }) => id, create, (element, one) => update(element, one, ++number));
      put($("#count"), "textContent", String(shown.length));
      for (const id of ["save-coco", "save-masks", "save-overlay"]) $(`#${id}`).disabled = !shown.length;
    }
    for (const row of list.children) {
      const selected = view.selected.includes(row.dataset.key);
      row.classList.toggle("hovered", view.hovered === row.dataset.key);
      if (selected && !row.classList.contains("selected") && view.selected.length === 1) {
        row.scrollIntoView({ block: "nearest" });
      }
      row.classList.toggle("selected", selected);
      row.querySelector("input").checked = selected;
    }
    const count = existing(view.selected).length;
    $("#delete").disabled = !count;
    $("#merge").disabled = count < 2;
  }

  return { render, remove, merge: mergeSelected, step };
}
