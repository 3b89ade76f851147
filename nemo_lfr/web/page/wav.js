/** Read PCM and float WAV files as mono samples, and write mono samples as 16-bit or float WAV files. */

import { resample } from "./resample.js";
import { UserError } from "./types.js";

/** @import { Audio } from "./types.js" */

// The rules for reading are those of `nemo_lfr/io/containers/wav.py`.
const UNKNOWN_BYTES = 0x7fff0000; // programs that do not know the length yet write this value or a larger one
const CHUNK = /^[A-Za-z0-9_ -]{4}$/;
const KNOWN_CHUNKS = (
  "LIST JUNK junk fact cue plst smpl inst bext iXML axml chna cart PEAK PAD FLLR id3 ID3 DISP acid _PMX afsp minf elm1 " +
  "regn umid RIFF fmt data"
)
  .split(" ")
  .map((id) => id.padEnd(4));
const TAGS = /^(?:TAG|ID3|APETAGEX|LYRICSBEGIN)/; // appended by players
const OTHER_AUDIO = /^(?:RIFX|RF64|BW64|fLaC|OggS|FORM|caff|\.snd)/;
const FEW_BYTES = 16; // fewer bytes after the audio are not samples
const MAX_PEAK = 64; // float samples may exceed 1 slightly; integers that were not divided by 32768 exceed it by far

/**
 * Read a WAV file. All samples are read, even if the header declares fewer.
 *
 * If the file consists of several WAV files, one after the other, all of them are read.
 *
 * @param {ArrayBuffer} buffer
 * @param {string} name for messages
 * @returns {Audio | null} the mean of the channels; null for another format, which the browser may be able to read
 * @throws {UserError} if the file is cut short or damaged, or the samples are not audio
 */
export function readWav(buffer, name) {
  const view = new DataView(buffer);
  if (!isWav(view, 0)) return null;
  const recordings = [];
  for (let start = 0; start < buffer.byteLength; ) {
    const { spans, format, end, note } = findSamples(view, start, name);
    const samples = mix(joined(view, spans), format);
    if (!samples) return null;
    recordings.push({ samples, sampleRate: format.sampleRate, note });
    start = end;
  }
  const { sampleRate } = recordings[0];
  const parts = recordings.map((recording) => resample(recording.samples, recording.sampleRate, sampleRate));
  const samples = parts.length > 1 ? new Float32Array(parts.reduce((sum, part) => sum + part.length, 0)) : parts[0];
  if (parts.length > 1) parts.reduce((at, part) => (samples.set(part, at), at + part.length), 0);
  const peak = samples.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0); // NaN if a sample is NaN
  if (!Number.isFinite(peak)) throw new UserError(`${name} contains NaN or infinite samples; remove them first.`);
  if (peak > MAX_PEAK) {
    throw new UserError(`${name} reaches ${Number(peak.toPrecision(6))}, but audio lies in [-1, 1]; divide the samples by 32768.`);
  }
  return { samples, sampleRate, note: recordings.map(({ note }) => note).join(" ").trim() };
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
 * Find the samples of the recording that begins at `start`.
 *
 * @param {DataView} view
 * @param {number} start
 * @param {string} name
 * @returns {{spans: [number, number][], format: Format, end: number, note: string}} byte ranges of the samples, and the start
 *   of the next recording or the size of the file
 */
function findSamples(view, start, name) {
  /** @type {[number, number][]} */
  const spans = [];
  /** @type {Format | null} */
  let format = null;
  let note = "";
  let at = start + 12;
  while (at + 8 <= view.byteLength && !(spans.length && isWav(view, at))) {
    const id = text(view, at, 4);
    const isTag = TAGS.test(text(view, at, 11)) && !KNOWN_CHUNKS.includes(id);
    if (!CHUNK.test(id) || (spans.length && (isTag || OTHER_AUDIO.test(id)))) break;
    let size = view.getUint32(at + 4, true);
    const begin = at + 8;
    if (id === "fmt " && size >= 16) format ??= readFormat(view, begin, size);
    if (id === "data") {
      const declared = size;
      const stop = endOfSamples(view, start, begin, declared, name);
      spans.push([begin, stop]);
      size = stop - begin;
      if (0 < declared && declared < size) {
        note ||= `The header of ${name} declares ${declared} bytes of audio, but there are ${size}; all of them were read.`;
      }
    }
    at = begin + size;
    // Some writers omit the padding byte of a chunk of odd size.
    if (size % 2 && !(CHUNK.test(text(view, at, 4)) && view.getUint8(at))) at += 1;
  }
  if (!spans.length || !format) {
    throw new UserError(`${name} is damaged or cut short: it has no ${spans.length ? "fmt" : "data"} chunk.`);
  }
  if (OTHER_AUDIO.test(text(view, at, 4))) {
    throw new UserError(`${name} contains several recordings, one after the other; convert each of them to WAV.`);
  }
  return { spans, format, end: isWav(view, at) ? at : view.byteLength, note };
}

