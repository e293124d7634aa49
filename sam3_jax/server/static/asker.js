// Asks the server for the answers that the document lacks, and stores them.

import * as api from "./api.js";
import {
  answer, answerRefinement, asConcept, asGrid, asVisual, isStale, LOWEST, signature, staleRefinements,
} from "./prompts.js";

/**
 * After every change of the document, all prompts without an answer go out in one request. A
 * request that the document no longer needs is aborted.
 *
 * `report` has started(work), done({total, milliseconds, work, failing}), failed(error, work, retry),
 * idle(). `failing` says whether prompts that the server refused are left.
 */
export function createAsker(store, session, report) {
  let running = null; // {wanted, controller}
  const failed = new Set(); // signatures that the server refused, so as not to repeat them

  function update() {
    const work = missing(store.get().doc, failed);
    const wanted = JSON.stringify(work.map(({ id }) => id));
    if (running?.wanted === wanted) return;
    running?.controller.abort();
    running = null;
    if (!work.length) return report.idle();
    const controller = new AbortController();
    running = { wanted, controller };
    run(work, controller.signal)
      .catch((error) => {
        if (controller.signal.aborted || error.name === "AbortError") return;
        const refused = atFault(error, work);
        for (const { id } of refused) failed.add(id);
        report.failed(error, refused, retry);
        store.look({}); // shows which prompts failed
      })
      .finally(() => {
        if (running?.controller !== controller) return;
        running = null;
        update();
      });
  }

  async function run(work, signal) {
    report.started(work);
    const start = performance.now();
    const everything = work.filter(({ type }) => type === "everything");
    const quick = work.filter(({ type }) => type !== "everything");
    if (quick.length) {
      const found = await session.ask((id) => api.prompt(id, bodyOf(quick), signal), signal);
      if (signal.aborted) return;
      const total = performance.now() - start;
      store.amend((doc) => storeAnswers(doc, quick, found));
      report.done({ total, milliseconds: found.milliseconds, work: quick, failing: isFailing() });
      return; // `update` runs again and finds the rest
    }
    const [one] = everything;
    const body = { ...asGrid(one.prompt), format: "rle" };
    const found = await session.ask((id) => api.everything(id, body, signal), signal);
    if (signal.aborted) return;
    const total = performance.now() - start;
    store.amend((doc) => answer(doc, one.key, one.own, found.instances));
    report.done({ total, milliseconds: found.milliseconds, work: [one], failing: isFailing() });
  }

  const isFailing = () => open(store.get().doc).some(({ id }) => failed.has(id));

  function retry() {
    failed.clear();
    update();
  }

  return {
    update,

    /** Whether the server refused a prompt, or a refinement of its instances. */
    hasFailed: (prompt) => failed.size > 0 && questions(prompt).some(({ id }) => failed.has(id)),

    /** For another image. */
    reset: () => failed.clear(),
  };
}

/** The work that an error names, such as "visual[1]: ..."; all of it if it names none. */
function atFault({ message }, work) {
  const [, list, index] = /^(concepts|visual)[[.](\d+)/.exec(message) ?? [];
  const named = work.filter((one) => (list === "visual" ? isVisual(one) : one.type === "concept"))[index];
  return list && named ? [named] : work;
}

/** What a prompt has no answer to: [{id, type, key, ...}]; `id` names the question. */
function questions(prompt) {
  const work = [];
  const { key, kind } = prompt;
  if (isStale(prompt)) {
    const own = signature(prompt);
    work.push({ id: `${key} ${own}`, type: kind, key, own, prompt });
  }
  for (const [index, refine] of staleRefinements(prompt)) {
    const id = `${key} ${index} ${JSON.stringify(refine.points)}`;
    work.push({ id, type: "refine", key, index, refine, prompt });
  }
  return work;
}

const open = (doc) => doc.prompts.flatMap(questions);

/** What to ask next. */
function missing(doc, failed) {
  const left = open(doc).filter(({ id }) => !failed.has(id));
  const quick = left.filter(({ type }) => type !== "everything");
  return quick.length ? quick : left.slice(0, 1);
}

const isVisual = ({ type }) => type === "object" || type === "refine";

const bodyOf = (work) => ({
  concepts: work.filter(({ type }) => type === "concept").map(({ prompt }) => asConcept(prompt)),
  visual: work.filter(isVisual).map(({ prompt, refine }) => asVisual(refine ?? prompt)),
  threshold: LOWEST,
  format: "rle",
});

function storeAnswers(doc, work, found) {
  const concepts = work.filter(({ type }) => type === "concept");
  const visual = work.filter(isVisual);
  let next = doc;
  concepts.forEach(({ key, own }, i) => {
    next = answer(next, key, own, found.concepts[i].instances);
  });
  visual.forEach(({ key, own, index, refine }, i) => {
    const { masks } = found.visual[i];
    next = refine
      ? answerRefinement(next, key, index, refine, masks[0])
      : answer(next, key, own, masks);
  });
  return next;
}
