/**
 * Where the cells of a grid are. No DOM.
 *
 * @typedef {object} Band  Positions beside each other, and the forwards that are shown of them.
 * @property {number} first  position
 * @property {number} last  position
 * @property {object[]} blocks  that have positions in it
 * @property {number[]} moments  its rows
 * @property {number} top  px
 * @property {number} height  px
 *
 * @typedef {object} Layout  In px, but for the bands.
 * @property {Band[]} bands
 * @property {number} cellWidth
 * @property {number} cellHeight
 * @property {number} width
 * @property {number} height
 */

export const LEFT = 36; // px for the numbers of forwards
const TOP = 16; // px above each band for the numbers of positions
const GAP = 8; // px below each band
const SMALLEST_CELLS = [7, 5, 4, 3, 2]; // px of a position: the first that makes no grid too tall
const LARGEST_CELL = 16;
const LOWEST_CELL = 2; // px of a forward
const TALLEST = 1800; // px of all cells together, where that can be

/**
 * Which positions stand in which band, and how large a cell is.
 *
 * @param {import("dmax/run.js").Run} run
 * @param {number} width  px that there are
 * @returns {Layout}
 */
export function layOut(run, width) {
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
export function placeOf({ bands, cellWidth, cellHeight }, { position, moment }) {
  const band = bands.find(({ first, last }) => first <= position && position <= last);
  const row = band ? band.moments.indexOf(moment) : -1;
  if (row < 0) return null;
  return { x: LEFT + (position - band.first) * cellWidth, y: band.top + row * cellHeight };
}

/** The cell at a place; null if there is none. */
export function cellAt({ bands, cellWidth, cellHeight }, x, y) {
  const band = bands.find(({ top, height }) => top <= y && y < top + height);
  if (!band) return null;
  const position = band.first + Math.floor((x - LEFT) / cellWidth);
  if (position < band.first || position > band.last) return null;
  return { position, moment: band.moments[Math.floor((y - band.top) / cellHeight)] };
}
