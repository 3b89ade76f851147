/** Backend that sends files and streams to `nemo-lfr serve`. */

import { readWav, writeWav } from "./wav.js";
import { UserError } from "./types.js";

/** @import { Backend, CodecInfo, Recording } from "./types.js" */

/** The server asks for an access token, or refuses the one it got. */
export class TokenError extends UserError {}

/**
 * Connect to the server that the page comes from.
 *
 * @param {URL} base of the page
 * @param {string} token access token; empty for none
 * @returns {Promise<Backend>}
 * @throws {TokenError} if the server requires another token
 */
export async function open(base, token) {
  const headers = token ? { Authorization: `Bearer ${token}` } : undefined;
  const send = async (/** @type {string} */ path, /** @type {RequestInit} */ options = {}) => {
    let response;
    try {
      response = await fetch(new URL(path, base), { ...options, headers });
    } catch {
      throw new UserError("The server does not answer.");
    }
    if (response.status === 401) throw new TokenError("This server requires its access token.");
    if (!response.ok) throw await errorOf(response);
    return response;
  };
  return {
    info: infoOf(await (await send("v1/info")).json()),
    place: "On this server",
    encode: async (recording) => new Uint8Array(await (await post(send, recording)).arrayBuffer()),
    decode: async (file) => {
      const response = await send("v1/decode", { method: "POST", body: new Blob([file.slice()]) });
      const audio = readWav(await response.arrayBuffer());
      if (!audio) throw new UserError("The server sent something else than audio.");
      return audio;
    },
    openStream: (kind, parameters) => {
      const url = new URL(`v1/${kind}/stream`, base);
      url.protocol = url.protocol.replace("http", "ws");
      url.search = new URLSearchParams(token ? { ...parameters, token } : parameters).toString();
      const socket = new WebSocket(url);
      socket.binaryType = "arraybuffer";
      return socket;
    },
  };
}

/**
 * Post a recording to be encoded: its own file, or as WAV if the server does not know the format.
 *
 * @param {(path: string, options: RequestInit) => Promise<Response>} send
 * @param {Recording} recording
 * @returns {Promise<Response>}
 */
async function post(send, recording) {
  try {
    return await send("v1/encode", { method: "POST", body: recording.file });
  } catch (error) {
    if (!(error instanceof FormatError)) throw error;
    const wav = writeWav(recording.samples, recording.sampleRate, 32);
    return await send("v1/encode", { method: "POST", body: wav });
  }
}

class FormatError extends UserError {}

/**
 * @param {Response} response
 * @returns {Promise<UserError>}
 */
async function errorOf(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    const { error } = await response.json();
    if (error) message = `The server says: ${error}`;
  } catch {
    // not the server's JSON, but that of a proxy
  }
  return response.status === 400 ? new FormatError(message) : new UserError(message);
}

/**
 * @param {Record<string, any>} found
 * @returns {CodecInfo}
 */
function infoOf(found) {
  return {
    name: found.model,
    sampleRate: found.sample_rate,
    samplesPerFrame: found.samples_per_frame,
    numCodebooks: found.num_codebooks,
    codebookSize: found.codebook_size,
    bitRate: found.bit_rate,
    encoderLookahead: found.encoder_lookahead,
    decoderLookahead: found.decoder_lookahead,
  };
}
