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
 * @typedef {number[] | Int8Array | Uint8Array | Int16Array | Uint16Array | Int32Array | Uint32Array} Integers
 * @typedef {number[] | Float32Array | Float64Array | Int16Array} Samples
 * @typedef {Blob | ArrayBuffer | Uint8Array<ArrayBuffer> | DataView<ArrayBuffer>} FileContent
 * @typedef {"wav" | "flac" | "opus"} AudioFormat
 */

/** @type {Record<number, ErrorKind>} kind of error for each close code of the server */
const KINDS = {
  1002: "fault",
  1007: "refused",
  1008: "refused",
  1009: "refused",
  1011: "fault",
  1012: "shutdown",
  1013: "full",
};
const MAX_MESSAGE = 1 << 15; // samples or tokens in one message
const MAX_TEXT = 1 << 20; // characters in one text message
const MIN_SPEED = 64_000; // bytes per second; at this speed, a large file may take longer than the timeout
const MAX_SECONDS = 1_000_000; // largest timeout; browsers do not support much larger ones
// Largest responses, in bytes. The limits for files are generous.
const MAX_ERROR = 100_000;
const MAX_INFO = 1 << 20;
const maxEncoded = (/** @type {number} */ bytes) => 2 ** 26 + 64 * bytes;
const maxAudio = (/** @type {number} */ frames) => MAX_INFO + 2 ** 16 * frames;
const MAX_CODEBOOK = 1 << 15; // size of the largest codebook whose tokens fit into int16
const MAX_PEAK = 64; // as on the server; recordings in floating point may exceed 1 slightly
const INTEGERS = ["Array", "Int8Array", "Uint8Array", "Int16Array", "Uint16Array", "Int32Array", "Uint32Array"];
const SAMPLES = ["Array", "Float32Array", "Float64Array", "Int16Array"];
const FORMATS = ["wav", "flac", "opus"];
const WAV_TAGS = [1, 3, 0xfffe]; // format tags of a WAV file with samples that are not compressed

const isCount = (/** @type {any} */ value) => Number.isSafeInteger(value) && value >= 0;

/** @type {Record<string, [string, (value: any) => boolean]>} description and check of each type of a JSON value */
const TYPES = {
  text: ["text", (value) => typeof value === "string"],
  name: ["printable text", (value) => typeof value === "string" && !/\p{C}/u.test(value)],
  count: ["a non-negative integer", isCount],
  limit: ["a positive integer", (value) => isCount(value) && value > 0],
  size: ["an integer from 1 to 2**31 - 1", (value) => isCount(value) && value > 0 && value < 2 ** 31],
  positive: ["a positive number", (value) => Number.isFinite(value) && value > 0],
  list: ["a list", Array.isArray],
};
const CODEC = { sample_rate: "size", samples_per_frame: "size", num_codebooks: "size", codebook_size: "size" };
const INFO = {
  ...CODEC,
  version: "name",
  model: "name",
  fingerprint: "name",
  frame_rate: "positive",
  bit_rate: "positive",
  encoder_lookahead: "count",
  decoder_lookahead: "count",
  max_streams: "limit",
  max_message_bytes: "limit",
  max_body_bytes: "limit",
};
const ENCODED = { tokens: "list", num_samples: "count", sample_rate: "size", samples_per_frame: "size" };
/** @type {Record<"decode" | "encode", Record<string, Record<string, string>>>} text messages of each kind of stream */
const MESSAGES = {
  decode: { done: { num_samples: "count" } },
  encode: { done: { num_frames: "count" } },
};
for (const messages of Object.values(MESSAGES)) {
  messages.ready = { ...CODEC, lookahead_frames: "count" };
  messages.error = { code: "count", error: "text" };
}

/** Error for an argument that is not valid. Nothing was sent to the server. */
export class InputError extends Error {
  /** @param {string} message */
  constructor(message) {
    super(message);
    this.name = "InputError";
  }
}

/** Error for a request or a stream that failed. */
export class ServerError extends Error {
  /**
   * @param {string} message
   * @param {ErrorKind} kind
   * @param {number} code HTTP status or close code of the server; 0 if there is none
   */
  constructor(message, kind, code = 0) {
    super(message);
    this.name = "ServerError";
    this.kind = kind;
    this.code = code;
  }
}

