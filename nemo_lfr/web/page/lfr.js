/** Reader and writer of uncompressed `.lfr` token files, as specified in `docs/concepts/lfr-format.md`. */

import { bytesPerFrame, crc32, pack, unpack } from "./bytes.js";
import { UserError } from "./types.js";

/** @import { Metadata, TokenFile } from "./types.js" */

const MAGIC = 0x5452464c; // "LFRT"
const MAX_METADATA_BYTES = 65536;
const MAX_BLOCK_FRAMES = 65536;

/** Error for a valid but compressed token file, which only the server can read. */
export class CompressedError extends UserError {}

/**
 * Return whether data starts with the magic number of a token file.
 *
 * @param {Uint8Array} data
 * @returns {boolean}
 */
export function isTokenFile(data) {
  return data.length >= 4 && viewOf(data).getUint32(0, true) === MAGIC;
}

/**
 * Read a token file.
 *
 * @param {Uint8Array} data
 * @returns {TokenFile}
 * @throws {UserError} if the file is damaged, truncated or compressed
 */
export function readTokenFile(data) {
  const reader = new SectionReader(data);
  const { metadata, version } = readHeader(reader);
  const codebookSize = metadata.levels.reduce((product, level) => product * level, 1);
  const width = bytesPerFrame(codebookSize, metadata.num_codebooks);
  const outline = [word(reader.crc)];
  /** @type {Int32Array[]} */
  const blocks = [];
  let numFrames = 0;
  for (;;) {
    const before = version > 1 ? reader.crc : null;
    reader.begin();
    const count = reader.uint32();
    if (!count) break;
    if (count > MAX_BLOCK_FRAMES) throw damaged();
    const tokens = unpack(reader.bytes(count * width), codebookSize, metadata.num_codebooks);
    reader.checkCrc(before);
    if (!tokens) throw damaged();
    outline.push(word(count), word(reader.crc));
    blocks.push(tokens);
    numFrames += count;
  }
  const numSamples = reader.uint64();
  if (version > 1 && reader.uint32() !== crc32(concat(outline))) throw damaged();
  reader.checkCrc(null);
  if (!reader.isAtEnd() || Math.ceil(numSamples / metadata.samples_per_frame) !== numFrames) throw damaged();
  const tokens = new Int32Array(numFrames * metadata.num_codebooks);
  let at = 0;
  for (const block of blocks) {
    tokens.set(block, at);
    at += block.length;
  }
  return { metadata, tokens, numFrames, numSamples };
}

/**
 * Write a token file of version 2.
 *
 * @param {Metadata} metadata
 * @param {Int32Array} tokens frame by frame
 * @param {number} numSamples length of the recording at the codec's rate
 * @returns {Uint8Array}
 */
export function writeTokenFile(metadata, tokens, numSamples) {
  const text = new TextEncoder().encode(JSON.stringify(metadata));
  const codebookSize = metadata.levels.reduce((product, level) => product * level, 1);
  /** @type {Uint8Array[]} */
  const parts = [];
  const add = (/** @type {Uint8Array} */ section, /** @type {Uint8Array} */ before) => {
    const crc = word(crc32(section, crc32(before)));
    parts.push(section, crc);
    return crc;
  };
  const none = new Uint8Array(0);
  let crc = add(concat([word(MAGIC), new Uint8Array([2]), word(text.length), text]), none);
  const outline = [crc];
  const step = MAX_BLOCK_FRAMES * metadata.num_codebooks;
  for (let start = 0; start < tokens.length; start += step) {
    const block = tokens.subarray(start, start + step);
    const count = word(block.length / metadata.num_codebooks);
    crc = add(concat([count, pack(block, codebookSize, metadata.num_codebooks)]), crc);
    outline.push(count, crc);
  }
  const high = Math.floor(numSamples / 2 ** 32);
  add(concat([word(0), word(numSamples >>> 0), word(high), word(crc32(concat(outline)))]), none);
  return concat(parts);
}

/**
 * @param {SectionReader} reader
 * @returns {{metadata: Metadata, version: number}}
 */
function readHeader(reader) {
  if (reader.uint32() !== MAGIC) throw new UserError("This is not a token file.");
  const version = reader.bytes(1)[0];
  if (version !== 1 && version !== 2) throw new UserError(`This token file has version ${version}; this page reads versions 1 and 2.`);
  const field = reader.uint32();
  const coding = version > 1 ? field >>> 24 : 0;
  const length = version > 1 ? field & 0xffffff : field;
  if (length > MAX_METADATA_BYTES) throw damaged();
  const text = reader.bytes(length);
  reader.checkCrc(null);
  if (coding === 1) throw new CompressedError("This token file is compressed. Only a server can read it.");
  if (coding) throw new UserError(`This token file has coding ${coding}, which this page cannot read.`);
  const metadata = parseMetadata(text);
  if (!metadata) throw damaged();
  return { metadata, version };
}

/**
 * @param {Uint8Array} text
 * @returns {Metadata | null}
 */
function parseMetadata(text) {
  try {
    const found = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(text));
    const numbers = [found.sample_rate, found.samples_per_frame, found.num_codebooks, ...found.levels];
    const isValid = numbers.every((number) => Number.isInteger(number) && number > 0 && number <= 1e6);
    return isValid && found.num_codebooks <= 256 && found.levels.length <= 16 ? found : null;
  } catch {
    return null;
  }
}

function damaged() {
  return new UserError("This token file is damaged or incomplete.");
}

/**
 * @param {Uint8Array} data
 * @returns {DataView}
 */
function viewOf(data) {
  return new DataView(data.buffer, data.byteOffset, data.byteLength);
}

/**
 * @param {number} value
 * @returns {Uint8Array} little-endian
 */
function word(value) {
  const bytes = new Uint8Array(4);
  viewOf(bytes).setUint32(0, value, true);
  return bytes;
}

/**
 * @param {Uint8Array[]} parts
 * @returns {Uint8Array}
 */
function concat(parts) {
  const whole = new Uint8Array(parts.reduce((length, part) => length + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** Cursor in a token file, which checks the CRC of each section. */
class SectionReader {
  /** @param {Uint8Array} data */
  constructor(data) {
    this.data = data;
    this.at = 0;
    this.start = 0;
    this.crc = 0; // CRC field of the previous section
  }

  /** Begin a section. */
  begin() {
    this.start = this.at;
  }

  /**
   * @param {number} count
   * @returns {Uint8Array}
   */
  bytes(count) {
    if (this.at + count > this.data.length) throw damaged();
    this.at += count;
    return this.data.subarray(this.at - count, this.at);
  }

  /** @returns {number} */
  uint32() {
    return viewOf(this.bytes(4)).getUint32(0, true);
  }

  /** @returns {number} */
  uint64() {
    const value = viewOf(this.bytes(8)).getBigUint64(0, true);
    if (value > BigInt(Number.MAX_SAFE_INTEGER)) throw damaged();
    return Number(value);
  }

  /**
   * Read the CRC field that ends a section, and compare it with the CRC of the section.
   *
   * @param {number | null} before CRC field of the previous section, which the CRC of this section also covers
   */
  checkCrc(before) {
    const expected = crc32(this.data.subarray(this.start, this.at), before === null ? 0 : crc32(word(before)));
    this.crc = this.uint32();
    if (this.crc !== expected) throw damaged();
  }

  /** @returns {boolean} */
  isAtEnd() {
    return this.at === this.data.length;
  }
}
