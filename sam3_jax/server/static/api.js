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

async function request(path, { headers = {}, ...options } = {}) {
  const token = sessionStorage.getItem(TOKEN);
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "same-origin" });
    if (response.status === 204) return null;
    const body = await response.json().catch(() => ({}));
    if (response.ok) return body;
    const { code = "internal", message = `The server answered ${response.status}.` } =
      body.error ?? {};
    const text = code === "unauthorized" ? NEEDS_TOKEN : message;
    throw new ApiError(code, text, response.status, Number(response.headers.get("Retry-After")));
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("offline", "The connection to the server was lost.");
  }
}

const post = (path, body, signal) =>
  request(path, {
    method: "POST",
    body: JSON.stringify(body),
    headers: { "Content-Type": "application/json" },
    signal,
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
