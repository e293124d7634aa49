// Documents: prompts with their answers, and functions that return a changed document.
//
// A document is {prompts, next}; `next` numbers the prompts and so chooses their colors.
//   concept     {kind, key, phrase, boxes: [{box, label}], ...}
//   object      {kind, key, points: [{x, y, label}], box, choice, ...}: one object; `choice` is one
//               of its multimask outputs
//   everything  {kind, key, side, ...}: points per side of the grid
//   fixed       {kind, key, ...}: instances from a file, which no prompt of ours found
// Each has `name`, `threshold`, `answer` {signature, instances}, and `edits` {index: changes} of its
// instances: name, deleted, mask with box and area, and `refine` {base, points, answer}.

export const LOWEST = 0.1; // score of instances that are asked for; the page filters above it

const DEFAULT = { concept: 0.5, object: 0, everything: 0.8, fixed: 0 };

/** Options of the mask generator; lower limits than SAM's, as the page filters above them. */
export const asGrid = ({ side }) => ({
  points_per_side: side,
  pred_iou_thresh: 0.5,
  stability_score_thresh: 0.85,
});

export const empty = () => ({ prompts: [], next: 0 });

export const find = (doc, key) => doc.prompts.find((prompt) => prompt.key === key);

/** Adds a prompt; `prompt` has at least its kind. */
export function add(doc, prompt) {
  const key = doc.next;
  const full = {
    phrase: null, boxes: [], points: [], box: null, choice: 0, side: 16, edits: {}, answer: null,
    threshold: DEFAULT[prompt.kind], key, ...prompt,
  };
  full.name ??= full.phrase ?? nameOf(doc, full);
  return { ...doc, next: key + 1, prompts: [...doc.prompts, full] };
}

function nameOf(doc, { kind, box }) {
  const base = { concept: "exemplar boxes", everything: "everything", fixed: "imported" }[kind] ??
    (box ? "box" : "click");
  const taken = new Set(doc.prompts.map((prompt) => prompt.name));
  if (kind === "concept" && !taken.has(base)) return base;
  if (kind !== "object" && kind !== "concept") return base;
  let number = 1;
  while (taken.has(`${base} ${number}`)) number++;
  return `${base} ${number}`;
}

export const change = (doc, key, values) => ({
  ...doc,
  prompts: doc.prompts.map((prompt) => (prompt.key === key ? { ...prompt, ...values } : prompt)),
});

export const remove = (doc, key) => ({
  ...doc,
  prompts: doc.prompts.filter((prompt) => prompt.key !== key),
});

/** The document without a draft: a concept whose phrase is being typed. */
export const clean = (doc) =>
  doc.prompts.some(({ draft }) => draft)
    ? { ...doc, prompts: doc.prompts.filter(({ draft }) => !draft) }
    : doc;

/** Shows a phrase while it is typed. */
export function preview(doc, phrase) {
  const draft = doc.prompts.find((prompt) => prompt.draft);
  if (draft) return change(doc, draft.key, { phrase, name: phrase });
  return add(doc, { kind: "concept", phrase, draft: true });
}

/** Keeps a phrase, as the last prompt; uses the draft of the same phrase, with its answer. */
export function keep(doc, phrase) {
  const draft = doc.prompts.find((prompt) => prompt.draft && prompt.phrase === phrase);
  if (!draft) return add(doc, { kind: "concept", phrase });
  return { ...doc, prompts: [...remove(doc, draft.key).prompts, { ...draft, draft: false }] };
}

/** Merges values into the edits of one instance. */
export function edit(doc, key, index, values) {
  const { edits } = find(doc, key);
  return change(doc, key, { edits: { ...edits, [index]: { ...edits[index], ...values } } });
}

/** Adds a click to the refinement of an instance; its first click starts from `mask`. */
export function refine(doc, key, index, mask, point) {
  const { base = mask, points = [], answer = null } = find(doc, key).edits[index]?.refine ?? {};
  return edit(doc, key, index, { refine: { base, points: [...points, point], answer } });
}

/** What the answer of a prompt depends on, as text; null if it never changes. */
export function signature(prompt) {
  if (prompt.kind === "concept") return JSON.stringify([prompt.phrase, prompt.boxes]);
  if (prompt.kind === "object") return JSON.stringify([prompt.points, prompt.box]);
  return prompt.kind === "everything" ? JSON.stringify(prompt.side) : null;
}

export const isStale = (prompt) => {
  const own = signature(prompt);
  return own !== null && prompt.answer?.signature !== own;
};

/** The refinements of a prompt without an answer to their last click: [index, refine]. */
export const staleRefinements = (prompt) =>
  Object.entries(prompt.edits)
    .filter(([, { refine: one }]) => one && one.answer?.points !== one.points.length)
    .map(([index, { refine: one }]) => [Number(index), one]);

/** Stores an answer if the prompt has not changed since; edits of earlier instances are dropped. */
export function answer(doc, key, own, instances) {
  const prompt = find(doc, key);
  if (!prompt || signature(prompt) !== own || prompt.answer?.signature === own) return doc;
  const choice = prompt.kind === "object" ? best(instances) : 0;
  return change(doc, key, { answer: { signature: own, instances }, edits: {}, choice });
}

/** Stores the answer to the clicks of a refinement. */
export function answerRefinement(doc, key, index, one, mask) {
  const current = find(doc, key)?.edits[index]?.refine;
  if (!current || JSON.stringify(current.points) !== JSON.stringify(one.points)) return doc;
  const values = { refine: { ...current, answer: { points: one.points.length } } };
  return edit(doc, key, index, { ...values, mask: mask.mask, box: mask.box, area: mask.area });
}

const best = (masks) => masks.reduce((top, one, i) => (one.score > masks[top].score ? i : top), 0);

/** The parts of a prompt that the HTTP API takes. */
export const asConcept = ({ phrase, boxes }) => ({
  phrase,
  boxes: boxes.map(({ box }) => box),
  box_labels: boxes.map(({ label }) => label),
});

export const asVisual = ({ points, box = null, base = null }) => ({
  points: points.map(({ x, y }) => [x, y]),
  point_labels: points.map(({ label }) => label),
  box,
  mask: base,
  multimask: !base && !box && points.length < 2,
});
