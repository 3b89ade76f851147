// JavaScript client of `nemo-lfr serve`, for browsers and Node.js 22; docs/reference/protocol.md is the specification.
//
//   const client = new Client("http://127.0.0.1:8000");
//   const stream = await client.decodeStream({ ramp: [1, 2, 4] });
//   stream.push(frames); // Int16Array, frame by frame
//   stream.end();
//   for await (const samples of stream) play(samples); // Float32Array at stream.info.sample_rate

// Close codes of the server. `kind` of an error is "refused", "full", "shutdown", "lost" or "fault".
const KINDS = { 1007: "refused", 1008: "refused", 1009: "refused", 1011: "fault", 1012: "shutdown", 1013: "full" };
const MAX_MESSAGE = 1 << 15; // items

export class ServerError extends Error {
  constructor(message, kind) {
    super(message);
    this.name = "ServerError";
    this.kind = kind;
  }
}

export class Client {
  constructor(url, { token = null, WebSocket = globalThis.WebSocket, fetch = globalThis.fetch.bind(globalThis) } = {}) {
    Object.assign(this, { url: url.replace(/\/$/, ""), token, WebSocket, fetch });
  }

  // Codec and limits of the server.
  async info() {
    return (await this.#request("/v1/info", {})).json();
  }

  // Tokens of an audio file (Blob, ArrayBuffer or Uint8Array): {tokens: [frame, ...], num_samples, sample_rate, ...}.
  async encode(file) {
    return (await this.#request("/v1/encode?format=json", { method: "POST", body: file })).json();
  }

  // Audio file of tokens [frame, ...], as a Blob. `format` is wav, flac or opus.
  async decode(tokens, { numSamples = null, format = "wav" } = {}) {
    const body = JSON.stringify({ tokens, num_samples: numSamples });
    const headers = { "Content-Type": "application/json" };
    return (await this.#request(`/v1/decode?format=${format}`, { method: "POST", body, headers })).blob();
  }

  // Open a stream that takes tokens as an Int16Array, frame by frame, and yields samples as Float32Arrays.
  decodeStream({ ramp = [], lookahead = null, firstLookahead = null } = {}) {
    return this.#open("decode", { ramp: ramp.join(","), lookahead, first_lookahead: firstLookahead });
  }

  // Open a stream that takes samples as a Float32Array, and yields tokens as Int16Arrays, frame by frame.
  encodeStream({ sampleRate = null, lookahead = null } = {}) {
    return this.#open("encode", { sample_rate: sampleRate, lookahead });
  }

  #open(kind, parameters) {
    const url = new URL(`${this.url.replace(/^http/, "ws")}/v1/${kind}/stream?audio=pcm_f32le`);
    for (const [name, value] of Object.entries({ ...parameters, token: this.token })) {
      if (value !== null && value !== "") url.searchParams.set(name, value);
    }
    return new Stream(kind, new this.WebSocket(url.href)).ready;
  }

  async #request(path, options) {
    const headers = { ...options.headers, ...(this.token && { Authorization: `Bearer ${this.token}` }) };
    let response;
    try {
      response = await this.fetch(this.url + path, { ...options, headers });
    } catch (error) {
      throw new ServerError(`${this.url} cannot be reached (${error.message}).`, "lost");
    }
    if (response.ok) return response;
    const { error = response.statusText, type = "" } = await response.json().catch(() => ({}));
    const full = type === "ShutdownError" ? "shutdown" : "full";
    throw new ServerError(error, response.status === 503 ? full : response.status < 500 ? "refused" : "fault");
  }
}

// A stream of one recording; iterate over it for the results. `info` is the server's first message.
class Stream {
  #socket;
  #results = [];
  #error = null;
  #done = false;
  #wake = () => {};

  constructor(kind, socket) {
    this.kind = kind;
    this.#socket = socket;
    socket.binaryType = "arraybuffer";
    this.ready = new Promise((resolve, reject) => {
      socket.onmessage = ({ data }) => {
        const message = typeof data === "string" ? JSON.parse(data) : null;
        if (message?.type === "ready") resolve(Object.assign(this, { info: message }));
        else if (message?.type === "error") this.#fail(message.error, KINDS[message.code] ?? "fault");
        else if (message?.type === "done") this.#done = true;
        else this.#results.push(kind === "decode" ? new Float32Array(data) : new Int16Array(data));
        this.#wake();
      };
      const lose = (text, kind) => {
        if (!this.#done) this.#fail(text, kind);
        reject(this.#error);
        this.#wake();
      };
      socket.onclose = ({ code, reason }) =>
        lose(reason || `the connection was lost (code ${code}).`, KINDS[code] ?? "lost");
      socket.onerror = () => lose("the server cannot be reached, or the connection was lost.", "lost");
    });
  }

  // Bytes that the network has not taken; stop pushing while there are too many.
  get bufferedAmount() {
    return this.#socket.bufferedAmount;
  }

  // Send input of any length: an Int16Array of tokens, or a Float32Array of samples.
  push(items) {
    if (this.#error) throw this.#error;
    const array = this.kind === "decode" ? Int16Array.from(items) : Float32Array.from(items);
    const size = this.kind === "decode" ? MAX_MESSAGE - (MAX_MESSAGE % this.info.num_codebooks) : MAX_MESSAGE;
    for (let start = 0; start < array.length; start += size) this.#socket.send(array.slice(start, start + size));
  }

  // End the input. A decoder trims its audio to `numSamples`.
  end(numSamples = null) {
    if (this.#error) throw this.#error;
    this.#socket.send(JSON.stringify({ type: "end", ...(numSamples !== null && { num_samples: numSamples }) }));
  }

  close() {
    this.#done = true;
    this.#socket.close();
    this.#wake();
  }

  async *[Symbol.asyncIterator]() {
    while (true) {
      if (this.#results.length) yield this.#results.shift();
      else if (this.#error) throw this.#error;
      else if (this.#done) return;
      else await new Promise((resolve) => (this.#wake = resolve));
    }
  }

  #fail(message, kind) {
    this.#error ??= new ServerError(message, kind);
  }
}
