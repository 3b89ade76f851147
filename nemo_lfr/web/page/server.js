/** Backend that sends files and streams to `nemo-lfr serve`. */

import { Client, InputError, ServerError } from "./client.js";
import { UserError } from "./types.js";
import { readWav, writeWav } from "./wav.js";

/** @import { ServerInfo } from "./client.js" */
/** @import { Backend, CodecInfo, Recording } from "./types.js" */

/** Error for an access token that is missing or wrong. */
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
  const client = connect(base, token);
  return {
    info: infoOf(await client.info().catch(fail)),
    place: "On this server",
    encode: async (recording) => new Uint8Array(await (await encode(client, recording).catch(fail)).arrayBuffer()),
    decode: async (file) => {
      const wav = await client.decode(new Blob([file.slice()])).catch(fail);
      const audio = readWav(await wav.arrayBuffer(), "The audio from the server");
      if (!audio) throw new UserError("The server did not send audio.");
      return audio;
    },
    client,
  };
}

/**
 * @param {URL} base
 * @param {string} token
 * @returns {Client}
 * @throws {TokenError} if the token is not valid for any server
 */
function connect(base, token) {
  try {
    return new Client(base.href, { token });
  } catch (error) {
    throw error instanceof InputError ? new TokenError(error.message) : error;
  }
}

/**
 * Encode a recording. Send its own file, or a WAV file if the server cannot read the format of the file.
 *
 * @param {Client} client
 * @param {Recording} recording
 */
async function encode(client, recording) {
  try {
    return await client.encodeToTokenFile(recording.file);
  } catch (error) {
    if (!(error instanceof ServerError && error.code === 400)) throw error;
    return client.encodeToTokenFile(writeWav(recording.samples, recording.sampleRate, 32));
  }
}

/**
 * Convert an error of the client to an error for the user.
 *
 * @param {unknown} error
 * @returns {unknown} any other error unchanged
 */
export function explain(error) {
  if (!(error instanceof ServerError)) return error;
  if (error.code === 401) return new TokenError("This server requires its access token.");
  if (error.kind === "lost") return new UserError("The server does not answer, or the connection was lost.");
  return new UserError(error.code ? `The server says: ${error.message}` : error.message);
}

/**
 * @param {unknown} error
 * @returns {never}
 */
function fail(error) {
  throw explain(error);
}

/**
 * @param {ServerInfo} info
 * @returns {CodecInfo}
 */
function infoOf(info) {
  return {
    name: info.model,
    sampleRate: info.sample_rate,
    samplesPerFrame: info.samples_per_frame,
    numCodebooks: info.num_codebooks,
    codebookSize: info.codebook_size,
    bitRate: info.bit_rate,
    encoderLookahead: info.encoder_lookahead,
    decoderLookahead: info.decoder_lookahead,
  };
}
