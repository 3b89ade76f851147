// Decode a compressed .lfr file as docs/concepts/lfr-compressed.md says: node entropy_reference.mjs MODEL.lfrm FILE.lfr
// Prints the tokens of each frame as JSON. Plain JavaScript, as a browser runs it: no sum reaches 2^53, no shift 2^31.
import { readFileSync } from "node:fs";

const ROOTS = [65536, 62757, 60097, 57549, 55109, 52773, 50535, 48393, 46341, 44376, 42495, 40693, 38968, 37316, 35734, 34219];
const clip = (value) => Math.min(Math.max(value, 0), 255);
const dot = (row, values) => row.reduce((sum, weight, index) => sum + weight * values[index], 0);
const zeros = (length) => new Array(length).fill(0);

function readModel(data) {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const length = data[5] | (data[6] << 8) | (data[7] << 16);
  const meta = JSON.parse(new TextDecoder().decode(data.subarray(8, 8 + length)));
  let at = 8 + length;
  const take = (size, rows, columns) =>
    Array.from({ length: rows }, () =>
      Array.from({ length: columns }, () => {
        const value = size === 1 ? view.getInt8(at) : size === 2 ? view.getInt16(at, true) : view.getInt32(at, true);
        at += size;
        return value;
      }),
    );
  const levels = Array.from({ length: meta.num_codebooks }, () => meta.levels).flat();
  const times = [...meta.averages, ...meta.spreads];
  const [first, second] = meta.hidden;
  const features = meta.past * (levels.length + 1) + times.length * levels.length;
  const rows = levels.reduce((sum, level) => sum + level, 0);
  const model = { meta, levels, times, w1: take(1, first, features), b1: take(4, 1, first)[0] };
  model.w2 = take(1, second, first + features);
  model.b2 = take(4, 1, second)[0];
  const byDigit = (tensor) => levels.map((level) => tensor.splice(0, level));
  model.e = byDigit(take(2, rows, second));
  model.v = byDigit(take(1, rows, second));
  model.c = byDigit(take(4, rows, 1));
  return model;
}

function decodePayload(model, payload, numFrames) {
  const { meta, levels, times } = model;
  const [shift1, shift2, shift3] = meta.shifts;
  const frames = [];
  const inputs = [];
  const averages = times.map(() => zeros(levels.length));
  let state = payload[0] + payload[1] * 256 + payload[2] * 65536 + payload[3] * 16777216;
  let at = 4;
  for (let number = 1; number <= numFrames; number++) {
    let x = [];
    for (let back = 1; back <= meta.past; back++) x.push(...(inputs[inputs.length - back] ?? zeros(levels.length)));
    for (let back = 1; back <= meta.past; back++) x.push(back <= inputs.length ? 127 : 0);
    for (const average of averages) x.push(...average.map((value) => value >> 8));
    const h = model.w1.map((row, unit) => clip((dot(row, x) + model.b1[unit]) >> shift1));
    const joined = [...h, ...x];
    const a = model.w2.map((row, unit) => dot(row, joined) + model.b2[unit]);
    const frame = levels.map((level, digit) => {
      const g = a.map((value) => clip(value >> shift2));
      const q = model.v[digit].map((row, k) => (dot(row, g) + model.c[digit][k][0]) >> shift3);
      const best = Math.max(...q);
      const steps = q.map((value) => Math.min(best - value, 255));
      const weights = steps.map((step) => ROOTS[step % 16] >> (step >> 4));
      const total = weights.reduce((sum, weight) => sum + weight, 0);
      const f = weights.map((weight) => 1 + Math.floor((weight * (32768 - level)) / total));
      f[q.indexOf(best)] += 32768 - f.reduce((sum, value) => sum + value, 0);
      let rest = state % 32768;
      let chosen = 0;
      while (rest >= f[chosen]) rest -= f[chosen++];
      state = f[chosen] * Math.floor(state / 32768) + rest;
      while (state < 8388608) state = state * 256 + payload[at++];
      model.e[digit][chosen].forEach((added, unit) => (a[unit] += added));
      return chosen;
    });
    frames.push(frame);
    const u = frame.map((digit, i) => (2 * digit - (levels[i] - 1)) * Math.floor(127 / (levels[i] - 1)));
    inputs.push(u);
    averages.forEach((average, index) => {
      const values = index < meta.averages.length ? u : u.map(Math.abs);
      const divisor = Math.min(number, 2 ** times[index]);
      values.forEach((value, i) => (average[i] += Math.floor((value * 256 - average[i]) / divisor)));
    });
  }
  if (state !== 8388608) throw new Error("the coded digits do not end where they should");
  return frames;
}

function decodeFile(data, model) {
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const length = data[5] | (data[6] << 8) | (data[7] << 16);
  const [, , levels, numCodebooks] = JSON.parse(new TextDecoder().decode(data.subarray(9, 9 + length)));
  const size = BigInt(levels.reduce((product, level) => product * level, 1));
  const bytesPerFrame = Math.ceil((size ** BigInt(numCodebooks) - 1n).toString(2).length / 8);
  const tokens = [];
  let at = 9 + length + 4;
  for (let count; (count = view.getUint32(at, true)); ) {
    const numBytes = view.getUint32(at + 4, true);
    const payload = data.subarray(at + 8, at + 8 + numBytes);
    at += 8 + numBytes + 4;
    if (numBytes === count * bytesPerFrame) {
      for (let begin = 0; begin < numBytes; begin += bytesPerFrame) {
        let value = payload.subarray(begin, begin + bytesPerFrame).reduceRight((sum, byte) => sum * 256n + BigInt(byte), 0n);
        const row = [];
        for (let codebook = 0; codebook < numCodebooks; codebook++, value /= size) row.push(Number(value % size));
        tokens.push(row);
      }
      continue;
    }
    for (const frame of decodePayload(model, payload, count)) {
      const row = [];
      for (let start = 0; start < frame.length; start += levels.length) {
        row.push(levels.reduceRight((token, level, i) => token * level + frame[start + i], 0));
      }
      tokens.push(row);
    }
  }
  return tokens;
}

const [model, file] = process.argv.slice(2).map((path) => new Uint8Array(readFileSync(path)));
console.log(JSON.stringify(decodeFile(file, readModel(model))));
