// What is known of a video: the objects of each frame, and on which frames each object is.

import { color } from "./colors.js";

/** An object of a frame is {id, phrase, score, box, area, mask}, as in the HTTP API. */
export function createTracks(length) {
  const frames = new Map(); // frame -> objects
  const objects = new Map(); // id -> {id, phrase, present: Uint8Array, prompted: Set of frames}
  const clicks = new Map(); // "id frame" -> {points, box}

  function objectOf(id, phrase = null) {
    if (!objects.has(id)) {
      objects.set(id, { id, phrase, present: new Uint8Array(length), prompted: new Set() });
    }
    return objects.get(id);
  }

  const phrases = [];

  function remove(removed) {
    for (const id of removed) objects.delete(id);
    for (const [frame, found] of frames) frames.set(frame, found.filter((one) => !removed.includes(one.id)));
  }

  return {
    length,
    phrases,
    isTracked: (frame) => frames.has(frame),
    at: (frame) => frames.get(frame) ?? [],
    list: () => [...objects.values()].sort((a, b) => a.id - b.id),
    find: (id) => objects.get(id),
    clicksOf: (id, frame) => clicks.get(`${id} ${frame}`) ?? { points: [], box: null },

    /** Stores the objects of a frame. */
    set({ frame, objects: found }) {
      frames.set(frame, found);
      for (const one of objects.values()) one.present[frame] = 0;
      for (const one of found) objectOf(one.id, one.phrase).present[frame] = 1;
    },

    /** Stores the clicks that an object has on a frame. */
    prompt(id, frame, values) {
      objectOf(id).prompted.add(frame);
      clicks.set(`${id} ${frame}`, values);
    },

    remove: (id) => remove([id]),

    /** Removes a phrase and its objects. */
    forget(phrase) {
      phrases.splice(phrases.indexOf(phrase), 1);
      remove([...objects.values()].filter((one) => one.phrase === phrase).map(({ id }) => id));
    },
  };
}

/** The first frame after `frame` on which an object appears; its first one at the end. */
export function nextAppearance({ present }, frame) {
  const starts = runsOf(present).map(([first]) => first);
  return starts.find((first) => first > frame) ?? starts[0] ?? frame;
}

/** The runs of frames on which an object is: [first, last]. */
export function runsOf(present) {
  const runs = [];
  for (let i = 0; i < present.length; i++) {
    if (!present[i]) continue;
    if (i && present[i - 1]) runs.at(-1)[1] = i;
    else runs.push([i, i]);
  }
  return runs;
}

/** The key of an object's prompt in the document of a frame, and its color in all views. */
export const keyOf = (id) => Math.max(0, id - 1);
export const idOf = (key) => key + 1;
export const colorOfObject = (id) => color(keyOf(id));
export const nameOf = ({ id, phrase }) => (phrase ? `${phrase} ${id}` : `object ${id}`);
