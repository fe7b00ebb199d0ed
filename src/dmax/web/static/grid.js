/**
 * A whole answer at a glance: position × forward, colour = confidence, a dot where a token changed.
 *
 * Positions run to the right and forwards down. What does not fit in the width goes on in the next
 * band, as lines of a text do. A band shows the forwards in which one of its positions was open, so
 * a long answer stays readable on a narrow screen.
 */

import { element, onResize, setText } from "dmax/dom.js";
import { cellAt, layOut, placeOf } from "dmax/grid-layout.js";
import { paintCells, paintMarks } from "dmax/grid-paint.js";
import { counted, percent } from "dmax/numbers.js";
import { EVENTS } from "dmax/text-view.js";
import { onThemeChange } from "dmax/theme.js";

const MOST_REVISIONS = 200; // in words
const MOVES = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };

/** The grid of a run. Arrow keys move over its cells; Enter or a press goes to that forward. */
export class Grid {
  #onPick;
  #cells;
  #marks;
  #readout;
  #words;
  #run = null;
  #numFrames = -1;
  #moment = 0;
  #layout = null;
  #cell = null; // {position, moment} that the readout tells of

  /**
   * @param {HTMLElement} container
   * @param {{onPick?: (position: number, moment: number) => void}} options
   */
  constructor(container, { onPick = () => {} } = {}) {
    this.#onPick = onPick;
    this.#cells = element("canvas", { role: "img", tabindex: 0 });
    this.#marks = element("canvas", { "aria-hidden": "true" });
    this.#readout = element("output", { class: "readout quiet", "aria-live": "polite" });
    this.#words = element("details", {}, element("summary"), element("ul"));
    const stage = element("div", { class: "grid-canvas" }, this.#cells, this.#marks);
    const figure = element("figure", {}, stage, legend(), this.#readout, this.#words);
    container.append(figure);
    this.#listen();
    onResize(stage, () => this.#redraw());
    onThemeChange(() => this.#redraw());
  }

  /** Show the grid of a whole run, and where in it a moment is. */
  show(run, moment) {
    const isSame = this.#run === run && this.#numFrames === run.frames.length;
    this.#run = run;
    this.#moment = moment;
    if (isSame) this.#drawMarks();
    else this.#redraw();
  }

  #redraw() {
    const width = Math.floor(this.#cells.parentElement.clientWidth);
    if (this.#run === null || width === 0) return;
    this.#numFrames = this.#run.frames.length;
    this.#layout = layOut(this.#run, width);
    paintCells(this.#cells, this.#run, this.#layout);
    this.#drawMarks();
    this.#tell();
  }

  #drawMarks() {
    if (this.#layout === null) return;
    const place = this.#cell && placeOf(this.#layout, this.#cell);
    paintMarks(this.#marks, this.#layout, this.#moment, place);
  }

  #tell() {
    const revisions = revisionsOf(this.#run);
    const { numMoments, numPositions } = this.#run;
    const size = `${counted(numPositions, "position")} over ${counted(numMoments - 1, "forward")}`;
    const number = counted(revisions.length, "revision");
    const label = `Grid of ${size}. ${number}, listed below in words.`;
    this.#cells.setAttribute("aria-label", `${label} Arrow keys read cells, Enter goes there.`);
    const lines = revisions
      .slice(0, MOST_REVISIONS)
      .map((revision) => element("li", {}, inWords(this.#run, revision)));
    const numLeft = revisions.length - lines.length;
    if (numLeft > 0) lines.push(element("li", {}, `and ${counted(numLeft, "more revision")}`));
    this.#words.hidden = revisions.length === 0;
    setText(this.#words.querySelector("summary"), `${number} in words`);
    this.#words.querySelector("ul").replaceChildren(...lines);
  }

  #listen() {
    this.#cells.addEventListener("pointermove", (event) => this.#read(this.#cellAt(event)));
    this.#cells.addEventListener("pointerleave", () => this.#read(null));
    this.#cells.addEventListener("blur", () => this.#read(null));
    this.#cells.addEventListener("click", (event) => this.#pick(this.#cellAt(event)));
    this.#cells.addEventListener("keydown", (event) => {
      if (!MOVES[event.key] && event.key !== "Enter") return;
      event.preventDefault();
      if (event.key === "Enter") this.#pick(this.#cell);
      else this.#step(...MOVES[event.key]);
    });
  }

  #step(right, down) {
    const last = { position: this.#run.numPositions - 1, moment: this.#run.numMoments - 1 };
    if (last.moment === 0) return; // there is nothing to read yet
    if (this.#cell === null) {
      this.#read({ position: 0, moment: 1 });
      return;
    }
    const now = this.#cell;
    this.#read({
      position: Math.max(0, Math.min(now.position + right, last.position)),
      moment: Math.max(1, Math.min(now.moment + down, last.moment)),
    });
  }

  #pick(cell) {
    if (cell) this.#onPick(cell.position, cell.moment);
  }

  #cellAt({ offsetX: x, offsetY: y }) {
    return this.#layout === null ? null : cellAt(this.#layout, x, y);
  }

  #read(cell) {
    this.#cell = cell;
    setText(this.#readout, cell ? this.#inWords(cell) : "");
    this.#drawMarks();
  }

  #inWords({ position, moment }) {
    const forward = this.#run.forwardsAt(moment);
    const where = `Position ${position}, forward ${forward}:`;
    const entry = this.#run.history(position, moment).at(-1);
    if (!entry) return `${where} not open yet`;
    if (entry.forward < forward) return `${where} “${nameOf(entry)}”, settled`;
    const token = entry.id === null ? "" : `“${nameOf(entry)}” `;
    return `${where} ${token}${EVENTS[entry.event]}, ${percent(entry.confidence)} sure`;
  }
}

/** Every revision, in the order of the forwards. */
function revisionsOf(run) {
  const found = [];
  for (const { frame, events, moment } of run.steps()) {
    events.forEach((event, at) => {
      if (event === "revised") found.push({ position: frame.position + at, moment });
    });
  }
  return found.sort((one, other) => one.moment - other.moment);
}

function inWords(run, { position, moment }) {
  const [before, now] = run.history(position, moment).slice(-2);
  const what = `“${nameOf(before)}” became “${nameOf(now)}”`;
  return `position ${position}, forward ${now.forward}: ${what}`;
}

function legend() {
  const key = (kind, label) => element("span", {}, element("i", { class: kind }), label);
  return element(
    "figcaption",
    { class: "legend" },
    element("span", {}, "positions →, forwards ↓"),
    key("ramp", "confidence of a token, 0 to 1"),
    key("ramp masked", "of a guess under a mask"),
    key("dot", "the token changed"),
  );
}

function nameOf({ text, id }) {
  return text === "" ? String(id) : text.replaceAll("\n", "↵");
}