/**
 * @param {DataView} view
 * @param {number} start of the recording
 * @param {number} begin of the samples
 * @param {number} declared size of the samples in the header
 * @param {string} name
 * @returns {number} end of the samples
 * @throws {UserError} if the file ends before the declared size
 */
function endOfSamples(view, start, begin, declared, name) {
  const available = view.byteLength - begin;
  if (declared <= available) {
    return samplesFollow(view, begin + declared, declared) ? nextWav(view, begin + declared) : begin + declared;
  }
  if (declared >= UNKNOWN_BYTES) return nextWav(view, begin);
  const total = view.getUint32(start + 4, true);
  const size = begin - start + available;
  const includesHeader = (declared === size || declared === size - 8) && total > 0 && total <= size;
  if (includesHeader) return view.byteLength;
  throw new UserError(`${name} was cut short: its header declares ${declared} bytes of audio, but there are ${available}.`);
}

/**
 * @param {DataView} view
 * @param {number} stop
 * @param {number} declared size of the samples before `stop`
 * @returns {boolean} whether the bytes after `stop` are samples, rather than chunks, tags, padding or another file
 */
function samplesFollow(view, stop, declared) {
  for (const at of [stop, stop + (declared % 2)]) {
    const left = view.byteLength - at;
    if (left < FEW_BYTES || TAGS.test(text(view, at, 11)) || OTHER_AUDIO.test(text(view, at, 4))) return false;
    const id = text(view, at, 4);
    if (CHUNK.test(id) && (KNOWN_CHUNKS.includes(id) || view.getUint32(at + 4, true) <= left - 8)) return false;
  }
  // Zeros after samples are padding; zeros without samples before them are silence.
  return !declared || new Uint8Array(view.buffer, stop).some((byte) => byte);
}

/**
 * @param {DataView} view
 * @param {number} position
 * @returns {number} start of the next WAV file at or after a position; the size of the file if there is none
 */
function nextWav(view, position) {
  const bytes = new Uint8Array(view.buffer);
  for (let at = position; (at = bytes.indexOf(0x52, at)) >= 0; at++) {
    if (isWav(view, at) && /^(?:fmt |bext|JUNK|LIST|fact)/.test(text(view, at + 12, 4))) return at;
  }
  return view.byteLength;
}

/**
 * @param {DataView} view
 * @param {[number, number][]} spans
 * @returns {DataView} the bytes in these ranges
 */
function joined(view, spans) {
  if (spans.length === 1) return new DataView(view.buffer, spans[0][0], spans[0][1] - spans[0][0]);
  const bytes = new Uint8Array(spans.reduce((sum, [begin, stop]) => sum + stop - begin, 0));
  let at = 0;
  for (const [begin, stop] of spans) {
    bytes.set(new Uint8Array(view.buffer, begin, stop - begin), at);
    at += stop - begin;
  }
  return new DataView(bytes.buffer);
}

/**
 * @param {DataView} view
 * @param {number} at
 * @returns {boolean} whether a WAV file begins at a position
 */
function isWav(view, at) {
  return text(view, at, 4) === "RIFF" && text(view, at + 8, 4) === "WAVE";
}

/**
 * @param {DataView} view
 * @param {number} at
 * @param {number} count
 * @returns {string} up to `count` bytes at a position
 */
function text(view, at, count) {
  const stop = Math.min(at + count, view.byteLength);
  return at < stop ? String.fromCharCode(...new Uint8Array(view.buffer, at, stop - at)) : "";
}

/**
 * Content of a "fmt " chunk.
 *
 * @typedef {{kind: number, channels: number, sampleRate: number, bits: number}} Format
 *
 * @param {DataView} view
 * @param {number} start
 * @param {number} size
 * @returns {Format | null} null if the file ends within the chunk
 */
function readFormat(view, start, size) {
  if (start + Math.min(size, 26) > view.byteLength) return null;
  let kind = view.getUint16(start, true);
  if (kind === 0xfffe && size >= 26) kind = view.getUint16(start + 24, true); // WAVE_FORMAT_EXTENSIBLE
  const channels = view.getUint16(start + 2, true);
  return { kind, channels, sampleRate: view.getUint32(start + 4, true), bits: view.getUint16(start + 14, true) };
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
 * @param {DataView} view of the samples
 * @param {Format} format
 * @returns {Float32Array | null} the mean of the channels; null for an encoding that is not read here
 */
function mix(view, { kind, channels, bits }) {
  const get = getter(view, kind, bits);
  if (!get || !channels) return null;
  const width = bits / 8;
  const samples = new Float32Array(Math.floor(view.byteLength / (width * channels)));
  for (let index = 0; index < samples.length; index++) {
    let sum = 0;
    for (let channel = 0; channel < channels; channel++) sum += get((index * channels + channel) * width);
    samples[index] = sum / channels;
  }
  return samples;
}
