/** What a run has cost up to a moment, and what it gave. */

import { element, setText } from "dmax/dom.js";

const COUNTERS = [
  ["forwards", "forwards", (value) => String(value)],
  ["settled", "tokens settled", (value) => String(value)],
  ["tpf", "tokens per forward", (value) => value.toFixed(2)],
  ["tokensPerSecond", "tokens per second", (value) => value.toFixed(0)],
  ["revisions", "revisions", (value) => String(value)],
];

/** A row of figures. */
export class Counters {
  #values;

  /** @param {HTMLElement} container */
  constructor(container) {
    this.#values = COUNTERS.map(([name]) => element("dd", { "data-counter": name }, "0"));
    const pairs = COUNTERS.map(([, label], at) =>
      element("div", {}, element("dt", {}, label), this.#values[at]),
    );
    container.append(element("dl", { class: "counters" }, ...pairs));
  }

  /** Show the figures of a run at a moment. */
  show(run, moment) {
    const { counters } = run.at(moment);
    COUNTERS.forEach(([name, , write], at) => setText(this.#values[at], write(counters[name])));
  }
}
