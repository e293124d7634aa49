// The instances of a document, with all edits applied.

import { color } from "./colors.js";
import { area, bounds, decodeRuns, fromRuns, union } from "./rle.js";
import { edit } from "./prompts.js";

const cache = new WeakMap(); // prompt -> instances: prompts never change

/**
 * The instances of a prompt, best first, without the deleted ones.
 *
 * Each is {id, key, index, name, score, box, area, mask, color, shown}; `shown` says whether its
 * score passes the prompt's threshold.
 */
export function instancesOf(prompt) {
  if (!cache.has(prompt)) cache.set(prompt, build(prompt));
  return cache.get(prompt);
}

export const allInstances = (doc) => doc.prompts.flatMap(instancesOf);

/** The color of a prompt. */
export const colorOf = (prompt) => color(prompt.key);

function build(prompt) {
  const answers = prompt.answer?.instances ?? [];
  const indices =
    prompt.kind === "object" ? (answers.length ? [prompt.choice] : []) : [...answers.keys()];
  return indices
    .map((index) => {
      const { name, deleted, mask, box, area: size } = prompt.edits[index] ?? {};
      const found = answers[index];
      const several = prompt.kind === "everything" || prompt.kind === "fixed";
      return {
        id: `${prompt.key}-${index}`,
        key: prompt.key,
        index,
        deleted: Boolean(deleted),
        name: name ?? found.name ?? prompt.name,
        score: found.score,
        box: box ?? found.box,
        area: size ?? found.area,
        mask: mask ?? found.mask,
        color: several ? color(prompt.key + index) : colorOf(prompt),
        shown: found.score == null || found.score >= prompt.threshold,
      };
    })
    .filter((one) => !one.deleted);
}

/** Merges instances into the first of them; the others are deleted. */
export function merge(doc, ids) {
  const chosen = allInstances(doc).filter((one) => ids.includes(one.id));
  if (chosen.length < 2) return doc;
  const { size } = chosen[0].mask;
  const runs = chosen.map((one) => decodeRuns(one.mask)).reduce(union);
  const values = { mask: fromRuns(runs, size), box: bounds(runs, size[0]), area: area(runs) };
  const [first, ...others] = chosen;
  // A refinement would go on from the mask before; its clicks belong to that mask.
  let next = edit(doc, first.key, first.index, { ...values, refine: undefined });
  for (const one of others) next = edit(next, one.key, one.index, { deleted: true });
  return next;
}