/** Client of one server. All methods throw `ServerError`, or `InputError` for an invalid argument. */
export class Client {
  /**
   * @param {string} url of the server
   * @param {{token?: string | null, timeoutSeconds?: number, WebSocket?: typeof globalThis.WebSocket,
   *   fetch?: typeof globalThis.fetch}} options `token` is the access token. `timeoutSeconds` is the maximum time to
   *   wait for a connection, for a response or for progress in a stream; a large response may take longer. `WebSocket`
   *   and `fetch` replace the class and the function of the browser.
   */
  constructor(url, options = {}) {
    checkNames(options, ["token", "timeoutSeconds", "WebSocket", "fetch"]);
    const { token = null, timeoutSeconds = 60, WebSocket = globalThis.WebSocket, fetch = globalThis.fetch } = options;
    this.url = addressOf(url);
    if (typeof timeoutSeconds !== "number" || !(timeoutSeconds > 0 && timeoutSeconds <= MAX_SECONDS)) {
      throw new InputError(`timeoutSeconds is ${show(timeoutSeconds)}; pass a positive number up to ${MAX_SECONDS}.`);
    }
    this.timeoutSeconds = timeoutSeconds;
    if (token !== null && !(typeof token === "string" && /^[ -~]*$/.test(token))) {
      throw new InputError("the access token is not printable ASCII; pass the value that the server requires.");
    }
    this.token = token;
    this.WebSocket = WebSocket;
    this.fetch = fetch.bind(globalThis); // browsers refuse another `this`
  }

  /** @returns {Promise<ServerInfo>} codec and limits of the server */
  async info() {
    return this.#json("/v1/info", {}, INFO, MAX_INFO);
  }

  /**
   * @param {FileContent} file audio file
   * @returns {Promise<EncodedFile>} tokens of the file, as a list of frames
   */
  async encode(file) {
    const limit = maxEncoded(sizeOf("audio file", file));
    const encoded = await this.#json("/v1/encode?format=json", { method: "POST", body: file }, ENCODED, limit);
    const problem = tokensProblem(encoded, await this.info());
    if (problem) throw this.#stranger(problem);
    return encoded;
  }

  /**
   * @param {FileContent} file audio file
   * @returns {Promise<Blob>} token file (`.lfr`)
   */
  async encodeToTokenFile(file) {
    const limit = maxEncoded(sizeOf("audio file", file));
    const { content, type } = await this.#request("/v1/encode", { method: "POST", body: file }, limit);
    const start = await content.slice(0, 4).text();
    if (type === "application/octet-stream" && start === "LFRT") return content;
    throw this.#stranger("does not answer with a token file");
  }

  /**
   * @param {Integers[] | FileContent} tokens list of frames, or a token file (`.lfr`)
   * @param {{numSamples?: number | null, format?: AudioFormat}} options `numSamples` is the
   *   length in samples to which the audio is trimmed, only for a list of frames. `format` is the format of the audio
   *   file.
   * @returns {Promise<Blob>} audio file
   */
  async decode(tokens, options = {}) {
    checkNames(options, ["numSamples", "format"]);
    const { numSamples = null, format = "wav" } = options;
    checkCounts({ numSamples });
    if (!FORMATS.includes(format)) {
      throw new InputError(`format is ${show(format)}; pass one of ${FORMATS.join(", ")}.`);
    }
    /** @type {{body: FileContent | string, headers?: Record<string, string>}} */
    let message;
    let limit;
    if (Array.isArray(tokens)) {
      const body = JSON.stringify({ tokens: framesOf(tokens), num_samples: numSamples });
      message = { body, headers: { "Content-Type": "application/json" } };
      limit = maxAudio(tokens.length);
    } else {
      limit = maxAudio(sizeOf("token file", tokens)); // in a token file, a frame takes about one byte or more
      if (numSamples !== null) throw new InputError("numSamples is only for a list of frames; leave it out.");
      message = { body: tokens };
    }
    const path = `/v1/decode?format=${format}`;
    const { content, type } = await this.#request(path, { method: "POST", ...message }, limit);
    if (!/^(audio\/|application\/o)/.test(type)) {
      throw this.#stranger(`answers with ${type ? show(type) : "no content type"}, not audio`);
    }
    const numFrames = Array.isArray(tokens) ? tokens.length : null;
    const problem = audioProblem(await content.arrayBuffer(), format, await this.info(), numFrames, numSamples);
    if (problem) throw this.#stranger(`answers with ${problem}`);
    return content;
  }

