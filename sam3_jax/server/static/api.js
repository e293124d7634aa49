// The HTTP API of the server that this page came from.

const TOKEN = "sam3-token";
const NEEDS_TOKEN = "The server needs its token: open the address that it printed.";

/** An error of the server, or of the connection; `code` as in the API, or "offline". */
export class ApiError extends Error {
  constructor(code, message, status = 0, retryAfter = 0) {
    super(message);
    Object.assign(this, { code, status, retryAfter });
  }
}

/** Takes the token from the URL's fragment and removes it from the address bar. */
export function takeToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!token) return;
  sessionStorage.setItem(TOKEN, token);
  history.replaceState(null, "", location.pathname + location.search);
}

/** Sends a request and reads its response: JSON, unless `read(response)` says otherwise. */
async function request(path, { headers = {}, read = readJson, ...options } = {}) {
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  try {
    const response = await fetch(path, { ...options, headers, credentials: "same-origin" });
    if (response.status === 204) return null;
    if (response.ok) return await read(response);
    const body = await readJson(response);
    const { code = "internal", message = `The server answered ${response.status}.` } =
      body.error ?? {};
    const text = code === "unauthorized" ? NEEDS_TOKEN : message;
    throw new ApiError(code, text, response.status, Number(response.headers.get("Retry-After")));
  } catch (error) {
    throw known(error);
  }
}

const readJson = (response) => response.json().catch(() => ({}));

const known = (error) =>
  error instanceof ApiError || error.name === "AbortError"
    ? error
    : new ApiError("offline", "The connection to the server was lost.");

const post = (path, body, signal, options = {}) =>
  request(path, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" },
    signal,
    ...options,
  });

export const getModel = () => request("/v1/model");

export const isReady = () =>
  request("/readyz").then(
    () => true,
    () => false,
  );

/** Uploads an image file: {id, width, height, milliseconds}. */
export const upload = (blob, signal) =>
  request("/v1/images", {
    method: "POST",
    body: blob,
    headers: { "Content-Type": blob.type.startsWith("image/") ? blob.type : "application/octet-stream" },
    signal,
  });

export const remove = (id) => request(`/v1/images/${id}`, { method: "DELETE" });

export const prompt = (id, body, signal) => post(`/v1/images/${id}/prompts`, body, signal);

export const everything = (id, body, signal) => post(`/v1/images/${id}/everything`, body, signal);

const video = (id) => `/v1/videos/${id}`;

/** Uploads a video file: {id, width, height, frames, fps, milliseconds}. */
export const uploadVideo = (blob, signal) =>
  request("/v1/videos", {
    method: "POST",
    body: blob,
    headers: { "Content-Type": blob.type.startsWith("video/") ? blob.type : "application/octet-stream" },
    signal,
  });

/** Deletes a video; `keepalive` for a page that is being left. */
export const removeVideo = (id, keepalive = false) => request(video(id), { method: "DELETE", keepalive });

/** A frame as a JPEG blob, whose longer side has `side` pixels at most. */
export const videoFrame = (id, frame, side) =>
  request(`${video(id)}/frames/${frame}?side=${side}`, { read: (response) => response.blob() });

export const promptVideo = (id, body) => post(`${video(id)}/prompts`, body);

export const correctObject = (id, object, body) => post(`${video(id)}/objects/${object}/corrections`, body);

export const removeObject = (id, object) => request(`${video(id)}/objects/${object}`, { method: "DELETE" });

/** Tracks, and yields the lines of the response as they arrive. */
export async function* trackVideo(id, body) {
  const stream = await post(`${video(id)}/track`, body, null, { read: (response) => response.body });
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) yield JSON.parse(line);
    }
  } catch (error) {
    throw known(error);
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const removePhrase = (id, phrase) =>
  request(`${video(id)}/phrases?phrase=${encodeURIComponent(phrase)}`, { method: "DELETE" });

export const stopTracking = (id) => request(`${video(id)}/track`, { method: "DELETE" });

export const exportVideo = (id, format, name) =>
  request(`${video(id)}/export/${format}?name=${encodeURIComponent(name)}`, { read: (response) => response.blob() });
