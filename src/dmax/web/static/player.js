/** The timeline: play, pause, step, and go to a moment. It knows no run, only how many moments. */

import { element, setText, svg } from "dmax/dom.js";

const SPEEDS = [0.5, 1, 2, 5, 10, 25]; // forwards per second
const USUAL_SPEED = 2;
const FIELDS = "input, select, textarea, [contenteditable]"; // keys mean something else in these
const PRESSED = "button, a, summary"; // the space bar presses these
// Drawn, since few fonts have signs for them; in a square of 16.
const ICONS = {
  first: "M3 3h2v10H3z M13 3v10L6 8z",
  back: "M11 3v10L4 8z",
  play: "M4 2.5v11L13.5 8z",
  pause: "M4 3h3v10H4z M9 3h3v10H9z",
  forth: "M5 3v10l7-5z",
  last: "M11 3h2v10h-2z M3 3v10l7-5z",
};

/**
 * A bar of controls over moments 0 to the last one.
 *
 * Keys: Space plays and pauses, arrows step, Home and End go to the first and the last moment.
 */
export class Player {
  #onMove;
  #first;
  #back;
  #play;
  #forth;
  #last;
  #slider;
  #where;
  #speed;
  #length = 1;
  #isGrowing = false;
  #isHeld = false; // paused by hand: new moments are not followed
  #timer = null;

  /**
   * @param {HTMLElement} container
   * @param {{onMove?: (moment: number) => void, label?: string}} options
   */
  constructor(container, { onMove = () => {}, label = "timeline" } = {}) {
    this.moment = 0;
    this.#onMove = onMove;
    this.#first = button("first", "First moment (Home)", () => this.#stepTo(0));
    this.#back = button("back", "One forward back (←)", () => this.#stepTo(this.moment - 1));
    this.#play = button("play", "Play", () => this.toggle());
    this.#forth = button("forth", "One forward on (→)", () => this.#stepTo(this.moment + 1));
    this.#last = button("last", "Last moment (End)", () => this.#stepTo(this.#length - 1));
    this.#play.classList.add("primary");
    this.#slider = element("input", { type: "range", min: 0, max: 0, "aria-label": "moment" });
    this.#slider.addEventListener("input", () => this.#stepTo(Number(this.#slider.value)));
    this.#where = element("output", { class: "quiet where", "aria-live": "off" });
    this.#speed = element("select", { "aria-label": "speed, forwards per second" }, ...speeds());
    container.classList.add("toolbar");
    container.setAttribute("role", "toolbar");
    container.setAttribute("aria-label", label);
    container.append(
      this.#first, this.#back, this.#play, this.#forth, this.#last,
      this.#slider, this.#where, this.#speed,
    );
    this.#draw();
  }

  get isPlaying() {
    return this.#timer !== null;
  }

  /**
   * How many moments there are. A player that stands at the last one goes along with new ones,
   * unless it was paused there by hand.
   *
   * @param {number} numMoments
   * @param {{isGrowing?: boolean}} options  isGrowing: more will come, so playing waits for them
   */
  setLength(numMoments, { isGrowing = false } = {}) {
    const isAtEnd = this.moment === this.#length - 1;
    this.#length = Math.max(numMoments, 1);
    this.#isGrowing = isGrowing;
    if (this.moment >= this.#length || (isAtEnd && !this.isPlaying && !this.#isHeld)) {
      this.moveTo(this.#length - 1);
    } else {
      this.#draw();
    }
  }

  /** Show a moment, the nearest there is. */
  moveTo(moment) {
    this.#isHeld = false;
    this.moment = Math.max(0, Math.min(moment, this.#length - 1));
    this.#draw();
    this.#onMove(this.moment);
  }

  /** Move on by itself; from the start if it stands at the end. */
  play() {
    if (this.isPlaying) return;
    if (this.moment === this.#length - 1) this.moveTo(0);
    this.#schedule();
    this.#draw();
  }

  /** Stop moving on. */
  pause() {
    clearTimeout(this.#timer);
    this.#timer = null;
    this.#draw();
  }

  /** Play, or pause. */
  toggle() {
    this.#isHeld = this.isPlaying;
    if (this.isPlaying) this.pause();
    else this.play();
  }

  /** Heed the keys of a whole page, except where they mean something else. */
  listen(target) {
    target.addEventListener("keydown", (event) => {
      const hasModifier = event.ctrlKey || event.altKey || event.metaKey;
      const taken = event.key === " " ? `${FIELDS}, ${PRESSED}` : FIELDS;
      if (event.defaultPrevented || hasModifier || event.target.closest?.(taken)) return;
      if (this.#heed(event.key)) event.preventDefault();
    });
  }

  #heed(key) {
    switch (key) {
      case " ":
        this.toggle();
        return true;
      case "ArrowRight":
        this.#stepTo(this.moment + 1);
        return true;
      case "ArrowLeft":
        this.#stepTo(this.moment - 1);
        return true;
      case "Home":
        this.#stepTo(0);
        return true;
      case "End":
        this.#stepTo(this.#length - 1);
        return true;
      default:
        return false;
    }
  }

  /** Go somewhere by hand, which ends playing. */
  #stepTo(moment) {
    this.pause();
    this.moveTo(moment);
  }

  #schedule() {
    this.#timer = setTimeout(() => {
      if (this.moment < this.#length - 1) this.moveTo(this.moment + 1);
      const isOver = this.moment === this.#length - 1 && !this.#isGrowing;
      if (isOver) this.pause();
      else if (this.isPlaying) this.#schedule();
    }, 1000 / Number(this.#speed.value));
  }

  #draw() {
    const last = this.#length - 1;
    this.#slider.max = String(last);
    this.#slider.value = String(this.moment);
    this.#slider.setAttribute("aria-valuetext", `forward ${this.moment} of ${last}`);
    setText(this.#where, `forward ${this.moment} of ${last}`);
    this.#play.replaceChildren(icon(this.isPlaying ? "pause" : "play"));
    name(this.#play, this.isPlaying ? "Pause (Space)" : "Play (Space)");
    for (const [control, isOff] of [
      [this.#first, this.moment === 0],
      [this.#back, this.moment === 0],
      [this.#forth, this.moment === last],
      [this.#last, this.moment === last],
    ]) {
      // Not `disabled`, which would drop the focus of whoever steps to the end by keyboard.
      control.setAttribute("aria-disabled", String(isOff));
    }
  }
}

function button(kind, label, onPress) {
  const made = element("button", { class: "button", type: "button" }, icon(kind));
  name(made, label);
  made.addEventListener("click", onPress);
  return made;
}

function name(control, label) {
  control.setAttribute("aria-label", label);
  control.title = label;
}

function icon(kind) {
  const path = svg("path", { d: ICONS[kind], fill: "currentColor" });
  return svg("svg", { viewBox: "0 0 16 16", width: 16, height: 16, "aria-hidden": "true" }, path);
}

function speeds() {
  return SPEEDS.map((speed) =>
    element("option", { value: speed, selected: speed === USUAL_SPEED }, `${speed} / s`),
  );
}
