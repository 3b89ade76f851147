/** Worker that runs the ONNX files of the codec with onnxruntime-web, from the folder `ort` of the site. */

const RUNTIME = new URL("./ort/", import.meta.url);

let folder = "";
/** @type {Record<string, string>} */
let hashes = {};
/** @type {Record<string, Promise<any>>} sessions by network */
const sessions = {};
/** @type {Promise<any> | undefined} */
let runtime;

addEventListener("message", async ({ data }) => {
  if (data.folder) {
    ({ folder, hashes } = data);
    return;
  }
  try {
    postMessage({ output: await run(data.network, data.inputs) });
  } catch (error) {
    postMessage({ error: error instanceof Error ? error.message : String(error) });
  }
});

/**
 * @param {"encoder" | "decoder"} network
 * @param {any} inputs
 * @returns {Promise<Int32Array | Float32Array>}
 */
async function run(network, inputs) {
  runtime ??= load();
  const ort = await runtime;
  sessions[network] ??= open(ort, network);
  sessions[network].catch(() => delete sessions[network]); // try again next time
  const session = await sessions[network];
  const feeds =
    network === "encoder"
      ? { audio: new ort.Tensor("float32", inputs.audio, inputs.dims) }
      : { tokens: new ort.Tensor("int64", inputs.tokens, inputs.dims), tokens_len: new ort.Tensor("int64", inputs.lengths, [1]) };
  const results = await session.run(feeds);
  return results[session.outputNames[0]].data;
}

/** @returns {Promise<any>} the module of ONNX Runtime */
async function load() {
  const ort = await import(new URL("ort.wasm.min.mjs", RUNTIME).href);
  ort.env.wasm.wasmPaths = RUNTIME.href;
  // Threads need headers that most static hosts do not send.
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(8, navigator.hardwareConcurrency) : 1;
  ort.env.logLevel = "error";
  return ort;
}

/**
 * @param {any} ort
 * @param {string} network
 * @returns {Promise<any>}
 */
async function open(ort, network) {
  const file = `${network}.onnx`;
  const response = await fetch(new URL(file, folder)).catch(() => null);
  if (!response?.ok) throw new Error(`${file} could not be loaded from this site.`);
  const data = await response.arrayBuffer();
  // `crypto.subtle` exists only on pages that were loaded over HTTPS or from this computer.
  if (globalThis.crypto?.subtle) {
    const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
    const text = [...hash].map((byte) => byte.toString(16).padStart(2, "0")).join("");
    if (text !== hashes[file]) throw new Error(`${file} of this site is damaged.`);
  }
  return ort.InferenceSession.create(new Uint8Array(data), { executionProviders: ["wasm"], enableMemPattern: false });
}
