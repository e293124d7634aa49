// COCO JSON, with the fields that `sam3-jax segment` writes: export, and import to go on.

import { visibleInstances } from "./viewer.js";
import { add, asGrid, empty, signature } from "./prompts.js";
import { area, bounds, decodeRuns, fromRuns } from "./rle.js";

/** The visible instances as a COCO dataset. */
export function toCoco(state, image, model) {
  const [width, height] = image.size;
  const shown = visibleInstances(state);
  const prompts = state.doc.prompts.filter(({ key, draft }) => !draft && !state.view.hidden.includes(key));
  const names = [...new Set([...prompts.map(({ name }) => name), ...shown.map(({ name }) => name)])];
  const sorted = names.flatMap((name) =>
    shown.filter((one) => one.name === name).sort((a, b) => (b.score ?? 0) - (a.score ?? 0)),
  );
  return {
    info: infoOf(prompts, model),
    images: [{ id: 1, file_name: image.name, width, height }],
    categories: names.map((name, i) => ({ id: i + 1, name })),
    annotations: sorted.map((one, i) => ({
      id: i + 1,
      ...(one.score == null ? {} : { score: one.score }),
      bbox: bboxOf(one.box, width, height),
      area: one.area,
      segmentation: one.mask,
      image_id: 1,
      category_id: names.indexOf(one.name) + 1,
      iscrowd: 0,
    })),
  };
}

function infoOf(prompts, { name, licence, version }) {
  const of = (wanted) => prompts.filter(({ kind }) => kind === wanted);
  const [everything] = of("everything");
  const concepts = of("concept");
  return {
    description: `sam3-jax ${version}`,
    checkpoint: { name, licence },
    threshold: concepts.length ? Math.min(...concepts.map(({ threshold }) => threshold)) : 0,
    everything: everything ? asGrid(everything) : null,
    visual_prompts: of("object").map(({ name: own, points, box }) => ({
      name: own,
      points: points.map(({ x, y }) => [x, y]),
      point_labels: points.map(({ label }) => label),
      box,
    })),
    prompts: concepts.map(({ phrase, boxes, threshold }) => ({
      text: phrase,
      boxes: boxes.map(({ box }) => box),
      box_labels: boxes.map(({ label }) => label),
      threshold,
    })),
  };
}

/** x, y, width, height, clipped to the image. */
function bboxOf([x0, y0, x1, y1], width, height) {
  const clip = (value, limit) => Math.min(limit, Math.max(0, value));
  const [left, top] = [clip(x0, width), clip(y0, height)];
  return [left, top, clip(x1, width) - left, clip(y1, height) - top];
}

/**
 * A document from a COCO dataset of the open image.
 *
 * Prompts of `info` that name a category can be changed; other categories keep their instances.
 * Throws an Error with a message for the user.
 */
export function fromCoco(text, image) {
  const data = parse(text);
  try {
    return documentOf(data, image);
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    throw new Error("its fields are not those of a COCO dataset", { cause: error });
  }
}

function documentOf(data, { size: [width, height] }) {
  const image = data.images.find((one) => one.width === width && one.height === height);
  if (!image) {
    const [{ width: w, height: h } = {}] = data.images;
    throw new Error(`the file is for an image of ${w} x ${h} pixels, but the open one has ${width} x ${height}`);
  }
  let doc = empty();
  for (const { id, name } of data.categories) {
    const own = data.annotations.filter((one) => one.category_id === id && one.image_id === image.id);
    const instances = own.map((one) => instanceOf(one, width, height));
    doc = addCategory(doc, String(name), instances, data.info ?? {});
  }
  return doc;
}

function parse(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("the file is not JSON");
  }
  for (const name of ["images", "categories", "annotations"]) {
    if (!Array.isArray(data?.[name])) throw new Error(`the file is not a COCO dataset: it has no list “${name}”`);
  }
  return data;
}

function instanceOf({ id, score = null, bbox, segmentation }, width, height) {
  if (!segmentation?.counts) throw new Error(`annotation ${id} has no run-length mask`);
  const [h, w] = segmentation.size ?? [];
  if (h !== height || w !== width) throw new Error(`the mask of annotation ${id} has another size than the image`);
  const { counts } = segmentation;
  const mask = Array.isArray(counts) ? fromRuns(counts, [h, w]) : { size: [h, w], counts: String(counts) };
  try {
    const runs = decodeRuns(mask);
    const box = bbox ? [bbox[0], bbox[1], bbox[0] + bbox[2], bbox[1] + bbox[3]] : bounds(runs, h);
    return { score, box, area: area(runs), mask };
  } catch (error) {
    throw new Error(`annotation ${id}: ${error.message}`, { cause: error });
  }
}

function addCategory(doc, name, instances, info) {
  const asked = info.prompts?.find(({ text }) => (text ?? "exemplar boxes") === name);
  const side = name === "everything" && info.everything?.points_per_side;
  const visual = instances.length === 1 && info.visual_prompts?.find((one) => one.name === name);
  if (!asked && !side && !instances.length) return doc;
  let prompt = { kind: "fixed", name };
  if (asked) {
    const boxes = asked.boxes.map((box, i) => ({ box, label: asked.box_labels[i] ?? 1 }));
    const threshold = asked.threshold ?? info.threshold ?? 0.5;
    prompt = { kind: "concept", name, phrase: asked.text, boxes, threshold };
  } else if (side) prompt = { kind: "everything", name, side };
  else if (visual) {
    const points = visual.points.map(([x, y], i) => ({ x, y, label: visual.point_labels[i] ?? 1 }));
    prompt = { kind: "object", name, points, box: visual.box ?? null };
  }
  const next = add(doc, prompt);
  const last = next.prompts.at(-1);
  last.answer = { signature: signature(last), instances }; // `last` is new: nobody has seen it
  const several = prompt.kind === "fixed" || prompt.kind === "everything";
  const width = several ? Math.max(1, instances.length) : 1; // colors it takes
  return { ...next, next: last.key + width };
}
