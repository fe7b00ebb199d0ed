/**
 * A whole answer at a glance: position × forward, colour = confidence, a dot where a token changed.
 *
 * Positions run to the right and forwards down. What does not fit in the width goes on in the next
 * band, as lines of a text do. A band shows the forwards in which one of its positions was open, so
 * a long answer stays readable on a narrow screen.
 */

import { counted, element, onResize, percent, setText } from "dmax/dom.js";
import { onThemeChange, palette } from "dmax/theme.js";
import { niceStep } from "dmax/curve.js";

const LEFT = 36; // px for the numbers of forwards
const TOP = 16; // px above each band for the numbers of positions
const GAP = 8; // px below each band
const SMALLEST_CELLS = [7, 5, 4, 3, 2]; // px of a position: the first that makes no grid too tall
const LARGEST_CELL = 16;
const LOWEST_CELL = 2; // px of a forward
const TALLEST = 1800; // px of all cells together, where that can be
const FONT = "11px system-ui, sans-serif";
const MOST_REVISIONS = 200; // in words
const EVENTS = {
  promoted: "written",
  revised: "revised",
  kept: "kept",
  remasked: "masked again",
  waiting: "masked",
};
const MOVES = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };

/** The grid of a run. Arrow keys move over its cells; Enter or a press goes to that forward. */
export class Grid {
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

