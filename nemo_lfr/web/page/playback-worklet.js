/**
 * Audio worklet that plays the samples that are posted to it, and posts the number of samples that it has played.
 *
 * After a gap, the worklet waits until `hold` samples have arrived, so that audio that arrives unevenly does not stutter.
 * If more than `limit` samples wait, for example after a pause of the server, the worklet skips the oldest ones to reduce
 * the delay again.
 */

class Playback extends AudioWorkletProcessor {
  /** @param {{processorOptions: {hold: number, limit: number}}} options */
  constructor(options) {
    super();
    this.hold = options.processorOptions.hold;
    this.limit = options.processorOptions.limit;
    /** @type {Float32Array[]} */
    this.queue = [];
    this.queued = 0;
    this.offset = 0; // position in the first array of the queue
    this.played = 0;
    this.isPlaying = false;
    this.port.onmessage = ({ data }) => {
      this.queue.push(data);
      this.queued += data.length;
      if (this.queued > this.limit) this.take(this.queued - this.hold, null);
    };
  }

  /**
   * Take samples out of the queue.
   *
   * @param {number} count
   * @param {Float32Array | null} out receives them; null to skip them
   * @returns {number} number of samples that were taken
   */
  take(count, out) {
    let taken = 0;
    while (taken < count && this.queue.length) {
      const piece = this.queue[0].subarray(this.offset, this.offset + count - taken);
      out?.set(piece, taken);
      taken += piece.length;
      this.offset += piece.length;
      if (this.offset === this.queue[0].length) {
        this.queue.shift();
        this.offset = 0;
      }
    }
    this.queued -= taken;
    this.played += taken;
    return taken;
  }

  /**
   * @param {Float32Array[][]} _
   * @param {Float32Array[][]} outputs
   * @returns {boolean}
   */
  process(_, outputs) {
    const out = outputs[0][0];
    if (this.queued >= this.hold) this.isPlaying = true;
    const filled = this.isPlaying ? this.take(out.length, out) : 0;
    if (filled < out.length) this.isPlaying = false;
    if (filled) this.port.postMessage(this.played);
    return true;
  }
}

registerProcessor("playback", Playback);
