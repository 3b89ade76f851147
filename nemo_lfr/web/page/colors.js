/** Color ramps of the pictures. They come from the style sheet, so that they follow the color scheme. */

const NUM_COLORS = 256;

/**
 * Return a ramp that is interpolated between the colors of a custom property, such as "#fff, #088, #013".
 *
 * @param {string} property
 * @returns {Uint32Array} pixels of canvas image data
 */
export function ramp(property) {
  const stops = getComputedStyle(document.documentElement)
    .getPropertyValue(property)
    .split(",")
    .map((stop) => [1, 3, 5].map((at) => parseInt(stop.trim().slice(at, at + 2), 16)));
  return new Uint32Array(NUM_COLORS).map((_, index) => {
    const position = (index / (NUM_COLORS - 1)) * (stops.length - 1);
    const low = Math.min(Math.floor(position), stops.length - 2);
    const [red, green, blue] = [0, 1, 2].map((part) =>
      Math.round(stops[low][part] + (stops[low + 1][part] - stops[low][part]) * (position - low)),
    );
    return (255 << 24) | (blue << 16) | (green << 8) | red;
  });
}

/**
 * Return the color of a value.
 *
 * @param {Uint32Array} colors
 * @param {number} value in [0, 1]; other values are clipped
 * @returns {number}
 */
export function colorOf(colors, value) {
  return colors[Math.max(0, Math.min(colors.length - 1, Math.round(value * (colors.length - 1))))];
}

/**
 * Call a function when the user's color scheme changes.
 *
 * @param {() => void} redraw
 */
export function onSchemeChange(redraw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}