  /**
   * Open a stream that takes tokens, frame by frame, and yields samples.
   *
   * @param {{ramp?: number[], lookahead?: number | null, firstLookahead?: number | null}} options
   *   `ramp` contains the numbers of frames in the first chunks. If you push frames one by one, the audio starts
   *   sooner with small first chunks, such as `[1, 2, 4]`. `lookahead` is in frames. `firstLookahead` is a smaller
   *   lookahead for the first frames, at most `lookahead`.
   * @returns {Promise<Stream<Float32Array>>}
   */
  async decodeStream(options = {}) {
    checkNames(options, ["ramp", "lookahead", "firstLookahead"]);
    const { ramp = [], lookahead = null, firstLookahead = null } = options;
    checkCounts({ lookahead, firstLookahead });
    if (lookahead !== null && firstLookahead !== null && firstLookahead > lookahead) {
      const remedy = `pass at most ${lookahead}, or a larger lookahead`;
      throw new InputError(`firstLookahead is ${firstLookahead}, but lookahead is only ${lookahead}; ${remedy}.`);
    }
    if (!Array.isArray(ramp)) {
      throw new InputError(`ramp is ${show(ramp)}; pass numbers of frames, such as [1, 2, 4].`);
    }
    for (const [index, size] of ramp.entries()) checkCounts({ [`ramp[${index}]`]: size }, 0, false);
    const parameters = { ramp: ramp.join(","), lookahead, first_lookahead: firstLookahead };
    return Stream.open(this.#connect("decode", parameters), "decode", null, this.timeoutSeconds);
  }

  /**
   * Open a stream that takes samples, and yields tokens, frame by frame.
   *
   * @param {{sampleRate?: number | null, lookahead?: number | null}} options `sampleRate` is in Hz, and
   *   `lookahead` in frames.
   * @returns {Promise<Stream<Int16Array>>}
   */
  async encodeStream(options = {}) {
    checkNames(options, ["sampleRate", "lookahead"]);
    const { sampleRate = null, lookahead = null } = options;
    checkCounts({ sampleRate }, 1);
    checkCounts({ lookahead });
    const socket = this.#connect("encode", { sample_rate: sampleRate, lookahead });
    return Stream.open(socket, "encode", sampleRate, this.timeoutSeconds);
  }

  /**
   * @param {"decode" | "encode"} kind
   * @param {Record<string, string | number | null>} parameters
   */
  #connect(kind, parameters) {
    if (!this.WebSocket) {
      throw new InputError("there is no WebSocket class; use Node.js 22 or later, or pass the option WebSocket.");
    }
    const url = new URL(`${this.url.replace(/^http/, "ws")}/v1/${kind}/stream?audio=pcm_f32le`);
    for (const [name, value] of Object.entries({ ...parameters, token: this.token })) {
      if (value !== null && value !== "") url.searchParams.set(name, String(value));
    }
    return new this.WebSocket(url.href);
  }

  /**
   * @param {string} path
   * @param {{method?: string, body?: FileContent | string, headers?: Record<string, string>}} options
   * @param {number} maxBytes maximum size of the response
   * @returns {Promise<{content: Blob, type: string}>} body of the response, and its media type in lower case
   */
  async #request(path, options, maxBytes) {
    const headers = { ...options.headers, ...(this.token && { Authorization: `Bearer ${this.token}` }) };
    const abort = new AbortController();
    const timer = new Timer(() => abort.abort());
    timer.start(this.timeoutSeconds + (options.body ? sizeOf("body", options.body) / MIN_SPEED : 0));
    let response;
    let answer = null;
    try {
      response = await this.fetch(this.url + path, { ...options, headers, signal: abort.signal });
      const type = response.headers.get("Content-Type") ?? "";
      const mediaType = type.split(";")[0].trim().toLowerCase();
      const isDone = response.status === 200;
      const content = await this.#read(response, isDone ? maxBytes : MAX_ERROR, timer).catch((error) => {
        if (isDone) throw error;
        return new Blob(); // the status is more important
      });
      if (isDone) return { content, type: mediaType };
      answer = parse(await content.text()) ?? null;
    } catch (error) {
      if (error instanceof ServerError) throw error;
      const problem = error instanceof Error ? error.message : String(error);
      const reason = abort.signal.aborted ? `no answer for ${this.timeoutSeconds} s` : shorten(problem);
      throw new ServerError(
        `${this.url} cannot be reached or does not answer (${reason}); check its address, or try again later.`,
        "lost",
      );
    } finally {
      timer.stop();
      abort.abort(); // frees the connection of a response that was not read to its end
    }
    const { status, statusText } = response;
    const isOurs = !problemOf(answer, { error: "text" });
    const message = isOurs ? shorten(answer.error, 500) : `status ${status} ${shorten(statusText)}`;
    const full = isOurs && answer.type === "ShutdownError" ? "shutdown" : "full";
    const isFull = status === 429 || status === 503;
    const isLost = status === 502 || status === 504; // a proxy does not reach the server
    const other = status >= 400 && status < 500 ? "refused" : isLost ? "lost" : "fault";
    throw new ServerError(message, isFull ? full : other, status);
  }

  /**
   * Read the body of a response.
   *
   * @param {Response} response
   * @param {number} maxBytes
   * @param {Timer} timer that aborts the request if no data arrives
   * @returns {Promise<Blob>}
   */
  async #read(response, maxBytes, timer) {
    const reader = response.body?.getReader();
    const pieces = [];
    const start = Date.now();
    for (let size = 0; reader; ) {
      timer.start(this.timeoutSeconds);
      const { done, value } = await reader.read();
      if (done) break;
      pieces.push(value);
      size += value.byteLength;
      if (size > maxBytes) throw this.#stranger(`answers with more than ${maxBytes} bytes`);
      const elapsed = (Date.now() - start) / 1000;
      if (elapsed > this.timeoutSeconds + size / MIN_SPEED) {
        throw new Error(`only ${size} bytes of the answer arrived in ${Math.round(elapsed)} s`);
      }
    }
    return new Blob(/** @type {BlobPart[]} */ (pieces));
  }

  /**
   * @param {string} path
   * @param {{method?: string, body?: FileContent}} options
   * @param {Record<string, string>} shape types of the keys in the response
   * @param {number} maxBytes maximum size of the response
   */
  async #json(path, options, shape, maxBytes) {
    const { content, type } = await this.#request(path, options, maxBytes);
    const values = type.includes("json") ? parse(await content.text()) : undefined;
    if (values === undefined) throw this.#stranger("does not answer with JSON");
    const problem = problemOf(values, shape);
    if (problem) throw this.#stranger(`answers with JSON in which ${problem}`);
    return values;
  }

  /** @param {string} problem of a response that `nemo-lfr serve` would not send */
  #stranger(problem) {
    return new ServerError(`${this.url} ${problem}; is it the address of nemo-lfr serve?`, "fault");
  }
}

