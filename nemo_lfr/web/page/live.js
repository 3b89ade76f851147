/** Live loop-back: microphone, encoder stream, decoder stream, loudspeaker. */

import { Microphone } from "./microphone.js";
import { explain } from "./server.js";
import { UserError } from "./types.js";

/** @import { Backend } from "./types.js" */
/** @import { Stream } from "./client.js" */

const HOLD_FRAMES = 1; // frames that must arrive after a gap before playing resumes
const LIMIT_FRAMES = 9; // maximum number of frames that wait to be played; the server sends up to 4 at a time
const MAX_BUFFERED = 1 << 20; // maximum number of bytes that wait to be sent; above, the connection is too slow

/** A running loop-back. */
export class Loopback {
  /**
   * @param {Backend} backend
   * @param {{encoder: number, decoder: number}} lookahead number of later frames that a result waits for
   */
  constructor(backend, lookahead) {
    this.backend = backend;
    this.lookahead = lookahead;
    this.captured = 0; // seconds
    this.played = 0; // seconds
    this.numBytes = 0; // size of the packed tokens
    /** @type {(samples: Float32Array) => void} receives what the microphone records */
    this.onSamples = () => {};
    /** @type {(message: string) => void} called once, when the loop-back has ended by itself */
    this.onEnd = () => {};
    this.isClosed = false;
    /** @type {Stream<any>[]} */
    this.streams = [];
  }

  /** @returns {number} seconds from a sound at the microphone to the same sound at the loudspeaker */
  get delay() {
    return this.played ? this.captured - this.played : NaN;
  }

  /**
   * Start. The browser asks the user for permission to use the microphone.
   *
   * @throws {UserError} if there is no microphone, or if the server opens no streams
   */
  async start() {
    const { info } = this.backend;
    this.speaker = new AudioContext({ sampleRate: info.sampleRate });
    try {
      await this.speaker.audioWorklet.addModule(new URL("./playback-worklet.js", import.meta.url));
      const processorOptions = { hold: HOLD_FRAMES * info.samplesPerFrame, limit: LIMIT_FRAMES * info.samplesPerFrame };
      const playback = new AudioWorkletNode(this.speaker, "playback", { numberOfInputs: 0, outputChannelCount: [1], processorOptions });
      playback.connect(this.speaker.destination);
      playback.port.onmessage = ({ data }) => (this.played = data / info.sampleRate);
      const microphone = await Microphone.open((samples) => this.capture(samples));
      if (this.isClosed) return await microphone.close(); // the user pressed Stop before allowing it
      this.microphone = microphone;
      await this.connect(playback, microphone.sampleRate);
      if (!this.isClosed) await this.speaker.resume();
    } catch (error) {
      await this.close();
      throw explain(error);
    }
  }

  /** Stop, and release the microphone. */
  async close() {
    if (this.isClosed) return;
    this.isClosed = true;
    this.streams.forEach((stream) => stream.close());
    await this.microphone?.close();
    await this.speaker?.close();
  }

  /**
   * Open both streams, and start to pass on their results.
   *
   * @param {AudioWorkletNode} playback
   * @param {number} sampleRate of the microphone
   */
  async connect(playback, sampleRate) {
    const { client, info } = this.backend;
    if (!client) throw new UserError("Live streams need a server.");
    const [encoder, decoder] = await Promise.all([
      this.keep(client.encodeStream({ sampleRate, lookahead: this.lookahead.encoder })),
      // `firstLookahead` would not help: tokens arrive in real time, so playback would pause after the first frames.
      this.keep(client.decodeStream({ lookahead: this.lookahead.decoder, ramp: [1, 1, 1, 1] })),
    ]);
    const packed = Math.ceil((info.numCodebooks * Math.log2(info.codebookSize)) / 8);
    this.pass(encoder, (tokens) => {
      this.numBytes += (tokens.length / info.numCodebooks) * packed;
      decoder.push(tokens);
    });
    this.pass(decoder, (samples) => playback.port.postMessage(samples));
    this.encoder = encoder;
  }

  /**
   * Wait for a stream, which is closed together with the loop-back.
   *
   * @template {Float32Array | Int16Array} Result
   * @param {Promise<Stream<Result>>} opening
   */
  async keep(opening) {
    const stream = await opening;
    if (this.isClosed) stream.close();
    this.streams.push(stream);
    return stream;
  }

  /**
   * Pass on the results of a stream until it ends.
   *
   * @template {Float32Array | Int16Array} Result
   * @param {Stream<Result>} stream
   * @param {(result: Result) => void} use
   */
  async pass(stream, use) {
    try {
      for await (const result of stream) use(result); // ends without an error only after `close`
    } catch (error) {
      this.fail(error);
    }
  }

  /**
   * End because of an error.
   *
   * @param {unknown} error
   */
  fail(error) {
    const shown = explain(error);
    this.end(shown instanceof UserError ? shown.message : `Something went wrong: ${shown}`);
  }

  /**
   * @param {Float32Array} samples of the microphone
   */
  capture(samples) {
    this.onSamples(samples);
    if (!this.encoder || this.isClosed) return;
    if (this.encoder.bufferedAmount > MAX_BUFFERED) return this.end("The connection to the server is too slow.");
    try {
      this.encoder.push(samples);
    } catch (error) {
      return this.fail(error);
    }
    this.captured += samples.length / (this.microphone?.sampleRate ?? 1);
  }

  /**
   * @param {string} message for the user
   */
  end(message) {
    if (this.isClosed) return;
    this.close();
    this.onEnd(message);
  }
}
