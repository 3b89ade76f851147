/** @import { Client } from "./client.js" */

/**
 * Types that the modules of the page share.
 *
 * @typedef {object} CodecInfo
 * @property {string} name for display
 * @property {number} sampleRate Hz
 * @property {number} samplesPerFrame
 * @property {number} numCodebooks
 * @property {number} codebookSize
 * @property {number} bitRate bits per second
 * @property {number} encoderLookahead frames
 * @property {number} decoderLookahead frames
 *
 * @typedef {object} Recording
 * @property {string} name for display
 * @property {Float32Array} samples mono, in [-1, 1]
 * @property {number} sampleRate Hz, of `samples`
 * @property {Blob} file the audio file that `samples` come from
 * @property {string} [note] warning about the file
 *
 * @typedef {object} Audio
 * @property {Float32Array} samples mono, in [-1, 1]
 * @property {number} sampleRate Hz
 * @property {string} [note] warning about the file that `samples` come from
 *
 * @typedef {object} Metadata metadata of a token file, with the same keys as in the file
 * @property {number} sample_rate Hz
 * @property {number} samples_per_frame
 * @property {number[]} levels FSQ levels of one codebook
 * @property {number} num_codebooks
 * @property {string} [fingerprint]
 * @property {string} [precision]
 * @property {string} [written_by]
 *
 * @typedef {object} TokenFile
 * @property {Metadata} metadata
 * @property {Int32Array} tokens frame by frame, one token of each codebook
 * @property {number} numFrames
 * @property {number} numSamples length of the recording at the codec's rate
 *
 * A backend runs the codec on a server (server.js) or with ONNX Runtime in this browser (browser.js).
 *
 * @typedef {object} Backend
 * @property {CodecInfo} info
 * @property {string} place where audio is processed, for display
 * @property {(recording: Recording) => Promise<Uint8Array>} encode returns a token file
 * @property {(file: Uint8Array) => Promise<Audio>} decode takes a token file
 * @property {Client | null} client opens live streams; null if the backend has none
 */

/** Error whose message is meant for the user. */
export class UserError extends Error {}
