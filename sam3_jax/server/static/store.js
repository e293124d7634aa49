// A store of immutable states with one history.
//
// A state is {doc, view}. The history holds documents (prompts, answers, edits); the view (mode,
// selection, opacity) is not undone. Functions that change a state return a new one. A document may
// hold a draft, such as a phrase that is being typed; `clean(doc)` is the document without it.

const DEPTH = 200; // documents to undo

export function createStore(doc, view, clean) {
  let past = [];
  let future = [];
  let state = { doc, view };
  let lastTag = null;
  const listeners = new Set();

  function set(next) {
    if (next.doc === state.doc && next.view === state.view) return;
    const previous = state;
    state = next;
    for (const listener of listeners) listener(state, previous);
  }

  function move(from, to) {
    if (!from.length) return false;
    to.push(clean(state.doc));
    lastTag = null;
    set({ ...state, doc: from.pop() });
    return true;
  }

  return {
    get: () => state,

    /** Calls listener(state, previous) after every change. */
    subscribe(listener) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },

    /** A step that undo reverts. Steps in a row with the same tag, as of a slider, are one. */
    commit(change, tag = null) {
      const next = change(state.doc);
      if (next === state.doc) return;
      if (tag === null || tag !== lastTag) past = [...past.slice(-DEPTH + 1), clean(state.doc)];
      lastTag = tag;
      future = [];
      set({ ...state, doc: next });
    },

    /** A change of all documents, also those of the history: an answer that arrived. */
    amend(change) {
      past = past.map(change);
      future = future.map(change);
      set({ ...state, doc: change(state.doc) });
    },

    /** A change that is no step of its own: the draft. */
    preview(change) {
      set({ ...state, doc: change(state.doc) });
    },

    look(change) {
      set({ ...state, view: { ...state.view, ...change } });
    },

    /** Starts over with another document, without a history. */
    reset(doc, view) {
      past = [];
      future = [];
      lastTag = null;
      set({ doc, view: { ...state.view, ...view } });
    },

    undo: () => move(past, future),
    redo: () => move(future, past),
    canUndo: () => past.length > 0,
    canRedo: () => future.length > 0,
  };
}
