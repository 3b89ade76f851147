/**
 * Audio worklet that plays the samples that are posted to it, and posts the number of samples that it has played.
 *
 * After a gap, it waits for `hold` samples, so that results of uneven pace play evenly.
 */

class Playback extends AudioWorkletProcessor {
  /** @param {{processorOptions: {hold: number}}} options */
  constructor(options) {
    super();
    this.hold = options.processorOptions.hold;
    /** @type {Float32Array[]} */
    this.queue = [];
    this.queued = 0;
    this.offset = 0; // in the first array of the queue
    this.played = 0;
    this.isPlaying = false;
    this.port.onmessage = ({ data }) => {
      this.queue.push(data);
      this.queued += data.length;
    };
  }

  /**
   * @param {Float32Array[][]} _
   * @param {Float32Array[][]} outputs
   * @returns {boolean}
   */
  process(_, outputs) {
    const out = outputs[0][0];
    if (!this.isPlaying && this.queued >= this.hold) this.isPlaying = true;
    let filled = 0;
    while (this.isPlaying && filled < out.length) {
      if (!this.queue.length) {
        this.isPlaying = false;
        break;
      }
      const piece = this.queue[0].subarray(this.offset, this.offset + out.length - filled);
      out.set(piece, filled);
      filled += piece.length;
      this.offset += piece.length;
      if (this.offset === this.queue[0].length) {
        this.queue.shift();
        this.offset = 0;
      }
    }
    this.queued -= filled;
    this.played += filled;
    if (filled) this.port.postMessage(this.played);
    return true;
  }
}

registerProcessor("playback", Playback);
