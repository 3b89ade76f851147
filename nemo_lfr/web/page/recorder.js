/** The record button, which records from the microphone and shows the level. */

import { byId, setText } from "./dom.js";
import { Microphone } from "./microphone.js";
import { drawLevel, levelOf } from "./pictures.js";
import { writeWav } from "./wav.js";

/** @import { Recording } from "./types.js" */

const MAX_SECONDS = 120;

/** Recorder of the page. */
export class Recorder {
  /** @param {(recording: Recording) => void} onRecording receives each recording */
  constructor(onRecording) {
    this.onRecording = onRecording;
    this.canvas = byId("level", HTMLCanvasElement);
    /** @type {Microphone | null} */
    this.microphone = null;
    /** @type {Float32Array[]} */
    this.blocks = [];
    /** @type {number[]} */
    this.levels = [];
    this.count = 0;
  }

  /** @returns {boolean} */
  get isRecording() {
    return Boolean(this.microphone);
  }

  /**
   * Start recording.
   *
   * @throws {import("./types.js").UserError} if there is no microphone
   */
  async start() {
    this.blocks = [];
    this.levels = [];
    this.microphone = await Microphone.open((samples) => {
      this.blocks.push(samples.slice());
      this.levels.push(levelOf(samples));
    });
    this.showState();
    this.follow();
  }

  /** Stop recording, and call `onRecording`. */
  async stop() {
    const microphone = this.microphone;
    if (!microphone) return;
    this.microphone = null;
    byId("record", HTMLButtonElement).disabled = true; // until the recording is encoded, so that a second click does not start another one
    await microphone.close();
    this.showState();
    const samples = new Float32Array(this.blocks.reduce((length, block) => length + block.length, 0));
    this.blocks.reduce((at, block) => (samples.set(block, at), at + block.length), 0);
    const { sampleRate } = microphone;
    this.count += 1;
    this.onRecording({ name: `Recording ${this.count}`, samples, sampleRate, file: writeWav(samples, sampleRate, 32) });
  }

  /** Show whether a recording is running. */
  showState() {
    byId("record").classList.toggle("on", this.isRecording);
    setText("record-label", this.isRecording ? "Stop" : "Record");
    this.canvas.hidden = !this.isRecording;
    for (const id of ["choose", "example"]) byId(id, HTMLButtonElement).disabled = this.isRecording;
  }

  /** Draw the level and count the seconds during a recording. */
  follow() {
    if (!this.microphone) return;
    drawLevel(this.canvas, this.levels);
    const seconds = (this.blocks.length * 1024) / this.microphone.sampleRate;
    setText("record-label", `Stop · ${seconds.toFixed(0)} s`);
    if (seconds > MAX_SECONDS) this.stop();
    else requestAnimationFrame(() => this.follow());
  }
}
