/** Player of one version of a recording: play button, position, and a playhead on its picture. */

const PLAY = "M8 5.5v13l11-6.5z";
const PAUSE = "M7 5h3.5v14H7zM13.5 5H17v14h-3.5z";

/** Player in a `.version` card. */
export class Player {
  /**
   * @param {HTMLElement} card
   * @param {string} name of the version, such as "original"
   */
  constructor(card, name) {
    this.card = card;
    this.name = name;
    this.audio = new Audio();
    this.button = document.createElement("button");
    this.button.className = "play";
    this.position = Object.assign(document.createElement("input"), { type: "range", min: "0", max: "1", step: "0.01", value: "0" });
    this.position.setAttribute("aria-label", `Position in the ${name} version`);
    this.time = document.createElement("span");
    this.time.className = "time";
    /** @type {(player: Player) => void} called when playing starts */
    this.onPlay = () => {};
    /** @type {(part: number) => void} called with the position in [0, 1] */
    this.onMove = () => {};
    card.querySelector(".player")?.append(this.audio, this.button, this.position, this.time);
    this.listen();
    this.showState();
  }

  /**
   * Load audio.
   *
   * @param {Blob} blob
   * @param {number} duration seconds
   */
  load(blob, duration) {
    if (this.audio.src) URL.revokeObjectURL(this.audio.src);
    this.audio.src = URL.createObjectURL(blob);
    this.duration = duration;
    this.position.max = String(duration);
    this.show(0);
  }

  /**
   * Play from a position.
   *
   * @param {number} [seconds] default: the current position
   */
  async play(seconds) {
    if (seconds !== undefined) this.audio.currentTime = seconds;
    try {
      await this.audio.play();
    } catch {
      // paused or replaced before it started
    }
  }

  /** Add the listeners. */
  listen() {
    this.button.addEventListener("click", () => (this.audio.paused ? this.play() : this.audio.pause()));
    this.position.addEventListener("input", () => {
      this.audio.currentTime = Number(this.position.value);
      this.show(Number(this.position.value));
    });
    for (const event of ["play", "pause", "ended"]) this.audio.addEventListener(event, () => this.showState());
    this.audio.addEventListener("play", () => {
      this.onPlay(this);
      this.follow();
    });
    this.card.querySelector(".picture")?.addEventListener("click", (event) => {
      const { left, width } = /** @type {HTMLElement} */ (event.currentTarget).getBoundingClientRect();
      this.play(((/** @type {MouseEvent} */ (event).clientX - left) / width) * this.duration);
    });
  }

  duration = 0;

  /** Show the position while the audio plays. */
  follow() {
    this.show(this.audio.currentTime);
    if (!this.audio.paused) requestAnimationFrame(() => this.follow());
  }

  /** Show whether the audio plays. */
  showState() {
    const isPaused = this.audio.paused || this.audio.ended;
    this.button.setAttribute("aria-label", `${isPaused ? "Play" : "Pause"} the ${this.name} version`);
    this.button.innerHTML = `<svg viewBox="0 0 24 24" aria-hidden="true"><path d="${isPaused ? PLAY : PAUSE}"/></svg>`;
    this.card.classList.toggle("playing", !isPaused);
  }

  /**
   * Show a position.
   *
   * @param {number} seconds
   */
  show(seconds) {
    const part = this.duration ? Math.min(1, seconds / this.duration) : 0;
    this.position.value = String(seconds);
    this.position.style.setProperty("--part", `${100 * part}%`);
    this.position.setAttribute("aria-valuetext", `${seconds.toFixed(1)} of ${this.duration.toFixed(1)} seconds`);
    this.time.textContent = `${clock(seconds)} / ${clock(this.duration)}`;
    showPart(this.card, part);
    this.onMove(part);
  }
}

/**
 * Move the playhead of a card.
 *
 * @param {HTMLElement} card
 * @param {number} part position as a fraction of the duration, in [0, 1]
 */
export function showPart(card, part) {
  card.style.setProperty("--part", `${100 * part}%`);
  card.classList.toggle("moved", part > 0);
}

/**
 * @param {number} seconds
 * @returns {string} such as "1:05.3"
 */
function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  return `${Math.floor(tenths / 600)}:${((tenths % 600) / 10).toFixed(1).padStart(4, "0")}`;
}
