/** The pictures: spectrograms, tokens, and a level meter. */

import { colorOf, ramp } from "./colors.js";

/** @import { Audio, TokenFile } from "./types.js" */

const FFT_SIZE = 1024;
const MAX_COLUMNS = 1200;
const RANGE_DB = 75;
const ROWS = 160;
const TOP_FREQUENCY = 8000; // Hz; speech has little above

/**
 * Draw a spectrogram.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {Audio} audio
 * @param {number} reference magnitude that gets the last color; see `loudest`
 */
export function drawSpectrogram(canvas, audio, reference) {
  const columns = magnitudes(audio);
  const colors = ramp("--spectrum");
  draw(canvas, columns.length, ROWS, (x, y) => {
    const db = 20 * Math.log10(columns[x][ROWS - 1 - y] / reference + 1e-9);
    return colorOf(colors, 1 + db / RANGE_DB);
  });
}

/**
 * Return the largest magnitude of a spectrogram.
 *
 * @param {Audio} audio
 * @returns {number}
 */
export function loudest(audio) {
  return Math.max(1e-3, ...magnitudes(audio).map((column) => Math.max(...column)));
}

/**
 * Draw tokens: one column for each frame, one row for each codebook.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {TokenFile} file
 */
export function drawTokens(canvas, file) {
  const { levels, num_codebooks: numCodebooks } = file.metadata;
  const size = levels.reduce((product, level) => product * level, 1);
  const colors = ramp("--weave");
  draw(canvas, file.numFrames, numCodebooks, (x, y) => colorOf(colors, file.tokens[x * numCodebooks + y] / (size - 1)));
}

/**
 * Draw the level of the last blocks of samples as bars.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {number[]} levels in [0, 1], oldest first
 */
export function drawLevel(canvas, levels) {
  const scale = devicePixelRatio;
  const width = (canvas.width = canvas.clientWidth * scale);
  const height = (canvas.height = canvas.clientHeight * scale);
  const context = canvas.getContext("2d");
  if (!context) return;
  context.fillStyle = getComputedStyle(canvas).color;
  const step = 5 * scale;
  const count = Math.floor(width / step);
  for (let bar = 0; bar < count; bar++) {
    const level = levels[levels.length - count + bar] ?? 0;
    const size = Math.max(2 * scale, level * height);
    context.fillRect(bar * step, (height - size) / 2, 3 * scale, size);
  }
}

/**
 * Return the height of a level bar.
 *
 * @param {Float32Array} samples
 * @returns {number} in [0, 1], from -60 dB to full scale
 */
export function levelOf(samples) {
  const power = samples.reduce((sum, sample) => sum + sample * sample, 0) / samples.length;
  return Math.max(0, Math.min(1, 1 + (10 * Math.log10(power + 1e-12)) / 60));
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {number} width
 * @param {number} height
 * @param {(x: number, y: number) => number} pixel
 */
function draw(canvas, width, height, pixel) {
  canvas.width = Math.max(1, width);
  canvas.height = height;
  const context = canvas.getContext("2d");
  if (!context || !width) return;
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) pixels[y * width + x] = pixel(x, y);
  context.putImageData(image, 0, 0);
}

/** @type {WeakMap<Float32Array, Float32Array[]>} */
const cache = new WeakMap();

/**
 * @param {Audio} audio
 * @returns {Float32Array[]} columns of `ROWS` magnitudes, from low to high on the mel scale
 */
function magnitudes({ samples, sampleRate }) {
  const known = cache.get(samples);
  if (known) return known;
  const hop = Math.max(FFT_SIZE / 8, samples.length / MAX_COLUMNS);
  const count = Math.max(1, Math.floor(samples.length / hop));
  const window = new Float32Array(FFT_SIZE).map((_, index) => 0.5 - 0.5 * Math.cos((2 * Math.PI * index) / FFT_SIZE));
  const places = melPlaces(sampleRate);
  const columns = Array.from({ length: count }, (_, column) => {
    const start = Math.round((column + 0.5) * hop) - FFT_SIZE / 2;
    const real = new Float32Array(FFT_SIZE).map((_, index) => (samples[start + index] ?? 0) * window[index]);
    const imaginary = new Float32Array(FFT_SIZE);
    transform(real, imaginary);
    return places.map((place) => {
      const low = Math.floor(place);
      const [below, above] = [low, low + 1].map((bin) => Math.hypot(real[bin], imaginary[bin]));
      return below + (above - below) * (place - low);
    });
  });
  cache.set(samples, columns);
  return columns;
}

/**
 * @param {number} sampleRate Hz
 * @returns {Float32Array} index of the FFT bin at the center of each row; it may have a fraction
 */
function melPlaces(sampleRate) {
  const mel = (/** @type {number} */ hertz) => Math.log1p(hertz / 700);
  const top = mel(Math.min(TOP_FREQUENCY, sampleRate / 2 - sampleRate / FFT_SIZE));
  return new Float32Array(ROWS).map((_, row) => ((Math.expm1((top * (row + 0.5)) / ROWS) * 700) / sampleRate) * FFT_SIZE);
}

/**
 * Compute the discrete Fourier transform in place.
 *
 * @param {Float32Array} real real parts; their number is a power of two
 * @param {Float32Array} imaginary imaginary parts
 */
function transform(real, imaginary) {
  const size = real.length;
  for (let index = 1, other = 0; index < size; index++) {
    let bit = size >> 1;
    for (; other & bit; bit >>= 1) other ^= bit;
    other ^= bit;
    if (index < other) {
      [real[index], real[other]] = [real[other], real[index]];
      [imaginary[index], imaginary[other]] = [imaginary[other], imaginary[index]];
    }
  }
  for (let half = 1; half < size; half *= 2) {
    for (let place = 0; place < half; place++) {
      const cosine = Math.cos((Math.PI * place) / half);
      const sine = -Math.sin((Math.PI * place) / half);
      for (let low = place; low < size; low += 2 * half) {
        const high = low + half;
        const re = real[high] * cosine - imaginary[high] * sine;
        const im = real[high] * sine + imaginary[high] * cosine;
        real[high] = real[low] - re;
        imaginary[high] = imaginary[low] - im;
        real[low] += re;
        imaginary[low] += im;
      }
    }
  }
}
