/**
 * JavaScript client of `nemo-lfr serve`, for browsers and Node.js 22; docs/reference/protocol.md is the specification.
 *
 *     const client = new Client("http://127.0.0.1:8000");
 *     const stream = await client.decodeStream({ ramp: [1, 2, 4] });
 *     stream.push(frames); // Int16Array, frame by frame
 *     stream.end();
 *     for await (const samples of stream) play(samples); // Float32Array at stream.info.sample_rate
 *
 * The module has no dependencies. A server also serves it as `/page/client.js`.
 *
 * @typedef {"refused" | "full" | "shutdown" | "lost" | "fault"} ErrorKind
 * @typedef {{version: string, model: string, fingerprint: string, sample_rate: number, samples_per_frame: number,
 *   frame_rate: number, num_codebooks: number, codebook_size: number, bit_rate: number, encoder_lookahead: number,
 *   decoder_lookahead: number, max_streams: number, max_message_bytes: number, max_body_bytes: number}} ServerInfo
 * @typedef {{sample_rate: number, samples_per_frame: number, num_codebooks: number, codebook_size: number,
 *   lookahead_frames: number}} StreamInfo
 * @typedef {{tokens: number[][], num_samples: number, sample_rate: number, samples_per_frame: number}} EncodedFile
 */

/** @type {Record<number, ErrorKind>} kind of error for each close code of the server */
const KINDS = { 1002: "fault", 1007: "refused", 1008: "refused", 1009: "refused", 1011: "fault", 1012: "shutdown", 1013: "full" };
const MAX_MESSAGE = 1 << 15; // samples or tokens in one message

/** Error for a request or a stream that failed. */
export class ServerError extends Error {
  /**
   * @param {string} message
   * @param {ErrorKind} kind
   * @param {number} code HTTP status or close code; 0 if there is none
   */
  constructor(message, kind, code = 0) {
    super(message);
    this.name = "ServerError";
    this.kind = kind;
    this.code = code;
  }
}

/** Client of one server. All methods throw `ServerError`. */
export class Client {
  /**
   * @param {string} url of the server
   * @param {{token?: string | null, WebSocket?: typeof globalThis.WebSocket, fetch?: typeof globalThis.fetch}} options
   *   access token, and replacements for the functions of the browser
   */
  constructor(url, { token = null, WebSocket = globalThis.WebSocket, fetch = globalThis.fetch.bind(globalThis) } = {}) {
    this.url = url.replace(/\/$/, "");
    this.token = token;
    this.WebSocket = WebSocket;
    this.fetch = fetch;
  }

  /** @returns {Promise<ServerInfo>} codec and limits of the server */
  async info() {
    return this.#json(await this.#request("/v1/info"));
  }

  /**
   * @param {BodyInit} file audio file, such as a Blob, an ArrayBuffer or a Uint8Array
   * @returns {Promise<EncodedFile>} tokens of the file, as a list of frames
   */
  async encode(file) {
    return this.#json(await this.#request("/v1/encode?format=json", { method: "POST", body: file }));
  }