/**
 * Stream of one recording. Iterate over the stream to get the results, with one iterator at a time.
 *
 * @template {Float32Array | Int16Array} Result
 */
export class Stream {
  /** @type {Result[]} */
  #results = [];
  /** @type {ServerError | null} */
  #error = null;
  #isReady = false;
  #hasEnded = false; // whether the end of the input was sent
  #isDone = false; // whether all results have arrived, or the stream was closed
  #isRead = false; // whether an iterator is reading the results
  /** @type {number | null} length to which the audio is trimmed */
  #numSamples = null;
  #numSent = 0; // frames of a stream that decodes, samples of a stream that encodes
  #numReceived = 0;
  #wake = () => {};
  #expire = () => {};
  #socket;
  #kind;
  #sampleRate;
  #timeoutSeconds;
  #timer = new Timer(() => this.#expire());

  /** @type {StreamInfo} the server's first message */
  info = { sample_rate: 0, samples_per_frame: 0, num_codebooks: 1, codebook_size: 0, lookahead_frames: 0 };

  /**
   * @param {WebSocket} socket
   * @param {"decode" | "encode"} kind
   * @param {number | null} sampleRate of the samples that are pushed, Hz; null for the sample rate of the codec
   * @param {number} timeoutSeconds maximum time to wait for a message that the server must send
   */
  constructor(socket, kind, sampleRate = null, timeoutSeconds = 60) {
    this.#socket = socket;
    this.#kind = kind;
    this.#sampleRate = sampleRate;
    this.#timeoutSeconds = timeoutSeconds;
  }

