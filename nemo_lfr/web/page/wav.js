/** Read PCM and float WAV files as mono samples, and write mono samples as 16-bit or float WAV files. */

/** @import { Audio } from "./types.js" */

/**
 * Read a WAV file.
 *
 * @param {ArrayBuffer} buffer
 * @returns {Audio | null} the mean of the channels; null for another format, which the browser may be able to read
 */
export function readWav(buffer) {
  const view = new DataView(buffer);
  if (buffer.byteLength < 12 || tag(view, 0) !== "RIFF" || tag(view, 8) !== "WAVE") return null;
  /** @type {{kind: number, channels: number, sampleRate: number, bits: number} | null} */
  let format = null;
  for (let at = 12; at + 8 <= buffer.byteLength; ) {
    const size = Math.min(view.getUint32(at + 4, true), buffer.byteLength - at - 8);
    const start = at + 8;
    if (tag(view, at) === "fmt " && size >= 16) {
      let kind = view.getUint16(start, true);
      if (kind === 0xfffe && size >= 26) kind = view.getUint16(start + 24, true); // WAVE_FORMAT_EXTENSIBLE
      const channels = view.getUint16(start + 2, true);
      format = { kind, channels, sampleRate: view.getUint32(start + 4, true), bits: view.getUint16(start + 14, true) };
    } else if (tag(view, at) === "data" && format) {
      const get = getter(view, format.kind, format.bits);
      if (!get || !format.channels || !format.sampleRate) return null;
      return { samples: mix(get, start, size, format.bits / 8, format.channels), sampleRate: format.sampleRate };
    }
    at = start + size + (size & 1);
  }
  return null;
}

/**
 * Write a mono WAV file.
 *
 * @param {Float32Array} samples in [-1, 1]
 * @param {number} sampleRate Hz
 * @param {16 | 32} bits 16-bit PCM or 32-bit float
 * @returns {Blob}
 */
export function writeWav(samples, sampleRate, bits) {
  const width = bits / 8;
  const view = new DataView(new ArrayBuffer(44 + samples.length * width));
  const put = (/** @type {number} */ at, /** @type {string} */ text) =>
    [...text].forEach((letter, index) => view.setUint8(at + index, letter.charCodeAt(0)));
  put(0, "RIFF");
  view.setUint32(4, 36 + samples.length * width, true);
  put(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, bits === 32 ? 3 : 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, sampleRate, true);
  view.setUint32(28, sampleRate * width, true);
  view.setUint16(32, width, true);
  view.setUint16(34, bits, true);
  put(36, "data");
  view.setUint32(40, samples.length * width, true);
  samples.forEach((sample, index) => {
    if (bits === 32) view.setFloat32(44 + 4 * index, sample, true);
    else view.setInt16(44 + 2 * index, Math.max(-32768, Math.min(32767, Math.round(sample * 32768))), true);
  });
  return new Blob([view.buffer], { type: "audio/wav" });
}

/**
 * @param {DataView} view
 * @param {number} at
 * @returns {string}
 */
function tag(view, at) {
  return String.fromCharCode(...[0, 1, 2, 3].map((index) => view.getUint8(at + index)));
}

/**
 * @param {DataView} view
 * @param {number} kind
 * @param {number} bits
 * @returns {((at: number) => number) | null}
 */
function getter(view, kind, bits) {
  if (kind === 3 && bits === 32) return (at) => view.getFloat32(at, true);
  if (kind === 3 && bits === 64) return (at) => view.getFloat64(at, true);
  if (kind === 1 && bits === 8) return (at) => (view.getUint8(at) - 128) / 128;
  if (kind === 1 && bits === 16) return (at) => view.getInt16(at, true) / 32768;
  if (kind === 1 && bits === 24) return (at) => (view.getInt16(at + 1, true) * 256 + view.getUint8(at)) / 8388608;
  if (kind === 1 && bits === 32) return (at) => view.getInt32(at, true) / 2147483648;
  return null;
}

/**
 * @param {(at: number) => number} get
 * @param {number} start
 * @param {number} size
 * @param {number} width
 * @param {number} channels
 * @returns {Float32Array}
 */
function mix(get, start, size, width, channels) {
  const samples = new Float32Array(Math.floor(size / (width * channels)));
  for (let index = 0; index < samples.length; index++) {
    let sum = 0;
    for (let channel = 0; channel < channels; channel++) sum += get(start + (index * channels + channel) * width);
    samples[index] = sum / channels;
  }
  return samples;
}
