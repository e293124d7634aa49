// Image and video files from a dialog, a drop, the clipboard or the camera.

import { $ } from "./dom.js";

const SIGNATURES = [
  [0, [0x89, 0x50, 0x4e, 0x47]], // PNG
  [0, [0xff, 0xd8, 0xff]], // JPEG
  [0, [0x47, 0x49, 0x46, 0x38]], // GIF
  [8, [0x57, 0x45, 0x42, 0x50]], // WebP
  [0, [0x42, 0x4d]], // BMP
  [4, [0x66, 0x74, 0x79, 0x70]], // AVIF, HEIC
  [0, [0x49, 0x49, 0x2a, 0x00]], // TIFF
  [0, [0x4d, 0x4d, 0x00, 0x2a]],
];

/** Whether the first bytes of a file are those of an image, whatever its name says. */
export async function isImage(blob) {
  const head = new Uint8Array(await blob.slice(0, 16).arrayBuffer());
  return SIGNATURES.some(([at, bytes]) => bytes.every((byte, i) => head[at + i] === byte));
}

const VIDEOS = /\.(mp4|m4v|mov|webm|mkv|avi|mpe?g|ts|ogv)$/i;
const IMAGE_BRANDS = ["avif", "avis", "heic", "heix", "heim", "heis", "hevc", "mif1", "msf1"];

/** Whether a file is a video, by its first bytes, or else by its type or its name. */
export async function isVideo(file) {
  const head = new Uint8Array(await file.slice(0, 12).arrayBuffer());
  const text = String.fromCharCode(...head);
  if (text.slice(4, 8) === "ftyp") return !IMAGE_BRANDS.includes(text.slice(8, 12));
  if (text.startsWith("\x1a\x45\xdf\xa3")) return true; // Matroska, WebM
  if (await isImage(file)) return false;
  return file.type.startsWith("video/") || VIDEOS.test(file.name ?? "");
}

/** Calls open(file) for every file that arrives. */
export function attachFiles(open) {
  const input = $("#file-input");
  input.addEventListener("change", () => {
    const [file] = input.files;
    input.value = "";
    if (file) open(file);
  });
  document.addEventListener("paste", ({ clipboardData }) => {
    const [file] = clipboardData.files;
    if (file) open(file);
  });
  let depth = 0; // of nested elements under the pointer
  const drag = (change) => (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    depth = Math.max(0, change(depth));
    document.body.classList.toggle("dropping", depth > 0);
  };
  document.addEventListener("dragenter", drag((one) => one + 1));
  document.addEventListener("dragleave", drag((one) => one - 1));
  document.addEventListener("dragover", drag((one) => one));
  document.addEventListener("drop", (event) => {
    drag(() => 0)(event);
    const [file] = event.dataTransfer?.files ?? [];
    if (file) open(file);
  });
  return { choose: () => input.click() };
}

/** Photographs with the camera; without one, `choose()` lets the device offer its own camera. */
export function attachCamera(open, choose, say) {
  const dialog = $("#camera");
  const video = $("#camera-video");
  const take = $("#camera-take");

  async function start() {
    if (!navigator.mediaDevices?.getUserMedia) return choose();
    try {
      const wanted = { facingMode: "environment", width: { ideal: 1920 } };
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: wanted });
    } catch (error) {
      const denied = error.name === "NotAllowedError";
      return say(denied ? "The browser did not allow the camera." : "No camera was found.");
    }
    take.disabled = true;
    dialog.showModal();
    await video.play();
    take.disabled = false; // before its first frame the video has no size
  }

  dialog.addEventListener("close", () => {
    video.srcObject?.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
  });
  take.addEventListener("click", async () => {
    const canvas = new OffscreenCanvas(video.videoWidth, video.videoHeight);
    canvas.getContext("2d").drawImage(video, 0, 0);
    const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
    dialog.close();
    open(new File([blob], "photograph.jpg", { type: blob.type }));
  });
  $("#camera-button").addEventListener("click", start);
}
