/** The section of the live loop-back: its button, the slider of the lookahead, and readings. */

import { byId, rate, setText } from "./dom.js";
import { Loopback } from "./live.js";
import { drawLevel, levelOf } from "./pictures.js";
import { UserError } from "./types.js";

/** @import { Backend } from "./types.js" */

const LIVE = "Live. Speak now.";
const SLOW = "The server is slower than real time, so the delay grows.";
const SLOW_SECONDS = 1; // delay beyond the lookahead that counts as slow

/**
 * Show the section if the backend has live streams.
 *
 * @param {Backend} backend
 */
export function showLivePanel(backend) {
  byId("live").hidden = !backend.client;
  if (backend.client) new LivePanel(backend);
}

class LivePanel {
  /** @param {Backend} backend */
  constructor(backend) {
    this.backend = backend;
    this.slider = byId("delay", HTMLInputElement);
    this.button = byId("live-start", HTMLButtonElement);
    this.canvas = byId("live-level", HTMLCanvasElement);
    /** @type {Loopback | null} */
    this.loopback = null;
    /** @type {number[]} */
    this.levels = [];
    const { encoderLookahead, decoderLookahead } = backend.info;
    this.slider.max = this.slider.value = String(encoderLookahead + decoderLookahead);
    this.slider.addEventListener("input", () => this.showLookahead());
    this.slider.addEventListener("change", () => this.loopback && this.start());
    this.button.addEventListener("click", () => (this.loopback ? this.stop("Stopped.") : this.start()));
    this.showLookahead();
  }

  /** Start, or start again with another lookahead. */
  async start() {
    await this.stop("");
    setText("live-status", "Starting …");
    const { encoderLookahead, decoderLookahead } = this.backend.info;
    const frames = Number(this.slider.value);
    const encoder = Math.round((frames * encoderLookahead) / Math.max(1, encoderLookahead + decoderLookahead));
    const loopback = new Loopback(this.backend, { encoder, decoder: frames - encoder });
    loopback.onEnd = (message) => this.stop(message);
    loopback.onSamples = (samples) => (this.levels = [...this.levels.slice(-400), levelOf(samples)]);
    this.loopback = loopback;
    this.showState();
    try {
      await loopback.start();
      if (this.loopback !== loopback) return loopback.close();
      setText("live-status", LIVE);
      this.follow(loopback);
    } catch (error) {
      const message = error instanceof UserError ? error.message : "The audio of this browser could not be started.";
      if (this.loopback === loopback) await this.stop(message);
    }
  }

  /** @param {string} message for the user */
  async stop(message) {
    const loopback = this.loopback;
    this.loopback = null;
    setText("live-status", message);
    this.showState();
    await loopback?.close();
  }

  /** Show whether the loop-back is running. */
  showState() {
    const isOn = Boolean(this.loopback);
    this.button.setAttribute("aria-pressed", String(isOn));
    this.button.classList.toggle("on", isOn);
    setText("live-label", isOn ? "Stop" : "Start");
    this.canvas.hidden = !isOn;
    if (!isOn) {
      this.levels = [];
      setText("live-delay", "–");
      setText("live-rate", "–");
    }
  }

  /** @param {Loopback} loopback */
  follow(loopback) {
    if (this.loopback !== loopback) return;
    drawLevel(this.canvas, this.levels);
    const delay = loopback.delay;
    if (delay) {
      setText("live-delay", `${Math.max(0, Math.round(delay * 100) * 10)} ms`);
      setText("live-rate", rate((8 * loopback.numBytes) / loopback.captured));
      const status = delay > this.lookahead + SLOW_SECONDS ? SLOW : LIVE;
      if (byId("live-status").textContent !== status) setText("live-status", status); // screen readers speak changes
    }
    setTimeout(() => requestAnimationFrame(() => this.follow(loopback)), 50);
  }

  /** @returns {number} the lookahead of the slider in seconds */
  get lookahead() {
    const { samplesPerFrame, sampleRate } = this.backend.info;
    return (Number(this.slider.value) * samplesPerFrame) / sampleRate;
  }

  /** Show the lookahead of the slider. */
  showLookahead() {
    const text = `${Math.round(1000 * this.lookahead)} ms`;
    setText("delay-value", text);
    this.slider.setAttribute("aria-valuetext", text);
    this.slider.style.setProperty("--part", `${(100 * Number(this.slider.value)) / Number(this.slider.max)}%`);
  }
}
