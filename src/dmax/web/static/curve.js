/** How blocks converge: confidence, the share that is decoded, and what changes, over forwards. */

import { element, onResize, svg } from "dmax/dom.js";
import { niceStep } from "dmax/numbers.js";

const HEIGHT = 150;
const LEFT = 34;
const RIGHT = 8;
const TOP = 8;
const BOTTOM = 22;
const NARROWEST_LABEL = 36; // px between two numbers on the axis
const NARROWEST_NUMBER = 22; // px between two bars with their numbers

const LEGEND = [
  ["line", "mean confidence of a block"],
  ["line lowest", "its lowest"],
  ["line decoded", "share with a token"],
  ["bar", "positions that changed"],
];

/** The convergence curve of a run; a press on it goes to that moment. */
export class Curve {
  #onPick;
  #picture;
  #bound;
  #run = null;
  #numFrames = -1;
  #moment = 0;
  #now = svg("line", { class: "now" });

  /**
   * @param {HTMLElement} container
   * @param {{onPick?: (moment: number) => void}} options
   */
  constructor(container, { onPick = () => {} } = {}) {
    this.#onPick = onPick;
    this.#picture = svg("svg", { role: "img", height: HEIGHT });
    this.#bound = element("span", { hidden: true });
    const keys = LEGEND.map(([kind, label]) =>
      element("span", {}, element("i", { class: kind }), label),
    );
    container.append(
      element("figure", { class: "curve" }, this.#picture,
        element("figcaption", { class: "legend" }, ...keys, this.#bound)),
    );
    this.#picture.addEventListener("click", (event) => {
      if (this.#run) this.#onPick(this.#momentAt(event.offsetX));
    });
    onResize(this.#picture.parentElement, () => this.#draw());
  }

  /** Show the curve of a whole run, and where in it a moment is. */
  show(run, moment) {
    const isSame = this.#run === run && this.#numFrames === run.frames.length;
    this.#run = run;
    this.#moment = moment;
    if (isSame) this.#markNow();
    else this.#draw();
  }

  #draw() {
    const width = this.#width();
    if (this.#run === null || width === 0) return;
    this.#numFrames = this.#run.frames.length;
    const curve = this.#run.curve();
    const { threshold } = this.#run.header;
    this.#picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.#picture.setAttribute("aria-label", inWords(this.#run, curve));
    this.#picture.replaceChildren(
      ...this.#axes(),
      ...(isShare(threshold) ? [this.#level(threshold)] : []),
      ...this.#bars(curve),
      ...curve.flatMap(({ points }) => this.#lines(points)),
      this.#now,
    );
    this.#markNow();
    this.#bound.hidden = !isShare(threshold);
    this.#bound.replaceChildren(element("i", { class: "line bound" }), `threshold ${threshold}`);
  }

  #lines(points) {
    const path = (value) =>
      points.map((point) => `${this.#x(point.moment)},${this.#y(value(point))}`).join(" ");
    const circle = ({ moment, mean }) =>
      svg("circle", { class: "point", cx: this.#x(moment), cy: this.#y(mean), r: 2.5 });
    return [
      svg("polyline", { class: "decoded", points: path((point) => point.decoded) }),
      svg("polyline", { class: "lowest", points: path((point) => point.lowest) }),
      svg("polyline", { class: "mean", points: path((point) => point.mean) }),
      ...(points.length === 1 ? points.map(circle) : []), // a line of one point shows nothing
    ];
  }

  /** How many positions changed at each forward: bars of up to half the height. */
  #bars(curve) {
    const changed = new Map();
    for (const { moment, changed: number } of curve.flatMap(({ points }) => points)) {
      changed.set(moment, (changed.get(moment) ?? 0) + number);
    }
    const most = Math.max(1, ...changed.values());
    const space = this.#x(1) - this.#x(0);
    const width = Math.max(1, Math.min(14, space * 0.5));
    return [...changed].flatMap(([moment, number]) => {
      const height = (number / most) * (HEIGHT - TOP - BOTTOM) * 0.5;
      const y = HEIGHT - BOTTOM - height;
      const x = this.#x(moment) - width / 2;
      const bar = svg("rect", { class: "changed", x, y, width, height });
      if (number === 0 || space < NARROWEST_NUMBER) return [bar];
      const place = { x: this.#x(moment), y: y - 3, "text-anchor": "middle" };
      return [bar, svg("text", place, String(number))];
    });
  }

  #axes() {
    const last = this.#run.numMoments - 1;
    const every = niceStep(NARROWEST_LABEL / Math.max(this.#x(1) - this.#x(0), 1e-6));
    const levels = [0, 0.5, 1].flatMap((share) => [
      svg("line", {
        class: "axis", x1: LEFT, x2: this.#width() - RIGHT, y1: this.#y(share), y2: this.#y(share),
      }),
      svg("text", { x: LEFT - 6, y: this.#y(share) + 4, "text-anchor": "end" }, String(share)),
    ]);
    const numbers = [];
    for (let moment = 0; moment <= last; moment += every) {
      const place = { x: this.#x(moment), y: HEIGHT - 6, "text-anchor": "middle" };
      numbers.push(svg("text", place, String(this.#run.forwardsAt(moment))));
    }
    return [...levels, ...numbers];
  }

  #level(share) {
    const y = this.#y(share);
    return svg("line", { class: "bound", x1: LEFT, x2: this.#width() - RIGHT, y1: y, y2: y });
  }

  #markNow() {
    const x = this.#x(Math.min(this.#moment, this.#run.numMoments - 1));
    const place = { x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM };
    Object.entries(place).forEach(([name, value]) => this.#now.setAttribute(name, value));
  }

  #width() {
    return Math.floor(this.#picture.parentElement.clientWidth);
  }

  #x(moment) {
    const last = Math.max(this.#run.numMoments - 1, 1);
    return LEFT + (moment / last) * (this.#width() - LEFT - RIGHT);
  }

  #y(share) {
    return TOP + (1 - share) * (HEIGHT - TOP - BOTTOM);
  }

  #momentAt(x) {
    const last = this.#run.numMoments - 1;
    const share = (x - LEFT) / (this.#width() - LEFT - RIGHT);
    return Math.max(0, Math.min(last, Math.round(share * last)));
  }
}

/** Whether a threshold is a confidence at all: that of some strategies is in nats. */
function isShare(threshold) {
  return typeof threshold === "number" && threshold > 0 && threshold <= 1;
}

function inWords(run, curve) {
  const blocks = curve.map(({ block, points }) => {
    const [first, last] = [points[0], points.at(-1)];
    const way = `${first.mean.toFixed(2)} to ${last.mean.toFixed(2)}`;
    return `block ${block + 1}: mean confidence ${way} in ${points.length} forwards`;
  });
  return `Convergence over ${run.numMoments - 1} forwards. ${blocks.join("; ")}`;
}
