// The image of this page on the server: uploaded again by itself when the server lost it.

import * as api from "./api.js";

const LOST = ["offline", "not_ready", "unknown_image"]; // errors after which to upload again
const PAUSES = [250, 500, 1000, 2000]; // milliseconds between looks for a lost server

/**
 * `say(text)` tells the user what happens with the connection; "" when all is well.
 */
export function createSession(say) {
  let image = null; // {blob, upload}; upload is a promise of {id, width, height, milliseconds}
  let lost = null; // promise that the server is back

  function open(blob) {
    if (image) image.upload.then(({ id }) => api.remove(id)).catch(() => {});
    const own = { blob, upload: api.upload(blob) };
    image = own;
    return ask(() => own.upload);
  }

  const close = () => {
    image = null;
  };

  /** Calls send(id) for the image; uploads it again and repeats if the server was restarted. */
  async function ask(send, signal) {
    const own = image;
    for (let attempt = 0; ; attempt++) {
      try {
        const { id } = await own.upload;
        signal?.throwIfAborted();
        return await send(id);
      } catch (error) {
        if (signal?.aborted || own !== image) throw new DOMException("superseded", "AbortError");
        await recover(error, own, attempt, signal);
      }
    }
  }

  async function recover(error, own, attempt, signal) {
    if (error.code === "busy" && attempt < 8) {
      say("The server is busy; trying again…");
      await pause(1000 * (error.retryAfter || 1));
      say("");
      own.upload = own.upload.catch(() => api.upload(own.blob));
      return;
    }
    if (!LOST.includes(error.code) || attempt > 4) throw error;
    lost ??= back(own, error.code).finally(() => {
      lost = null;
    });
    await lost;
    signal?.throwIfAborted();
  }

  /** Waits for the server and uploads the image again; `code` says why it has to. */
  async function back(own, code) {
    const starts = code === "not_ready";
    if (code !== "unknown_image") {
      say(starts ? "The server is starting…" : "The connection to the server was lost. Waiting for it to come back…");
      for (let i = 0; !(await api.isReady()); i++) await pause(PAUSES[Math.min(i, 3)]);
    }
    if (own !== image) return;
    say(starts ? "Encoding the image…" : "The server was restarted. Uploading the image again…");
    own.upload = api.upload(own.blob);
    try {
      await own.upload;
    } catch (error) {
      if (!LOST.includes(error.code)) throw error;
      return back(own, error.code);
    }
    say(starts ? "The image is ready." : "The server was restarted. The image was uploaded again.");
  }

  return { open, close, ask };
}

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
