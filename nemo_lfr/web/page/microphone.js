/** Read the microphone as blocks of samples. */

import { UserError } from "./types.js";

/** An open microphone. Call `close` to turn off the browser's recording indicator. */
export class Microphone {
  /**
   * @param {MediaStream} stream
   * @param {AudioContext} context
   */
  constructor(stream, context) {
    this.stream = stream;
    this.context = context;
    this.sampleRate = context.sampleRate;
  }

  /**
   * Ask the user for the microphone.
   *
   * @param {(samples: Float32Array) => void} onSamples receives blocks of mono samples
   * @returns {Promise<Microphone>}
   * @throws {UserError} if there is no microphone, or the user refuses
   */
  static async open(onSamples) {
    if (!navigator.mediaDevices) {
      throw new UserError("This page may only use the microphone over HTTPS or from this computer.");
    }
    const raw = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    let stream;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ audio: raw });
    } catch (error) {
      const isRefused = error instanceof DOMException && error.name === "NotAllowedError";
      throw new UserError(isRefused ? "The browser was not allowed to use the microphone." : "No microphone was found.");
    }
    const microphone = new Microphone(stream, new AudioContext());
    try {
      await microphone.start(onSamples);
    } catch (error) {
      await microphone.close();
      throw error;
    }
    return microphone;
  }

  /**
   * Start to call `onSamples`.
   *
   * @param {(samples: Float32Array) => void} onSamples
   */
  async start(onSamples) {
    const { context, stream } = this;
    await context.audioWorklet.addModule(new URL("./capture-worklet.js", import.meta.url));
    const capture = new AudioWorkletNode(context, "capture", { numberOfOutputs: 1, channelCount: 1, channelCountMode: "explicit" });
    capture.port.onmessage = ({ data }) => onSamples(data);
    // The worklet's output is silent. Without a path to the destination, some browsers do not run it.
    context.createMediaStreamSource(stream).connect(capture).connect(context.destination);
    await context.resume();
  }

  /** Stop recording. */
  async close() {
    this.stream.getTracks().forEach((track) => track.stop());
    await this.context.close();
  }
}
