/** Small helpers for elements and texts. */

/**
 * Return an element of the page.
 *
 * @template {HTMLElement} T
 * @param {string} id
 * @param {new () => T} [kind] its class
 * @returns {T}
 */
export function byId(id, kind) {
  const found = document.getElementById(id);
  if (!(found instanceof (kind ?? HTMLElement))) throw new Error(`no element ${id}`);
  return /** @type {T} */ (found);
}

/**
 * Return the canvas of a card.
 *
 * @param {string} id
 * @returns {HTMLCanvasElement}
 */
export function canvasOf(id) {
  const canvas = byId(id).querySelector("canvas");
  if (!canvas) throw new Error(`no canvas in ${id}`);
  return canvas;
}

/**
 * Show a text, or hide its element.
 *
 * @param {string} id
 * @param {string} text
 */
export function setText(id, text) {
  byId(id).textContent = text;
}

/**
 * @param {number} bytes
 * @returns {string} such as "1.2 kB"
 */
export function size(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  return bytes < 1e6 ? `${(bytes / 1000).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

/**
 * @param {number} bitsPerSecond
 * @returns {string} such as "1.89 kbit/s"
 */
export function rate(bitsPerSecond) {
  return `${(bitsPerSecond / 1000).toFixed(bitsPerSecond < 1e5 ? 2 : 0)} kbit/s`;
}
