/** One run as a whole: figures, text, why its blocks ended, its curve and its grid. */

import { Counters } from "dmax/counters.js";
import { Curve } from "dmax/curve.js";
import { element } from "dmax/dom.js";
import { Grid } from "dmax/grid.js";
import { counted } from "dmax/numbers.js";
import { TextView } from "dmax/text-view.js";

/** The views of a run, which follow one another: a cell of the grid is a token of the text. */
export class RunView {
  #text;
  #views;
  #blocks;
  #said = "";

  /**
   * @param {HTMLElement} container
   * @param {{title?: string, onMove?: (moment: number) => void}} options
   */
  constructor(container, { title = "", onMove = () => {} } = {}) {
    const part = (heading) => {
      const section = element("section", {}, element("h3", {}, heading));
      const content = element("div");
      section.append(content);
      return { section, content };
    };
    const counters = element("div");
    const [text, blocks, curve, grid] = [
      "Text", "Why each block ended", "Convergence", "The whole answer",
    ].map(part);
    container.classList.add("run-view");
    if (title) container.append(element("h2", {}, title));
    container.append(counters, ...[text, blocks, curve, grid].map(({ section }) => section));

    const label = title ? `${title}: the text, token by token` : undefined;
    this.#text = new TextView(text.content, { label });
    this.#blocks = element("ol", { class: "blocks", tabindex: 0, "aria-label": "blocks" });
    blocks.content.append(this.#blocks);
    const onPick = (position, moment) => {
      onMove(moment);
      this.#text.select(position);
    };
    this.#views = [
      new Counters(counters),
      this.#text,
      new Curve(curve.content, { onPick: onMove }),
      new Grid(grid.content, { onPick }),
    ];
  }

  /** Show a run at a moment. */
  show(run, moment) {
    this.#views.forEach((view) => view.show(run, moment));
    this.#tellBlocks(run);
  }

  #tellBlocks(run) {
    const lines = run.blocks.map(sentence);
    const said = lines.join("\n");
    if (said === this.#said) return;
    this.#said = said;
    this.#blocks.replaceChildren(...lines.map((line) => element("li", {}, line)));
  }
}

/** What happened to a block as a whole. */
function sentence(block) {
  const last = block.position + block.length - 1;
  const parts = [`Positions ${block.position} to ${last}: ${counted(block.steps, "forward")}`];
  if (block.revisions > 0) parts.push(counted(block.revisions, "revision"));
  if (block.forced > 0) parts.push(counted(block.forced, "forced step"));
  parts.push(block.end === null ? "still open" : `ended because ${block.end.text}`);
  return `${parts.join(", ")}.`;
}