  /**
   * @param {BodyInit} file audio file, such as a Blob, an ArrayBuffer or a Uint8Array
   * @returns {Promise<Blob>} token file (`.lfr`)
   */
  async encodeToTokenFile(file) {
    return (await this.#request("/v1/encode", { method: "POST", body: file })).blob();
  }

  /**
   * @param {(ArrayLike<number>)[] | Exclude<BodyInit, string>} tokens list of frames, or a token file (`.lfr`)
   * @param {{numSamples?: number | null, format?: "wav" | "flac" | "opus"}} options length to which
   *   the audio is trimmed, in samples (only for a list of frames), and format of the audio file
   * @returns {Promise<Blob>} audio file
   */
  async decode(tokens, { numSamples = null, format = "wav" } = {}) {
    const path = `/v1/decode?format=${format}`;
    if (!Array.isArray(tokens)) return (await this.#request(path, { method: "POST", body: tokens })).blob();
    const body = JSON.stringify({ tokens: tokens.map((frame) => Array.from(frame)), num_samples: numSamples });
    const headers = { "Content-Type": "application/json" };
    return (await this.#request(path, { method: "POST", body, headers })).blob();
  }

  /**
   * Open a stream that takes tokens, frame by frame, and yields samples.
   *
   * @param {{ramp?: number[], lookahead?: number | null, firstLookahead?: number | null}} options numbers of
   *   frames in the first chunks, lookahead in frames, and a smaller lookahead for the first frames
   * @returns {Promise<Stream<Float32Array>>}
   */
  decodeStream({ ramp = [], lookahead = null, firstLookahead = null } = {}) {
    const parameters = { ramp: ramp.join(","), lookahead, first_lookahead: firstLookahead };
    return Stream.open(this.#connect("decode", parameters), Int16Array, Float32Array);
  }

  /**
   * Open a stream that takes samples, and yields tokens, frame by frame.
   *
   * @param {{sampleRate?: number | null, lookahead?: number | null}} options sample rate in Hz, and lookahead in
   *   frames
   * @returns {Promise<Stream<Int16Array>>}
   */
  encodeStream({ sampleRate = null, lookahead = null } = {}) {
    return Stream.open(this.#connect("encode", { sample_rate: sampleRate, lookahead }), Float32Array, Int16Array);
  }

  /**
   * @param {"decode" | "encode"} kind
   * @param {Record<string, string | number | null>} parameters
   */
  #connect(kind, parameters) {
    const url = new URL(`${this.url.replace(/^http/, "ws")}/v1/${kind}/stream?audio=pcm_f32le`);
    for (const [name, value] of Object.entries({ ...parameters, token: this.token })) {
      if (value !== null && value !== "") url.searchParams.set(name, String(value));
    }
    return new this.WebSocket(url.href);
  }

  /**
   * @param {string} path
   * @param {{method?: string, body?: BodyInit, headers?: Record<string, string>}} options
   */
  async #request(path, options = {}) {
    const headers = { ...options.headers, ...(this.token && { Authorization: `Bearer ${this.token}` }) };
    let response;
    try {
      response = await this.fetch(this.url + path, { ...options, headers });
    } catch (error) {
      throw new ServerError(`${this.url} cannot be reached (${error instanceof Error ? error.message : error}).`, "lost");
    }
    const { ok, status, statusText } = response;
    if (ok) return response;
    const { error = `status ${status} ${statusText}`, type = "" } = await response.json().catch(() => ({}));
    const full = type === "ShutdownError" ? "shutdown" : "full";
    throw new ServerError(error, status === 503 ? full : status < 500 ? "refused" : "fault", status);
  }

  /** @param {Response} response */
  async #json(response) {
    try {
      return await response.json();
    } catch {
      throw new ServerError(`${this.url} did not answer with JSON; is it nemo-lfr serve?`, "fault", response.status);
    }
  }
}

/**
 * Stream of one recording. Iterate over the stream to get the results.
 *
 * @template {Float32Array | Int16Array} Result
 */
export class Stream {
  /** @type {Result[]} */
  #results = [];
  /** @type {ServerError | null} */
  #error = null;
  #done = false;
  #wake = () => {};
  #socket;
  #Input;

  /** @type {StreamInfo} the server's first message */
  info = { sample_rate: 0, samples_per_frame: 0, num_codebooks: 1, codebook_size: 0, lookahead_frames: 0 };

  /**
   * @param {WebSocket} socket
   * @param {new (items: ArrayLike<number>) => Float32Array<ArrayBuffer> | Int16Array<ArrayBuffer>} Input
   */
  constructor(socket, Input) {
    this.#socket = socket;
    this.#Input = Input;
  }

  /**
   * Wait until the server accepts the stream.
   *
   * @template {Float32Array | Int16Array} Result
   * @param {WebSocket} socket
   * @param {new (items: ArrayLike<number>) => Float32Array<ArrayBuffer> | Int16Array<ArrayBuffer>} Input
   * @param {new (data: ArrayBuffer) => Result} Output
   * @returns {Promise<Stream<Result>>}
   */
  static open(socket, Input, Output) {
    const stream = /** @type {Stream<Result>} */ (new Stream(socket, Input));
    socket.binaryType = "arraybuffer";
    return new Promise((resolve, reject) => {
      socket.onmessage = ({ data }) => {
        try {
          if (stream.#receive(data, Output)) resolve(stream);
        } catch {
          lose("the server sent a message that does not follow version 1 of the protocol.", 1002);
          socket.close();
        }
        stream.#wake();
      };
      const lose = (/** @type {string} */ text, code = 0) => {
        if (!stream.#done) stream.#fail(text, code);
        reject(stream.#error);
        stream.#wake();
      };
      socket.onclose = ({ code, reason }) => lose(reason || `the connection was lost (code ${code}).`, code);
      socket.onerror = () => lose("the server cannot be reached, or the connection was lost.");
    });
  }

  /** @returns {number} number of bytes that are not sent yet; wait before the next `push` while it is large */
  get bufferedAmount() {
    return this.#socket.bufferedAmount;
  }

  /** @param {ArrayLike<number>} items input of any length: tokens, frame by frame, or samples in [-1, 1] */
  push(items) {
    if (this.#error) throw this.#error;
    const array = new this.#Input(items);
    const size = MAX_MESSAGE - (MAX_MESSAGE % this.info.num_codebooks);
    for (let start = 0; start < array.length; start += size) this.#socket.send(array.slice(start, start + size));
  }

  /**
   * End the input.
   *
   * @param {number | null} numSamples length of the recording in samples; a decoder trims the audio to this length
   */
  end(numSamples = null) {
    if (this.#error) throw this.#error;
    this.#socket.send(JSON.stringify({ type: "end", ...(numSamples !== null && { num_samples: numSamples }) }));
  }

  /** Close the connection; results that have not arrived are lost. */
  close() {
    this.#done = true;
    this.#socket.close();
    this.#wake();
  }

  /** @returns {AsyncGenerator<Result>} the results, as they arrive */
  async *[Symbol.asyncIterator]() {
    while (true) {
      const result = this.#results.shift();
      if (result) yield result;
      else if (this.#error) throw this.#error;
      else if (this.#done) return;
      else await new Promise((resolve) => (this.#wake = () => resolve(null)));
    }
  }

  /**
   * @param {string | ArrayBuffer} data message of the server
   * @param {new (data: ArrayBuffer) => Result} Output
   * @returns {boolean} whether the server has accepted the stream
   */
  #receive(data, Output) {
    if (typeof data !== "string") {
      this.#results.push(new Output(data));
      return false;
    }
    const message = JSON.parse(data);
    if (message.type === "ready") this.info = message;
    else if (message.type === "error") this.#fail(message.error, message.code);
    else if (message.type === "done") this.#done = true;
    return message.type === "ready";
  }

  /**
   * @param {string} message
   * @param {number} code
   */
  #fail(message, code) {
    this.#error ??= new ServerError(message, KINDS[code] ?? "lost", code);
  }
}
