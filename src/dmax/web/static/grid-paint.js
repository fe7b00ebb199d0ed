/** Paints the cells of a grid, their numbers and their dots onto a canvas. */

import { element } from "dmax/dom.js";
import { LEFT } from "dmax/grid-layout.js";
import { niceStep } from "dmax/numbers.js";
import { palette } from "dmax/theme.js";

const FONT = "11px system-ui, sans-serif";
const COLOURS = ["paper", "accent", "control", "line", "quiet", "revised"];

/**
 * Paint all cells.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {import("dmax/run.js").Run} run
 * @param {import("dmax/grid-layout.js").Layout} layout
 */
export function paintCells(canvas, run, layout) {
  const context = sized(canvas, layout);
  const colours = palette(canvas.parentElement, COLOURS);
  for (const band of layout.bands) {
    drawBand(context, band, layout, run, colours);
    drawDots(context, band, layout, run, colours);
  }
}

/**
 * Paint a frame around the row of a moment, and one around a cell, on a canvas of their own.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {import("dmax/grid-layout.js").Layout} layout
 * @param {number} moment
 * @param {{x: number, y: number} | null} place  of the cell
 */
export function paintMarks(canvas, layout, moment, place) {
  const context = sized(canvas, layout);
  const { focus } = palette(canvas.parentElement, ["focus"]);
  const { cellWidth, cellHeight } = layout;
  context.strokeStyle = rgb(focus);
  context.lineWidth = 2;
  for (const band of layout.bands) {
    const row = band.moments.indexOf(moment);
    if (row < 0) continue;
    const width = (band.last - band.first + 1) * cellWidth;
    context.strokeRect(LEFT - 1, band.top + row * cellHeight - 1, width + 2, cellHeight + 2);
  }
  if (place) context.strokeRect(place.x - 1, place.y - 1, cellWidth + 2, cellHeight + 2);
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
