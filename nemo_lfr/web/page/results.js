/** Show the results of one recording: both versions, the tokens, and figures. */

import { onSchemeChange } from "./colors.js";
import { byId, canvasOf, rate, setText, size } from "./dom.js";
import { drawSpectrogram, drawTokens, loudest } from "./pictures.js";
import { Player, showPart } from "./player.js";
import { resample } from "./resample.js";
import { writeWav } from "./wav.js";

/** @import { Audio, CodecInfo, TokenFile } from "./types.js" */

/**
 * @typedef {object} Result
 * @property {string} name
 * @property {Audio | null} original null if a token file was opened
 * @property {Audio} decoded
 * @property {Uint8Array} file token file
 * @property {TokenFile | null} tokens null if the token file is compressed
 * @property {number | null} encodeSeconds time that encoding took; null if a token file was opened
 * @property {number} decodeSeconds
 */

/** The section that shows a result. */
export class Results {
  /** @param {CodecInfo} info */
  constructor({ encoderLookahead, decoderLookahead, samplesPerFrame, sampleRate }) {
    this.streamDelay = ((1 + encoderLookahead + decoderLookahead) * samplesPerFrame) / sampleRate;
    this.original = new Player(byId("original"), "original");
    this.decoded = new Player(byId("decoded"), "decoded");
    /** @type {Result | null} */
    this.result = null;
    /** @type {Audio | null} the original at the codec's rate */
    this.resampled = null;
    for (const player of [this.original, this.decoded]) {
      player.onPlay = (playing) => {
        for (const other of [this.original, this.decoded]) if (other !== playing) other.audio.pause();
      };
      player.onMove = (part) => showPart(byId("tokens"), part);
    }
    byId("switch").addEventListener("click", () => this.switchVersion());
    onSchemeChange(() => this.draw());
  }

  /**
   * Show a result, and move the focus to it.
   *
   * @param {Result} result
   */
  show(result) {
    this.result = result;
    const { original, decoded, name } = result;
    // Resample, so that both spectrograms have the same frequency axis.
    this.resampled = original && {
      samples: resample(original.samples, original.sampleRate, decoded.sampleRate),
      sampleRate: decoded.sampleRate,
    };
    byId("results").hidden = false;
    byId("original").hidden = byId("switch").hidden = !original;
    byId("tokens").hidden = !result.tokens;
    byId("results").classList.toggle("single", !original);
    setText("results-title", name);
    for (const player of [this.original, this.decoded]) player.audio.pause();
    if (original) this.original.load(writeWav(original.samples, original.sampleRate, 32), seconds(original));
    const wav = writeWav(decoded.samples, decoded.sampleRate, 16);
    this.decoded.load(wav, seconds(decoded));
    this.showFigures(result);
    const stem = name.replace(/\.[^.]*$/, "") || "speech";
    save("save-tokens", new Blob([result.file.slice()]), `${stem}.lfr`);
    save("save-audio", wav, `${stem}.decoded.wav`);
    this.draw();
    byId("results-title").focus({ preventScroll: true });
    byId("results").scrollIntoView({ block: "nearest" });
  }

  /** Draw the pictures in the colors of the color scheme. */
  draw() {
    if (!this.result) return;
    const { decoded, tokens } = this.result;
    const original = this.resampled;
    const reference = loudest(original ?? decoded);
    for (const [id, audio] of /** @type {[string, Audio | null][]} */ ([["original", original], ["decoded", decoded]])) {
      if (!audio) continue;
      drawSpectrogram(canvasOf(id), audio, reference);
      canvasOf(id).ariaLabel = `Spectrogram of the ${id} version, ${seconds(audio).toFixed(1)} seconds`;
    }
    if (tokens) {
      drawTokens(canvasOf("tokens"), tokens);
      canvasOf("tokens").ariaLabel = `${tokens.numFrames} frames of ${tokens.metadata.num_codebooks} tokens, as colors`;
    }
  }

  /**
   * @param {Result} result
   */
  showFigures({ original, decoded, file, tokens, encodeSeconds, decodeSeconds }) {
    const duration = seconds(decoded);
    const pcm = 2 * decoded.samples.length;
    setText("original-note", original ? kilohertz(original.sampleRate) : "");
    setText("decoded-note", `from ${size(file.length)}`);
    const facts = [
      ["Bit rate of the file", rate((8 * file.length) / duration), `with its header; ${rate((8 * pcm) / duration)} as 16-bit audio`],
      ["Token file", size(file.length), `${Math.round(pcm / file.length)} times smaller`],
    ];
    if (encodeSeconds !== null) facts.push(["Encoding", speed(duration, encodeSeconds), `real time; took ${time(encodeSeconds)}`]);
    facts.push(["Decoding", speed(duration, decodeSeconds), `real time; took ${time(decodeSeconds)}`]);
    facts.push(["Delay of a stream", time(this.streamDelay), "frame plus lookahead"]);
    byId("facts").replaceChildren(
      ...facts.map(([name, value, note]) => {
        const fact = document.createElement("div");
        fact.append(text("dt", name), text("dd", value), text("dd", note));
        return fact;
      }),
    );
    if (tokens) this.showTokens(tokens);
  }

  /**
   * @param {TokenFile} file
   */
  showTokens(file) {
    const { num_codebooks: count, sample_rate: sampleRate, samples_per_frame: frame } = file.metadata;
    setText("tokens-note", `${file.numFrames} × ${count}, every ${((1000 * frame) / sampleRate).toFixed(1)} ms`);
    const lines = Array.from({ length: count }, (_, codebook) =>
      Array.from({ length: file.numFrames }, (_, index) => String(file.tokens[index * count + codebook]).padStart(4)).join(" "),
    );
    setText("numbers", lines.join("\n"));
  }

  /** Switch to the other version, and continue playing at the same position. */
  switchVersion() {
    const from = this.decoded.audio.paused ? this.original : this.decoded;
    const to = from === this.original ? this.decoded : this.original;
    const isAtEnd = from.audio.ended || (from.audio.paused && to.audio.paused && from.audio.currentTime === 0);
    to.play(isAtEnd ? 0 : Math.min(from.audio.currentTime, to.duration));
  }
}

/**
 * @param {Audio} audio
 * @returns {number} its duration
 */
function seconds(audio) {
  return audio.samples.length / audio.sampleRate;
}

/**
 * @param {string} id of a link
 * @param {Blob} blob
 * @param {string} name
 */
function save(id, blob, name) {
  const link = byId(id, HTMLAnchorElement);
  if (link.href) URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(blob);
  link.download = name;
}

/**
 * @param {string} tag
 * @param {string} content
 * @returns {HTMLElement}
 */
function text(tag, content) {
  return Object.assign(document.createElement(tag), { textContent: content });
}

/**
 * @param {number} hertz
 * @returns {string}
 */
function kilohertz(hertz) {
  return `${Number((hertz / 1000).toFixed(2))} kHz`;
}

/**
 * @param {number} duration of the audio
 * @param {number} taken
 * @returns {string}
 */
function speed(duration, taken) {
  const factor = duration / Math.max(taken, 0.001);
  return `${factor < 10 ? factor.toFixed(1) : Math.round(factor)}×`;
}

/**
 * @param {number} taken seconds
 * @returns {string}
 */
function time(taken) {
  return taken < 0.9995 ? `${Math.round(taken * 1000)} ms` : `${taken.toFixed(1)} s`;
}
