/** Read audio files as recordings. */

import { readWav } from "./wav.js";
import { UserError } from "./types.js";

/** @import { Recording } from "./types.js" */

/**
 * Read an audio file.
 *
 * WAV files keep their sample rate. The browser decodes all other formats, and resamples them to `sampleRate`.
 *
 * @param {Blob} file
 * @param {string} name for display
 * @param {number} sampleRate of the codec, Hz
 * @returns {Promise<Recording>}
 * @throws {UserError} if the browser cannot read the file, or the file is cut short or empty
 */
export async function readRecording(file, name, sampleRate) {
  const buffer = await file.arrayBuffer();
  const audio = readWav(buffer, name) ?? (await decode(buffer, name, sampleRate));
  if (!audio.samples.length) throw new UserError(`${name} has no audio.`);
  return { name, ...audio, file };
}

/**
 * @param {ArrayBuffer} buffer
 * @param {string} name
 * @param {number} sampleRate
 */
async function decode(buffer, name, sampleRate) {
  try {
    const decoded = await new OfflineAudioContext(1, 1, sampleRate).decodeAudioData(buffer);
    const samples = new Float32Array(decoded.length);
    for (let channel = 0; channel < decoded.numberOfChannels; channel++) {
      decoded.getChannelData(channel).forEach((sample, index) => (samples[index] += sample / decoded.numberOfChannels));
    }
    return { samples, sampleRate };
  } catch {
    throw new UserError(`${name} is neither a token file nor audio that this browser can read.`);
  }
}
