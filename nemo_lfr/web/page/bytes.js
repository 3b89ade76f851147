/** CRC-32 and packed frames, as `.lfr` files use them. */

const TABLE = new Uint32Array(256).map((_, byte) => {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0xedb88320 : crc >>> 1;
  return crc;
});

/**
 * Return zlib's CRC-32.
 *
 * @param {Uint8Array} data
 * @param {number} crc CRC of the preceding bytes
 * @returns {number}
 */
export function crc32(data, crc = 0) {
  crc = ~crc;
  for (const byte of data) crc = TABLE[(crc ^ byte) & 255] ^ (crc >>> 8);
  return ~crc >>> 0;
}

/**
 * Return the size of a packed frame in bytes.
 *
 * @param {number} codebookSize
 * @param {number} numCodebooks
 * @returns {number}
 */
export function bytesPerFrame(codebookSize, numCodebooks) {
  const last = BigInt(codebookSize) ** BigInt(numCodebooks) - 1n;
  return Math.ceil(last.toString(2).length / 8);
}

/**
 * Pack tokens.
 *
 * Each frame becomes one number, whose digits in base `codebookSize` are the tokens of the frame. The token of the
 * first codebook is the least significant digit. The number is stored in little-endian order.
 *
 * @param {Int32Array} tokens frame by frame
 * @param {number} codebookSize
 * @param {number} numCodebooks
 * @returns {Uint8Array}
 */
export function pack(tokens, codebookSize, numCodebooks) {
  const width = bytesPerFrame(codebookSize, numCodebooks);
  const numFrames = tokens.length / numCodebooks;
  const packed = new Uint8Array(numFrames * width);
  for (let frame = 0; frame < numFrames; frame++) {
    let value = 0n;
    for (let codebook = numCodebooks - 1; codebook >= 0; codebook--) {
      value = value * BigInt(codebookSize) + BigInt(tokens[frame * numCodebooks + codebook]);
    }
    for (let byte = 0; byte < width; byte++, value >>= 8n) packed[frame * width + byte] = Number(value & 255n);
  }
  return packed;
}

/**
 * Unpack the bytes that `pack` returns.
 *
 * @param {Uint8Array} packed whole frames
 * @param {number} codebookSize
 * @param {number} numCodebooks
 * @returns {Int32Array | null} tokens frame by frame; null if a frame is out of range
 */
export function unpack(packed, codebookSize, numCodebooks) {
  const width = bytesPerFrame(codebookSize, numCodebooks);
  const numFrames = packed.length / width;
  const tokens = new Int32Array(numFrames * numCodebooks);
  const size = BigInt(codebookSize);
  for (let frame = 0; frame < numFrames; frame++) {
    let value = 0n;
    for (let byte = width - 1; byte >= 0; byte--) value = (value << 8n) | BigInt(packed[frame * width + byte]);
    for (let codebook = 0; codebook < numCodebooks; codebook++, value /= size) {
      tokens[frame * numCodebooks + codebook] = Number(value % size);
    }
    if (value) return null;
  }
  return tokens;
}
