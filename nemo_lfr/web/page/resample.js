/** Resample with a windowed sinc filter, which is computed once for each phase. */

import { UserError } from "./types.js";

const MIN_RATE = 100; // Hz; both limits are those of the server
const MAX_RATE = 1_000_000;
const ZERO_CROSSINGS = 32; // on each side; attenuation: 0.1 dB at 0.89 of the lower Nyquist frequency, 100 dB at 1.04
const ROLLOFF = 0.95; // cutoff as a fraction of the lower Nyquist frequency
const MAX_PHASES = 512; // if exact resampling needs more filters, some are computed, and those between them are interpolated
const PHASES_PER_CROSSING = 1024; // interpolation with this many phases is exact to 100 dB
const BETA = 10; // parameter of the Kaiser window, which gives 100 dB of attenuation

/**
 * Resample a whole recording.
 *
 * @param {Float32Array} samples
 * @param {number} from Hz
 * @param {number} to Hz
 * @returns {Float32Array} round(length * to / from) samples
 * @throws {UserError} if a rate is not a whole number from 100 to 1,000,000
 */
export function resample(samples, from, to) {
  for (const rate of [from, to]) {
    if (Number.isInteger(rate) && rate >= MIN_RATE && rate <= MAX_RATE) continue;
    throw new UserError(`Audio with a sample rate of ${rate} Hz is not supported; use ${MIN_RATE} to ${MAX_RATE} Hz.`);
  }
  if (from === to) return samples;
  const divisor = gcd(from, to);
  const up = to / divisor;
  const down = from / divisor;
  const cutoff = ROLLOFF * Math.min(1, to / from);
  const half = Math.ceil(ZERO_CROSSINGS / cutoff);
  const count = up > MAX_PHASES ? Math.min(up, Math.ceil(PHASES_PER_CROSSING * cutoff)) : up;
  const phases = Array.from({ length: count + 1 }, (_, phase) => filter(phase / count, cutoff, half));
  const out = new Float32Array(Math.round((samples.length * to) / from));
  for (let index = 0; index < out.length; index++) {
    const position = index * down;
    const first = Math.floor(position / up) - half + 1;
    const phase = ((position % up) / up) * count;
    const whole = count === up ? position % up : Math.floor(phase);
    const rest = count === up ? 0 : phase - whole;
    out[index] = (1 - rest) * product(phases[whole], samples, first);
    if (rest) out[index] += rest * product(phases[whole + 1], samples, first);
  }
  return out;
}

/**
 * @param {Float64Array} taps
 * @param {Float32Array} samples
 * @param {number} first index of the sample at the first tap; may lie before or after the samples
 * @returns {number}
 */
function product(taps, samples, first) {
  let sum = 0;
  const end = Math.min(taps.length, samples.length - first);
  for (let tap = Math.max(0, -first); tap < end; tap++) sum += taps[tap] * samples[first + tap];
  return sum;
}

/**
 * @param {number} offset time from an input sample to the output sample, in input samples
 * @param {number} cutoff as a fraction of the input's Nyquist frequency
 * @param {number} half taps on each side
 * @returns {Float64Array}
 */
function filter(offset, cutoff, half) {
  const taps = new Float64Array(2 * half);
  let sum = 0;
  for (let tap = 0; tap < taps.length; tap++) {
    const x = tap - half + 1 - offset;
    const edge = Math.max(0, 1 - (x / half) ** 2);
    const sinc = x ? Math.sin(Math.PI * cutoff * x) / (Math.PI * x) : cutoff;
    taps[tap] = sinc * (bessel(BETA * Math.sqrt(edge)) / bessel(BETA));
    sum += taps[tap];
  }
  return taps.map((tap) => tap / sum);
}

/**
 * @param {number} x
 * @returns {number} the modified Bessel function of order 0
 */
function bessel(x) {
  let sum = 1;
  let term = 1;
  for (let k = 1; term > sum * 1e-12; k++) sum += term *= (x / (2 * k)) ** 2;
  return sum;
}

/**
 * @param {number} a
 * @param {number} b
 * @returns {number}
 */
function gcd(a, b) {
  return b ? gcd(b, a % b) : a;
}