  /**
   * Wait until the server accepts the stream.
   *
   * @param {WebSocket} socket
   * @param {"decode" | "encode"} kind
   * @param {number | null} sampleRate of the samples that are pushed, Hz; null for the sample rate of the codec
   * @param {number} timeoutSeconds maximum time to wait for a message that the server must send
   * @returns {Promise<Stream<any>>}
   */
  static open(socket, kind, sampleRate = null, timeoutSeconds = 60) {
    const stream = new Stream(socket, kind, sampleRate, timeoutSeconds);
    socket.binaryType = "arraybuffer";
    return new Promise((resolve, reject) => {
      const settle = () => {
        stream.#watch();
        if (stream.#error) reject(stream.#error);
        else if (stream.#isReady) resolve(stream);
        stream.#wake();
      };
      const lose = (/** @type {string} */ text, code = 0) => {
        if (!stream.#isDone) stream.#fail(text, KINDS[code] ?? "lost", code);
        settle();
      };
      socket.onmessage = ({ data }) => {
        stream.#receive(data);
        if (stream.#error || stream.#isDone) socket.close();
        settle();
      };
      socket.onclose = ({ code, reason }) => {
        lose(shorten(reason, 500) || `the connection was lost (code ${code}).`, code);
      };
      socket.onerror = () => lose("the server cannot be reached, or the connection was lost.");
      stream.#expire = () => {
        lose(`the server does not answer (nothing arrived for ${timeoutSeconds} s); try again later.`);
        socket.close();
      };
      stream.#watch();
    });
  }

  /** @returns {number} number of bytes that are not sent yet; wait before the next `push` while it is large */
  get bufferedAmount() {
    return this.#socket.bufferedAmount;
  }

  /**
   * Send input of any length.
   *
   * @param {Samples | Integers} items to decode: tokens, frame by frame, as integers. To encode: samples in [-1, 1].
   *   An Int16Array is divided by 32768, and a Float64Array or an array is converted to float32.
   */
  push(items) {
    this.#checkOpen();
    const array = this.#kind === "encode" ? samplesOf(items) : this.#tokensOf(items);
    const width = this.#kind === "encode" ? 1 : this.info.num_codebooks;
    const size = Math.max(width, MAX_MESSAGE - (MAX_MESSAGE % width));
    this.#numSent += array.length / width;
    for (let start = 0; start < array.length; start += size) this.#socket.send(array.slice(start, start + size));
  }

  /**
   * End the input.
   *
   * @param {number | null} numSamples length of the recording in samples, only for a stream that decodes; the audio is
   *   trimmed to this length
   */
  end(numSamples = null) {
    this.#checkOpen();
    checkCounts({ numSamples });
    if (numSamples !== null && this.#kind === "encode") {
      throw new InputError("numSamples is only for streams that decode; leave it out.");
    }
    this.#hasEnded = true;
    this.#numSamples = numSamples;
    this.#socket.send(JSON.stringify({ type: "end", ...(numSamples !== null && { num_samples: numSamples }) }));
    this.#watch();
  }

  /** Close the connection; results that have not arrived are lost. */
  close() {
    this.#hasEnded = this.#isDone = true;
    this.#watch();
    this.#socket.close();
    this.#wake();
  }

  /**
   * @returns {AsyncGenerator<Result>} the results, as they arrive
   * @throws {InputError} if another iterator has started and has not ended; `break` in a `for await` loop ends it
   */
  async *[Symbol.asyncIterator]() {
    if (this.#isRead) {
      throw new InputError("another iterator is reading the results of this stream; read them with one iterator.");
    }
    this.#isRead = true;
    try {
      while (true) {
        const result = this.#results.shift();
        if (result) yield result;
        else if (this.#error) throw this.#error;
        else if (this.#isDone) return;
        else await new Promise((resolve) => (this.#wake = () => resolve(null)));
      }
    } finally {
      this.#isRead = false;
    }
  }

  /** Name of the items that are received. */
  get #unit() {
    return this.#kind === "decode" ? "samples" : "frames";
  }

  /** Total number of results for the input that was sent so far, without trimming. */
  get #numExpected() {
    const { sample_rate: rate, samples_per_frame: size } = this.info;
    if (this.#kind === "decode") return this.#numSent * size;
    const factor = rate / (this.#sampleRate ?? rate);
    return Math.ceil(Math.ceil(this.#numSent * factor) / size); // the server rounds both lengths up
  }

  /** Run the timer while the server must send a message; stop it while the server may be waiting for input. */
  #watch() {
    const mustAnswer = !this.#isReady || this.#hasEnded;
    if (!mustAnswer || this.#isDone || this.#error) this.#timer.stop();
    else if (!this.#timer.isRunning) this.#timer.start(this.#timeoutSeconds);
  }

  #checkOpen() {
    if (this.#error) throw this.#error;
    if (this.#hasEnded) throw new InputError("the input of this stream has ended; open another stream.");
  }

  /** @param {unknown} items */
  #tokensOf(items) {
    const { num_codebooks: count, codebook_size: size } = this.info;
    const isToken = (/** @type {any} */ token) => isCount(token) && token < size;
    const remedy = `push frames of ${count} integers from 0 to ${size - 1} in one array`;
    const tokens = listOf(items, "token", INTEGERS, isToken, remedy);
    if (tokens.length % count) throw new InputError(`there are ${tokens.length} tokens; ${remedy}.`);
    return new Int16Array(tokens);
  }

  /**
   * Validate a message, and store its content.
   *
   * @param {string | ArrayBuffer} data message of the server
   */
  #receive(data) {
    if (this.#isDone || this.#error) return;
    const problem = typeof data === "string" ? this.#receiveText(data) : this.#receiveResult(data);
    if (!problem) return;
    const text = "the server does not follow version 1 of the protocol";
    this.#fail(`${text} (${problem}); update this client or the server.`, "fault");
  }

  /**
   * @param {ArrayBuffer} data
   * @returns {string} what is wrong with the message; empty if it is valid
   */
  #receiveResult(data) {
    if (!this.#isReady) return 'a result before the message of type "ready"';
    const { num_codebooks: count, codebook_size: size } = this.info;
    const isDecoder = this.#kind === "decode";
    const width = isDecoder ? 4 : 2 * count; // bytes of a sample or a frame
    if (!isCount(data.byteLength)) return `a binary message of the type ${typeOf(data)}`;
    if (data.byteLength % width) return `a binary message of ${data.byteLength} bytes, not a multiple of ${width}`;
    const result = isDecoder ? new Float32Array(data) : new Int16Array(data);
    const isValid = isDecoder ? Number.isFinite : (/** @type {number} */ token) => token >= 0 && token < size;
    const wrong = result.find((item) => !isValid(item));
    if (wrong !== undefined) return `a ${isDecoder ? "sample" : "token"} is ${wrong}`;
    const received = this.#numReceived + data.byteLength / width;
    const expected = this.#numExpected;
    if (received > expected) return `${received} ${this.#unit} arrived, but the input gives only ${expected}`;
    this.#numReceived = received;
    if (data.byteLength) this.#timer.stop(); // progress; `#watch` starts it from zero
    this.#results.push(/** @type {Result} */ (result));
    return "";
  }

  /**
   * @param {string} text
   * @returns {string} what is wrong with the message; empty if it is valid
   */
  #receiveText(text) {
    if (text.length > MAX_TEXT) return `a text message of ${text.length} characters, more than ${MAX_TEXT}`;
    const message = parse(text);
    const shapes = MESSAGES[this.#kind];
    if (message === undefined) return "a text message is not JSON";
    const problem = problemOf(message, { type: "text" });
    if (problem) return problem;
    if (!Object.hasOwn(shapes, message.type)) return `a message of the unknown type ${show(message.type)}`;
    const fault = problemOf(message, shapes[message.type]);
    if (fault) return `in the message of type "${message.type}", ${fault}`;
    if (message.type === "error") {
      this.#fail(shorten(message.error, 500), KINDS[message.code] ?? "fault", message.code);
      return "";
    }
    return message.type === "ready" ? this.#receiveReady(message) : this.#receiveDone(message);
  }

  /**
   * @param {StreamInfo} message
   * @returns {string} what is wrong with the message; empty if it is valid
   */
  #receiveReady(message) {
    if (this.#isReady) return 'a second message of type "ready"';
    this.info = message;
    this.#isReady = true;
    if (message.codebook_size > MAX_CODEBOOK) {
      const text = `codebooks of ${message.codebook_size} entries, but this client supports at most ${MAX_CODEBOOK}`;
      this.#fail(`the codec of the server has ${text}; use another client.`, "refused");
    }
    return "";
  }

  /**
   * @param {{num_samples: number, num_frames: number}} message
   * @returns {string} what is wrong with the message; empty if it is valid
   */
  #receiveDone(message) {
    if (!this.#isReady || !this.#hasEnded) return 'the message of type "done" before the end of the input';
    const reported = this.#kind === "decode" ? message.num_samples : message.num_frames;
    const received = `${this.#numReceived} ${this.#unit} arrived`;
    if (reported !== this.#numReceived) return `the last message reports ${reported} ${this.#unit}, but ${received}`;
    // With a lookahead or first lookahead of 0, the server may send the whole last frame before the input ends.
    const trimmed = this.#numSamples ?? this.#numExpected;
    if (reported !== trimmed && reported !== this.#numExpected) return `${received}, not ${trimmed}`;
    this.#isDone = true;
    return "";
  }

  /**
   * @param {string} message
   * @param {ErrorKind} kind
   * @param {number} code
   */
  #fail(message, kind, code = 0) {
    this.#error ??= new ServerError(message, kind, code);
  }
}

/**
 * Check the address of a server.
 *
 * @param {string} url
 * @returns {string} without "/" at the end
 */
function addressOf(url) {
  const shown = show(url).replace(/\/\/.*@/, "//...@");
  let parts;
  try {
    parts = new URL(typeof url === "string" ? url : "");
  } catch {
    parts = null;
  }
  if (!parts || !/^https?:$/.test(parts.protocol) || parts.search || parts.hash) {
    throw new InputError(`${shown} is not the URL of a server; pass a URL such as http://127.0.0.1:8000.`);
  }
  if (parts.username || parts.password) {
    throw new InputError(`${shown} contains a user name or password; remove it, and pass the option token instead.`);
  }
  return parts.href.replace(/\/+$/, "");
}

/**
 * Check the names of options.
 *
 * @param {object} options
 * @param {string[]} names of the valid options
 * @throws {InputError} if there is another option, or the options are not an object
 */
function checkNames(options, names) {
  const listing = names.join(", ");
  if (typeOf(options) !== "Object") {
    throw new InputError(`the options are ${show(options)}; pass an object with ${listing}, or leave it out.`);
  }
  for (const name of Object.keys(options)) {
    if (!names.includes(name)) throw new InputError(`unknown option ${shorten(name)}; use ${listing}.`);
  }
}

/**
 * Check numeric options.
 *
 * @param {Record<string, unknown>} options values by name
 * @param {number} low smallest valid value
 * @param {boolean} isOptional whether null is valid
 * @throws {InputError} if a value is not an integer of at least `low`
 */
function checkCounts(options, low = 0, isOptional = true) {
  for (const [name, value] of Object.entries(options)) {
    if ((isCount(value) && Number(value) >= low) || (isOptional && value === null)) continue;
    const remedy = `pass an integer of at least ${low}${isOptional ? ", or null" : ""}`;
    throw new InputError(`${name} is ${show(value)}; ${remedy}.`);
  }
}

/**
 * @param {string} name
 * @param {any} file
 * @returns {number} size of the content in bytes (of a text, in characters)
 * @throws {InputError} if the value is not the content of a file
 */
function sizeOf(name, file) {
  if (name === "body" && typeof file === "string") return file.length;
  const type = typeOf(file);
  if (["Blob", "File"].includes(type)) return file.size;
  if (["ArrayBuffer", "Uint8Array", "DataView"].includes(type)) return file.byteLength;
  throw new InputError(`the ${name} is of the type ${type}; pass a Blob, an ArrayBuffer or a Uint8Array.`);
}

/** Timer that calls a function once. */
class Timer {
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  #handle;
  #expire;

  /** @param {() => void} expire */
  constructor(expire) {
    this.#expire = expire;
  }

  /** @param {number} seconds from now; an earlier start is forgotten */
  start(seconds) {
    this.stop();
    this.#handle = setTimeout(this.#expire, 1000 * seconds);
  }

  stop() {
    clearTimeout(this.#handle);
    this.#handle = undefined;
  }

  get isRunning() {
    return this.#handle !== undefined;
  }
}

/**
 * Check a list of numbers.
 *
 * @param {any} items
 * @param {string} name of one item
 * @param {string[]} types valid types of the list
 * @param {(item: any) => boolean} isValid
 * @param {string} remedy
 * @returns {ArrayLike<number>} the list
 * @throws {InputError} if the type of the list, or an item, is not valid
 */
function listOf(items, name, types, isValid, remedy) {
  const type = typeOf(items);
  if (!types.includes(type)) throw new InputError(`the ${name}s are of the type ${type}; ${remedy}.`);
  for (let index = 0; index < items.length; index++) {
    if (!isValid(items[index])) throw new InputError(`${name} ${index} is ${show(items[index])}; ${remedy}.`);
  }
  return items;
}

/**
 * Convert samples to float32.
 *
 * @param {unknown} items
 * @returns {Float32Array<ArrayBuffer>} in [-1, 1]
 */
function samplesOf(items) {
  const remedy = "push a Float32Array, a Float64Array or an array of numbers in [-1, 1], or an Int16Array";
  const is16Bit = typeOf(items) === "Int16Array";
  const peak = is16Bit ? 32768 : MAX_PEAK;
  const isSample = (/** @type {any} */ item) => typeof item === "number" && Math.abs(item) <= peak;
  const samples = new Float32Array(listOf(items, "sample", SAMPLES, isSample, remedy));
  return is16Bit ? samples.map((sample) => sample / 32768) : samples;
}

/**
 * Convert frames of tokens to lists.
 *
 * @param {unknown[]} frames
 * @returns {number[][]}
 */
function framesOf(frames) {
  const remedy = "pass frames with one non-negative integer per codebook";
  const lists = Array.from(frames, (frame) => Array.from(listOf(frame, "token", INTEGERS, isCount, remedy)));
  const other = lists.findIndex((list) => list.length !== lists[0].length);
  if (other < 0) return lists;
  const lengths = `frame 0 has ${lists[0].length} tokens, and frame ${other} has ${lists[other].length}`;
  throw new InputError(`${lengths}; ${remedy}.`);
}

/**
 * Find a wrong or missing value in a JSON value of the server.
 *
 * @param {any} values
 * @param {Record<string, string>} shape names of `TYPES` by key; other keys are ignored
 * @returns {string} what is wrong; empty if all values are valid
 */
function problemOf(values, shape) {
  if (typeOf(values) !== "Object") return `${show(values)} is not an object`;
  for (const [key, type] of Object.entries(shape)) {
    const [description, isValid] = TYPES[type];
    if (!Object.hasOwn(values, key)) return `${key} is missing`;
    if (!isValid(values[key])) return `${key} is ${show(values[key])}, not ${description}`;
  }
  return "";
}

/**
 * @param {EncodedFile} encoded
 * @param {ServerInfo} info
 * @returns {string} what is wrong with the tokens; empty if they are valid
 */
function tokensProblem({ tokens, num_samples, sample_rate, samples_per_frame }, info) {
  const { num_codebooks: count, codebook_size: size } = info;
  const isToken = (/** @type {unknown} */ token) => isCount(token) && Number(token) < size;
  if (!tokens.every((frame) => Array.isArray(frame) && frame.length === count && frame.every(isToken))) {
    return `returns tokens that are not frames of ${count} integers from 0 to ${size - 1}`;
  }
  if (sample_rate !== info.sample_rate || samples_per_frame !== info.samples_per_frame) {
    return "returns tokens with another sample rate or frame size than /v1/info reports";
  }
  const isComplete = Math.ceil(num_samples / samples_per_frame) === tokens.length;
  return isComplete ? "" : `returns ${tokens.length} frames for ${num_samples} samples`;
}

/**
 * @param {ArrayBuffer} content
 * @param {AudioFormat} format
 * @param {ServerInfo} info
 * @param {number | null} numFrames number of decoded frames; null if unknown
 * @param {number | null} numSamples length to which the audio was trimmed
 * @returns {string} what is wrong with the audio file; empty if it is valid
 */
function audioProblem(content, format, { sample_rate, samples_per_frame }, numFrames, numSamples) {
  const view = new DataView(content);
  const figures = format === "wav" ? wavFigures(view) : format === "flac" ? flacFigures(view) : opusFigures(view);
  const name = format === "opus" ? "Ogg Opus" : format.toUpperCase();
  if (!figures) return `data that is not a complete ${name} file`;
  if (figures.channels !== 1) return `a ${name} file with ${figures.channels} channels, not 1`;
  if (format === "opus") return "";
  const longest = numFrames === null ? figures.length : numFrames * samples_per_frame;
  const expected = Math.min(numSamples ?? longest, longest);
  if (figures.rate === sample_rate && figures.length === expected) return "";
  return `${figures.length} samples at ${figures.rate} Hz, not ${expected} at ${sample_rate} Hz`;
}

/**
 * @typedef {{channels: number, rate: number, length: number}} Figures sample rate in Hz, and number of samples
 */

/**
 * @param {DataView} view of a WAV file
 * @returns {Figures | null} null for an incomplete or invalid file
 */
function wavFigures(view) {
  if (textAt(view, 0) !== "RIFF" || textAt(view, 8) !== "WAVE") return null;
  let rate = 0;
  let channels = 0;
  let width = 0; // bytes of one sample of all channels; 0 while there is no valid format
  for (let at = 12; at + 8 <= view.byteLength; ) {
    const size = view.getUint32(at + 4, true);
    const isComplete = at + 8 + size <= view.byteLength;
    if (textAt(view, at) === "data") return width && isComplete ? { channels, rate, length: size / width } : null;
    if (textAt(view, at) === "fmt " && size >= 16 && at + 24 <= view.byteLength) {
      const isPlain = WAV_TAGS.includes(view.getUint16(at + 8, true));
      channels = view.getUint16(at + 10, true);
      rate = view.getUint32(at + 12, true);
      width = view.getUint16(at + 20, true);
      if (!isPlain || 8 * width !== channels * view.getUint16(at + 22, true)) width = 0;
    }
    at += 8 + size + (size % 2);
  }
  return null;
}

/**
 * @param {DataView} view of a FLAC file
 * @returns {Figures | null} null for other data
 */
function flacFigures(view) {
  if (textAt(view, 0) !== "fLaC" || view.byteLength < 42) return null;
  // 20 bits of the sample rate, 3 of the channels, 5 of the sample size, 36 of the length
  const rate = view.getUint32(18) >>> 12;
  const channels = ((view.getUint8(20) >> 1) % 8) + 1;
  return { channels, rate, length: (view.getUint8(21) % 16) * 2 ** 32 + view.getUint32(22) };
}

/**
 * Read the header of an Ogg Opus file. The last page of a complete file has the end-of-stream flag.
 *
 * @param {DataView} view
 * @returns {Figures | null} null for an incomplete file; `rate` and `length` are unknown and 0
 */
function opusFigures(view) {
  let at = 0;
  let isLast = false;
  while (textAt(view, at) === "OggS" && at + 27 <= view.byteLength) {
    isLast = Boolean(view.getUint8(at + 5) & 4);
    const count = view.getUint8(at + 26);
    const start = at + 27;
    at = start + count;
    for (let index = 0; index < count && start + index < view.byteLength; index++) at += view.getUint8(start + index);
  }
  const isComplete = isLast && at === view.byteLength && textAt(view, 28) + textAt(view, 32) === "OpusHead";
  return isComplete && at >= 38 ? { channels: view.getUint8(37), rate: 0, length: 0 } : null;
}

/**
 * @param {DataView} view
 * @param {number} at
 * @returns {string} four characters; empty beyond the end
 */
function textAt(view, at) {
  if (at + 4 > view.byteLength) return "";
  return String.fromCharCode(...[0, 1, 2, 3].map((index) => view.getUint8(at + index)));
}

/**
 * @param {string} text
 * @returns {any} the JSON value; undefined if the text is not JSON
 */
function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/**
 * @param {unknown} value
 * @returns {string} such as "Array", "Int16Array", "Object" or "Undefined"
 */
function typeOf(value) {
  return Object.prototype.toString.call(value).slice(8, -1);
}

/**
 * @param {unknown} value
 * @returns {string} short text for an error message
 */
function show(value) {
  try {
    const isPlain = typeof value === "string" || (typeof value === "object" && value !== null);
    return shorten(isPlain ? JSON.stringify(value) : String(value));
  } catch {
    return typeOf(value);
  }
}

/**
 * @param {string} text that cannot be trusted
 * @param {number} length
 * @returns {string} one line
 */
function shorten(text, length = 80) {
  const line = String(text).replace(/[\p{C}\s]+/gu, " ").trim();
  return line.length > length ? `${line.slice(0, length)}...` : line;
}
