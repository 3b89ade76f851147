/** Live loop-back: microphone, encoder stream, decoder stream, loudspeaker. */

import { Microphone } from "./microphone.js";
import { UserError } from "./types.js";

/** @import { Backend } from "./types.js" */

const HOLD_FRAMES = 1; // that playing waits for after a gap
const LIMIT_FRAMES = 9; // that may wait to be played; the server computes up to 4 at a time
const MAX_BUFFERED = 1 << 20; // bytes that may wait to be sent before the connection counts as too slow

/** A running loop-back. */
export class Loopback {
  /**
   * @param {Backend} backend
   * @param {{encoder: number, decoder: number}} lookahead frames of right context
   */
  constructor(backend, lookahead) {
    this.backend = backend;
    this.lookahead = lookahead;
    this.captured = 0; // seconds
    this.played = 0; // seconds
    this.numBytes = 0; // of tokens, packed
    /** @type {(samples: Float32Array) => void} receives what the microphone records */
    this.onSamples = () => {};
    /** @type {(message: string) => void} called once, when the loop-back has ended by itself */
    this.onEnd = () => {};
    this.isClosed = false;
    /** @type {WebSocket[]} */
    this.sockets = [];
  }

  /** @returns {number} seconds from a sound at the microphone to the same sound at the loudspeaker */
  get delay() {
    return this.played ? this.captured - this.played : NaN;
  }

  /**
   * Start; the user is asked for the microphone.
   *
   * @throws {UserError} if there is no microphone
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
      this.connect(playback, microphone.sampleRate);
      await this.speaker.resume();
    } catch (error) {
      await this.close();
      throw error;
    }
  }

  /** Stop, and release the microphone. */
  async close() {
    if (this.isClosed) return;
    this.isClosed = true;
    this.sockets.forEach((socket) => socket.close());
    await this.microphone?.close();
    await this.speaker?.close();
  }

  /**
   * @param {AudioWorkletNode} playback
   * @param {number} sampleRate of the microphone
   */
  connect(playback, sampleRate) {
    const { openStream, info } = this.backend;
    if (!openStream) throw new UserError("Live streams need a server.");
    const encoder = openStream("encode", {
      audio: "pcm_f32le",
      sample_rate: String(sampleRate),
      lookahead: String(this.lookahead.encoder),
    });
    const decoder = openStream("decode", { audio: "pcm_f32le", lookahead: String(this.lookahead.decoder), ramp: "1,1,1,1" });
    this.sockets = [encoder, decoder];
    const frame = 2 * info.numCodebooks;
    const packed = Math.ceil((info.numCodebooks * Math.log2(info.codebookSize)) / 8);
    encoder.onmessage = ({ data }) => {
      if (typeof data === "string") return this.control(data);
      this.numBytes += (data.byteLength / frame) * packed;
      if (decoder.readyState === WebSocket.OPEN) decoder.send(data);
    };
    decoder.onmessage = ({ data }) => {
      if (typeof data === "string") return this.control(data);
      playback.port.postMessage(new Float32Array(data));
    };
    for (const socket of this.sockets) socket.onclose = () => this.end("The server closed the stream.");
  }

  /**
   * @param {Float32Array} samples of the microphone
   */
  capture(samples) {
    this.onSamples(samples);
    const [encoder, decoder] = this.sockets;
    if (encoder?.readyState !== WebSocket.OPEN || decoder?.readyState !== WebSocket.OPEN) return;
    if (encoder.bufferedAmount > MAX_BUFFERED) return this.end("The connection to the server is too slow.");
    encoder.send(samples.slice());
    this.captured += samples.length / (this.microphone?.sampleRate ?? 1);
  }

  /**
   * @param {string} message of the server
   */
  control(message) {
    const { type, error } = JSON.parse(message);
    if (type === "error") this.end(`The server says: ${error}`);
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