  #onPick;
  #cells;
  #marks;
  #readout;
  #words;

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
    this.#drawCells();
    this.#drawMarks();
    this.#tell();
  }

  #drawCells() {
    const { bands } = this.#layout;
    const context = sized(this.#cells, this.#layout);
    const names = ["paper", "accent", "control", "line", "quiet", "revised"];
    const colours = palette(this.#cells.parentElement, names);
    for (const band of bands) {
      drawBand(context, band, this.#layout, this.#run, colours);
      drawDots(context, band, this.#layout, this.#run, colours);
    }
  }

  /** The forward that is shown, and the cell that the readout tells of. */
  #drawMarks() {
    if (this.#layout === null) return;
    const context = sized(this.#marks, this.#layout);
    const { focus } = palette(this.#cells.parentElement, ["focus"]);
    const { cellWidth, cellHeight } = this.#layout;
    context.strokeStyle = rgb(focus);
    context.lineWidth = 2;
    for (const band of this.#layout.bands) {
      const row = band.moments.indexOf(this.#moment);
      if (row < 0) continue;
      const width = (band.last - band.first + 1) * cellWidth;
      context.strokeRect(LEFT - 1, band.top + row * cellHeight - 1, width + 2, cellHeight + 2);
    }
    const place = this.#cell && placeOf(this.#layout, this.#cell);
    if (place) context.strokeRect(place.x - 1, place.y - 1, cellWidth + 2, cellHeight + 2);
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
    const now = this.#cell ?? { position: 0, moment: 1 };
    if (this.#cell === null) {
      this.#read(now);
      return;
    }
    const last = { position: this.#run.numPositions - 1, moment: this.#run.numMoments - 1 };
    this.#read({
      position: Math.max(0, Math.min(now.position + right, last.position)),
      moment: Math.max(1, Math.min(now.moment + down, last.moment)),
    });
  }

  #pick(cell) {
    if (cell) this.#onPick(cell.position, cell.moment);
  }

  #cellAt({ offsetX: x, offsetY: y }) {
    if (this.#layout === null) return null;
    const { bands, cellWidth, cellHeight } = this.#layout;
    const band = bands.find(({ top, height }) => top <= y && y < top + height);
    const position = band && band.first + Math.floor((x - LEFT) / cellWidth);
    if (!band || position < band.first || position > band.last) return null;
    return { position, moment: band.moments[Math.floor((y - band.top) / cellHeight)] };
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

/** Which positions stand in which band, and how large a cell is. */
function layOut(run, width) {
  const { blocks } = run;
  const space = width - LEFT;
  const ways = SMALLEST_CELLS.map((cell) => inBands(blocks, Math.max(1, Math.floor(space / cell))));
  const isLow = (bands) => numRowsOf(bands) * LOWEST_CELL <= TALLEST;
  const bands = ways.find(isLow) ?? ways.at(-1);
  const mostPositions = Math.max(1, ...bands.map(({ first, last }) => last - first + 1));
  const cellWidth = Math.max(1, Math.min(LARGEST_CELL, Math.floor(space / mostPositions)));
  const fitting = Math.floor(TALLEST / Math.max(1, numRowsOf(bands)));
  const cellHeight = Math.max(LOWEST_CELL, Math.min(cellWidth, fitting));
  let top = TOP;
  for (const band of bands) {
    band.top = top;
    band.height = band.moments.length * cellHeight;
    top += band.height + GAP + TOP;
  }
  return { bands, cellWidth, cellHeight, width, height: top - TOP };
}

function numRowsOf(bands) {
  return bands.reduce((total, { moments }) => total + moments.length, 0);
}

/** Blocks in bands of at most so many positions; a block that is longer is cut. */
function inBands(blocks, most) {
  const bands = [];
  for (const piece of blocks.flatMap((block) => cut(block, most))) {
    const band = bands.at(-1);
    if (band && piece.last - band.first < most) {
      band.last = piece.last;
      band.blocks.push(...piece.blocks);
    } else {
      bands.push(piece);
    }
  }
  return bands.map((band) => ({ ...band, moments: momentsOf(band.blocks) }));
}

/** A block in pieces of about the same length, at most so many positions each. */
function cut(block, most) {
  const length = Math.ceil(block.length / Math.ceil(block.length / most));
  const pieces = [];
  for (let at = 0; at < block.length; at += length) {
    const first = block.position + at;
    const last = block.position + Math.min(at + length, block.length) - 1;
    pieces.push({ first, last, blocks: [block] });
  }
  return pieces;
}

/** The moments from the first step of some blocks to their last one. */
function momentsOf(blocks) {
  const from = Math.min(...blocks.map(({ firstMoment }) => firstMoment));
  const to = Math.max(...blocks.map(({ lastMoment }) => lastMoment));
  return Array.from({ length: to - from + 1 }, (_, at) => from + at);
}

/** Where the corner of a cell is; null if no band shows it. */
function placeOf({ bands, cellWidth, cellHeight }, { position, moment }) {
  const band = bands.find(({ first, last }) => first <= position && position <= last);
  const row = band ? band.moments.indexOf(moment) : -1;
  if (row < 0) return null;
  return { x: LEFT + (position - band.first) * cellWidth, y: band.top + row * cellHeight };
}

/** A canvas of the size of the grid, empty, that is sharp on every screen. */
function sized(canvas, { width, height }) {
  canvas.width = Math.round(width * devicePixelRatio);
  canvas.height = Math.round(height * devicePixelRatio);
  canvas.style.setProperty("width", `${width}px`);
  canvas.style.setProperty("height", `${height}px`);
  const context = canvas.getContext("2d");
  context.scale(devicePixelRatio, devicePixelRatio);
  return context;
}

/** The cells of a band: one pixel each, which the canvas then enlarges. */
function drawBand(context, band, layout, run, colours) {
  const width = band.last - band.first + 1;
  const small = element("canvas", { width, height: band.moments.length });
  const pixels = new ImageData(width, band.moments.length);
  fillSettled(pixels, band, colours.line);
  for (const { frame, moment } of run.steps()) {
    const row = moment - band.moments[0];
    if (row < 0 || row >= band.moments.length) continue;
    frame.confidence.forEach((confidence, at) => {
      const column = frame.position + at - band.first;
      if (column < 0 || column >= width) return;
      const full = frame.masked[at] ? colours.control : colours.accent;
      setPixel(pixels, column, row, mix(colours.paper, full, shade(confidence)));
    });
  }
  small.getContext("2d").putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, LEFT, band.top, width * layout.cellWidth, band.height);
  clearGaps(context, band, layout);
  drawNumbers(context, band, layout, run, colours.quiet);
}

/** Rows after the last step of a block, where its text is settled. */
function fillSettled(pixels, band, colour) {
  for (const block of band.blocks) {
    const from = Math.max(block.position, band.first);
    const to = Math.min(block.position + block.length - 1, band.last);
    for (let row = block.lastMoment - band.moments[0] + 1; row < pixels.height; row += 1) {
      for (let position = from; position <= to; position += 1) {
        setPixel(pixels, position - band.first, row, colour, 90);
      }
    }
  }
}

/** Gaps between the cells, where there is room for them. */
function clearGaps(context, band, { cellWidth, cellHeight }) {
  const right = LEFT + (band.last - band.first + 1) * cellWidth;
  if (cellHeight >= 5) {
    band.moments.forEach((_, row) => {
      context.clearRect(LEFT, band.top + (row + 1) * cellHeight - 1, right - LEFT, 1);
    });
  }
  if (cellWidth >= 5) {
    for (let x = LEFT + cellWidth; x <= right; x += cellWidth) {
      context.clearRect(x - 1, band.top, 1, band.height);
    }
  }
}

/** The first position of each block above a band, and forwards at its side. */
function drawNumbers(context, band, { cellWidth, cellHeight }, run, colour) {
  context.fillStyle = rgb(colour);
  context.font = FONT;
  context.textAlign = "left";
  let free = 0;
  for (const { position } of band.blocks) {
    const first = Math.max(position, band.first);
    const x = LEFT + (first - band.first) * cellWidth;
    if (x < free) continue;
    context.fillText(String(first), x, band.top - 4);
    free = x + 30;
  }
  context.textAlign = "right";
  const every = niceStep(12 / cellHeight);
  band.moments.forEach((moment, row) => {
    if (row % every !== 0) return;
    const y = band.top + row * cellHeight + Math.min(cellHeight, 12) / 2 + 4;
    context.fillText(String(run.forwardsAt(moment)), LEFT - 6, y);
  });
}

/** A dot in each cell whose token took another one's place, or was masked again. */
function drawDots(context, band, { cellWidth, cellHeight }, run, colours) {
  const radius = Math.max(1, Math.min(cellWidth, cellHeight) * 0.28);
  context.fillStyle = rgb(colours.revised);
  context.strokeStyle = rgb(colours.paper);
  context.lineWidth = 1;
  for (const { frame, events, moment } of run.steps()) {
    if (frame.position > band.last || frame.position + events.length <= band.first) continue;
    const y = band.top + (moment - band.moments[0] + 0.5) * cellHeight - 0.5;
    events.forEach((event, at) => {
      const position = frame.position + at;
      if (event !== "revised" && event !== "remasked") return;
      if (position < band.first || position > band.last) return;
      drawDot(context, LEFT + (position - band.first + 0.5) * cellWidth - 0.5, y, radius);
    });
  }
}

function drawDot(context, x, y, radius) {
  if (radius <= 1.5) {
    context.fillRect(x - radius, y - radius, 2 * radius, 2 * radius); // a circle looks the same
    return;
  }
  context.beginPath();
  context.arc(x, y, radius, 0, 2 * Math.PI);
  context.fill();
  context.stroke();
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

/**
 * How much of the full colour a cell has: the square of the confidence, since most of them are
 * high. Even the least sure cell is told from the paper. The legend in theme.css shows the same.
 */
function shade(confidence) {
  return 0.08 + 0.92 * confidence ** 2;
}

function mix(from, to, share) {
  return from.map((each, at) => Math.round(each + (to[at] - each) * share));
}

function setPixel(pixels, column, row, [red, green, blue], alpha = 255) {
  pixels.data.set([red, green, blue, alpha], 4 * (row * pixels.width + column));
}

function rgb(colour) {
  return `rgb(${colour.join(" ")})`;
}
