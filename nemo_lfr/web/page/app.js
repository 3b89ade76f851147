/** Entry point of the page: handle recordings and files, and show messages. */

import { openBackend } from "./backend.js";
import { byId, rate, setText } from "./dom.js";
import { showLivePanel } from "./live-panel.js";
import { CompressedError, isTokenFile, readTokenFile } from "./lfr.js";
import { readRecording } from "./recording.js";
import { Recorder } from "./recorder.js";
import { Results } from "./results.js";
import { UserError } from "./types.js";

/** @import { Backend, Recording, TokenFile } from "./types.js" */

const BUTTONS = ["record", "choose", "example"];

/** @param {Backend} backend */
function run(backend) {
  const results = new Results(backend.info);
  const recorder = new Recorder((recording) => perform(() => encode(recording)));
  const picker = byId("file", HTMLInputElement);
  showInfo(backend);
  showLivePanel(backend);

  /** @param {Recording} recording */
  async function encode(recording) {
    if (!recording.samples.length) throw new UserError("Nothing was recorded.");
    showStatus("Encoding …");
    const started = performance.now();
    const file = await backend.encode(recording);
    const encodeSeconds = (performance.now() - started) / 1000;
    await decode(recording.name, recording, file, encodeSeconds);
  }

  /**
   * @param {string} name
   * @param {Recording | null} original
   * @param {Uint8Array} file
   * @param {number | null} encodeSeconds
   */
  async function decode(name, original, file, encodeSeconds) {
    const tokens = readTokens(file);
    showStatus("Decoding …");
    const started = performance.now();
    const decoded = await backend.decode(file);
    if (!decoded.samples.length) throw new UserError(`${name} has no audio.`);
    const decodeSeconds = (performance.now() - started) / 1000;
    results.show({ name, original, decoded, file, tokens, encodeSeconds, decodeSeconds });
    const ready = original ? "Ready. Play both versions, or switch between them." : "Ready to play.";
    showStatus(original?.note ? `${ready} ${original.note}` : ready);
  }

  /**
   * @param {Blob} blob
   * @param {string} name
   */
  async function open(blob, name) {
    showStatus(`Reading ${name} …`);
    const start = new Uint8Array(await blob.slice(0, 4).arrayBuffer());
    if (isTokenFile(start)) return decode(name, null, new Uint8Array(await blob.arrayBuffer()), null);
    return encode(await readRecording(blob, name, backend.info.sampleRate));
  }

  byId("choose").addEventListener("click", () => picker.click());
  picker.addEventListener("change", () => {
    const file = picker.files?.[0];
    if (file) perform(() => open(file, file.name));
    picker.value = "";
  });
  byId("example").addEventListener("click", () => perform(() => fetchExample().then((blob) => open(blob, "Example"))));
  byId("record").addEventListener("click", () => {
    if (recorder.isRecording) return recorder.stop();
    return perform(async () => {
      showStatus("Waiting for the microphone …");
      await recorder.start();
      showStatus("Recording. Press Stop when you are done.");
    }).then(() => recorder.showState());
  });
  acceptDrops((file) => perform(() => open(file, file.name)), recorder);
}

/**
 * Run an action while the buttons are disabled, and show its error if it fails.
 *
 * @param {() => Promise<void>} action
 */
async function perform(action) {
  setBusy(true);
  try {
    await action();
  } catch (error) {
    if (!(error instanceof UserError)) console.error(error);
    showStatus(error instanceof UserError ? error.message : `Something went wrong: ${error}`, true);
  }
  setBusy(false);
}

/**
 * @param {Uint8Array} file
 * @returns {TokenFile | null} null if the file is compressed
 */
function readTokens(file) {
  try {
    return readTokenFile(file);
  } catch (error) {
    if (error instanceof CompressedError) return null;
    throw error;
  }
}

/** @returns {Promise<Blob>} */
async function fetchExample() {
  const response = await fetch(new URL("./example.flac", import.meta.url));
  if (!response.ok) throw new UserError("The example could not be loaded.");
  return response.blob();
}

/**
 * @param {(file: File) => void} onFile
 * @param {Recorder} recorder during a recording, files are refused
 */
function acceptDrops(onFile, recorder) {
  const target = byId("drop");
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    target.classList.add("over");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) target.classList.remove("over");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    target.classList.remove("over");
    const file = event.dataTransfer?.files[0];
    if (file && !recorder.isRecording && !document.body.hasAttribute("aria-busy")) onFile(file);
  });
}

/** @param {boolean} isBusy */
function setBusy(isBusy) {
  document.body.toggleAttribute("aria-busy", isBusy);
  for (const id of BUTTONS) byId(id, HTMLButtonElement).disabled = isBusy;
}

/**
 * @param {string} message
 * @param {boolean} isError
 */
function showStatus(message, isError = false) {
  setText("status", message);
  byId("status").classList.toggle("error", isError);
}

/** @param {Backend} backend */
function showInfo({ info, place }) {
  const frames = (info.sampleRate / info.samplesPerFrame).toFixed(1);
  const name = info.name[0].toUpperCase() + info.name.slice(1);
  setText("codec", `${name} · ${frames} frames/s × ${info.numCodebooks} tokens · ${rate(info.bitRate)}`);
  setText("place", place);
  byId("place").hidden = false;
  setText("privacy", `Recordings are processed ${place[0].toLowerCase()}${place.slice(1)}, and not stored.`);
}

async function main() {
  try {
    const backend = await openBackend(showStatus);
    run(backend);
    showStatus("Ready.");
    setBusy(false);
  } catch (error) {
    if (!(error instanceof UserError)) console.error(error);
    showStatus(error instanceof UserError ? error.message : `The page could not start: ${error}`, true);
  }
}

main();
