/** Backend that runs the codec in this browser, with ONNX Runtime in a worker. */

import { readTokenFile, writeTokenFile } from "./lfr.js";
import { resample } from "./resample.js";
import { UserError } from "./types.js";

/** @import { Backend, Metadata } from "./types.js" */

const CHUNK_FRAMES = 430; // 20 s; maximum number of frames in one run of a network, to limit its memory

/**
 * Content of codec.json; see `nemo_lfr/codec/onnx/manifest.py`.
 *
 * @typedef {{past: number, future: number, min_frames: number}} Limits
 * @typedef {Metadata & {encoder: Limits, decoder: Limits, fingerprint: string, weights_fingerprint: string,
 *   older_fingerprints?: string[], files: Record<string, string>}} Manifest
 */

/**
 * Open the codec of a static site.
 *
 * @param {URL} base of the page
 * @returns {Promise<Backend>}
 * @throws {UserError} if the files of the codec cannot be loaded
 */
export async function open(base) {
  const folder = new URL("page/codec/", base);
  const response = await fetch(new URL("codec.json", folder)).catch(() => null);
  if (!response?.ok) throw new UserError("The codec of this site could not be loaded.");
  const manifest = /** @type {Manifest} */ (await response.json());
  const worker = new CodecWorker(folder, manifest.files);
  const { sample_rate: sampleRate, samples_per_frame: samplesPerFrame, num_codebooks: numCodebooks, levels } = manifest;
  const codebookSize = levels.reduce((product, level) => product * level, 1);
  return {
    info: {
      name: document.querySelector("meta[name=codec]")?.getAttribute("content") || "codec",
      sampleRate,
      samplesPerFrame,
      numCodebooks,
      codebookSize,
      bitRate: (sampleRate / samplesPerFrame) * numCodebooks * Math.log2(codebookSize),
      encoderLookahead: manifest.encoder.future,
      decoderLookahead: manifest.decoder.future,
    },
    place: "In this browser",
    encode: async (recording) => {
      const samples = resample(recording.samples, recording.sampleRate, sampleRate);
      return writeTokenFile(metadataOf(manifest), await encode(worker, manifest, samples), samples.length);
    },
    decode: async (file) => {
      const { metadata, tokens, numSamples } = readTokenFile(file);
      checkCodec(metadata, manifest);
      return { samples: (await decode(worker, manifest, tokens)).subarray(0, numSamples), sampleRate };
    },
    client: null,
  };
}

/**
 * @param {CodecWorker} worker
 * @param {Manifest} manifest
 * @param {Float32Array} samples at the codec's rate
 * @returns {Promise<Int32Array>} tokens frame by frame
 */
async function encode(worker, manifest, samples) {
  const { samples_per_frame: size, num_codebooks: count, encoder } = manifest;
  const total = Math.ceil(samples.length / size);
  const tokens = new Int32Array(total * count);
  for (const { start, stop, keepStart, keepStop } of windows(total, encoder)) {
    const width = Math.max(stop - start, encoder.min_frames);
    const audio = new Float32Array(width * size);
    audio.set(samples.subarray(start * size, stop * size));
    const found = /** @type {Int32Array} */ (await worker.run("encoder", { audio, dims: [1, audio.length] }));
    for (let frame = keepStart; frame < keepStop; frame++) {
      for (let codebook = 0; codebook < count; codebook++) {
        tokens[frame * count + codebook] = found[codebook * width + frame - start];
      }
    }
  }
  if (tokens.some((token) => token < 0)) throw new UserError("The recording contains NaN or infinite samples; fix or replace it.");
  return tokens;
}

/**
 * @param {CodecWorker} worker
 * @param {Manifest} manifest
 * @param {Int32Array} tokens frame by frame
 * @returns {Promise<Float32Array>} samples of whole frames
 */
async function decode(worker, manifest, tokens) {
  const { samples_per_frame: size, num_codebooks: count, decoder } = manifest;
  const total = tokens.length / count;
  const samples = new Float32Array(total * size);
  for (const { start, stop, keepStart, keepStop } of windows(total, decoder)) {
    const width = Math.max(stop - start, decoder.min_frames);
    const input = new BigInt64Array(count * width);
    for (let frame = start; frame < stop; frame++) {
      for (let codebook = 0; codebook < count; codebook++) {
        input[codebook * width + frame - start] = BigInt(tokens[frame * count + codebook]);
      }
    }
    const lengths = BigInt64Array.of(BigInt(stop - start));
    const found = /** @type {Float32Array} */ (await worker.run("decoder", { tokens: input, dims: [1, count, width], lengths }));
    samples.set(found.subarray((keepStart - start) * size, (keepStop - start) * size), keepStart * size);
  }
  return samples;
}

/**
 * Split a recording into windows. Each window also has the surrounding frames that its results depend on.
 *
 * @param {number} total frames
 * @param {Limits} limits
 */
function windows(total, { past, future }) {
  return Array.from({ length: Math.ceil(total / CHUNK_FRAMES) }, (_, index) => {
    const keepStart = index * CHUNK_FRAMES;
    const keepStop = Math.min(total, keepStart + CHUNK_FRAMES);
    return { start: Math.max(0, keepStart - past), stop: Math.min(total, keepStop + future), keepStart, keepStop };
  });
}

/**
 * @param {Manifest} manifest
 * @returns {Metadata} metadata of token files; the keys have the same order as in the files
 */
function metadataOf({ sample_rate, samples_per_frame, levels, num_codebooks, fingerprint, written_by }) {
  return { sample_rate, samples_per_frame, levels, num_codebooks, fingerprint, precision: "fp32", written_by };
}

/**
 * @param {Metadata} metadata of a token file
 * @param {Manifest} manifest
 * @throws {UserError} if the file is from another codec
 */
function checkCodec(metadata, manifest) {
  const known = [manifest.fingerprint, manifest.weights_fingerprint, ...(manifest.older_fingerprints ?? [])];
  const isSame = /** @type {const} */ (["sample_rate", "samples_per_frame", "num_codebooks"]).every(
    (name) => metadata[name] === manifest[name],
  );
  const hasLevels = metadata.levels.join() === manifest.levels.join();
  if (!isSame || !hasLevels || (metadata.fingerprint && !known.includes(metadata.fingerprint))) {
    throw new UserError("This token file is not from the codec of this page.");
  }
}

/** The worker that runs the networks, one request at a time. */
class CodecWorker {
  /**
   * @param {URL} folder of the ONNX files
   * @param {Record<string, string>} hashes SHA-256 of each file
   */
  constructor(folder, hashes) {
    this.worker = new Worker(new URL("./codec-worker.js", import.meta.url), { type: "module" });
    this.worker.postMessage({ folder: folder.href, hashes });
  }

  /**
   * @param {"encoder" | "decoder"} network
   * @param {object} inputs
   * @returns {Promise<Int32Array | Float32Array>} output of the network
   * @throws {UserError} if the network cannot be loaded or run
   */
  run(network, inputs) {
    return new Promise((resolve, reject) => {
      this.worker.onmessage = ({ data }) => (data.error ? reject(new UserError(data.error)) : resolve(data.output));
      this.worker.onerror = () => reject(new UserError("ONNX Runtime could not be started in this browser."));
      this.worker.postMessage({ network, inputs });
    });
  }
}
