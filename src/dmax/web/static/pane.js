/** A pane of the playground: how it decodes, the run that it shows, and the file of that run. */

import { Choices } from "dmax/choices.js";
import { Counters } from "dmax/counters.js";
import { Curve } from "dmax/curve.js";
import { element } from "dmax/dom.js";
import { closingNumber, exampleOf } from "dmax/examples.js";
import { Grid } from "dmax/grid.js";
import { describe } from "dmax/models.js";
import { readRun, saveRun } from "dmax/run-file.js";
import { Run } from "dmax/run.js";
import { TextView } from "dmax/text-view.js";

const WIDE = "(min-width: 40rem)"; // where there is room for the curve from the start

/** One of the panes that race. */
export class Pane {
  #choices = new Choices();
  #run = null;
  #views = [];
  #callbacks;

  #title;
  #stage = element("div", { class: "stage" });
  #placeholder = element("p", { class: "placeholder" });
  #result = element("p", { class: "result" });
  #problem = element("p", { class: "problem", role: "alert", hidden: true });
  #save = button("Save run", () => saveRun(this.#run, fileName(this.#run)));
  #open = button("Open a run…", () => this.#file.click());
  #file = element("input", { type: "file", accept: ".json,application/json", hidden: true });

  /**
   * @param {string} name what screen readers call it, such as "Left".
   * @param {object} callbacks
   * @param {() => void} callbacks.onOpen a run was read from a file.
   * @param {(moment: number) => void} callbacks.onPick a moment was picked in the pictures.
   */
  constructor(name, callbacks) {
    this.#callbacks = callbacks;
    this.#title = element("h2", {}, name);
    this.#save.disabled = true;
    this.#file.addEventListener("change", () => this.#openRun());
    this.element = element(
      "section",
      { class: "panel pane", "aria-label": `${name} pane` },
      this.#title,
      this.#choices.element,
      this.#problem,
      this.#placeholder,
      this.#stage,
      element("div", { class: "actions" }, this.#save, this.#open, this.#file),
    );
  }

  /** How the next run is decoded. @returns {import("dmax/models.js").Settings} */
  get settings() {
    return this.#choices.value;
  }

  /** The run that is shown; null before the first. @returns {Run | null} */
  get run() {
    return this.#run;
  }

  /** As `Choices.offer`. */
  offer(models, chosen) {
    this.#choices.offer(models, chosen);
    this.#placeholder.textContent = "The answer appears here, masks first.";
  }

  /** Begin a run: the one before is gone. */
  begin() {
    this.#clear(describe(this.settings));
    this.#open.disabled = true;
    this.#placeholder.textContent = "Waiting for the first forward…";
    this.#placeholder.hidden = false;
  }

  /**
   * Take in what the server says of the run.
   *
   * @param {object} record the `dmax` object of a chunk: "begin", a frame, or "finished".
   */
  receive({ kind, index, ...record }) {
    if (kind === "begin") {
      this.#take(new Run(record));
    } else if (kind === "finished") {
      this.#run.finish(record);
    } else {
      this.#run.push({ kind, ...record });
    }
  }

  /** Nothing more will come of the run. */
  end() {
    this.#open.disabled = false;
    this.#save.disabled = !this.#run?.isFinished;
  }

  /**
   * Say what went wrong; what has been decoded stays.
   *
   * @param {string} message
   */
  fail(message) {
    this.#problem.textContent = message;
    this.#problem.hidden = false;
    this.#placeholder.hidden = true;
  }

  /**
   * Show the run as it was after so many forwards, or its end if it took fewer.
   *
   * @param {number} moment
   */
  show(moment) {
    if (this.#run === null) {
      return;
    }
    const last = this.#run.numMoments - 1;
    this.#views.forEach((view) => view.show(this.#run, Math.min(moment, last)));
    this.#judge(moment >= last && this.#run.isFinished);
  }

  /** Say whether the answer is the right one, where that is known. */
  #judge(isOver) {
    const expected = exampleOf(this.#run.header.prompt)?.answer;
    if (!isOver || expected === undefined) {
      this.#result.textContent = "";
      return;
    }
    const answer = closingNumber(this.#run.output.text);
    const isRight = answer === expected;
    const wrong = answer === null ? "It gives no answer" : `${answer} is wrong`;
    this.#result.textContent = isRight ? `✓ ${answer} is right` : `✗ ${wrong}; ${expected} is right`;
    this.#result.classList.toggle("wrong", !isRight);
  }

  #clear(title) {
    this.#run = null;
    this.#views = [];
    this.#stage.replaceChildren();
    this.#title.textContent = title;
    this.#problem.hidden = true;
    this.#save.disabled = true;
  }

  /** Make the views of a run. */
  #take(run) {
    const [counters, text, curve, grid] = Array.from({ length: 4 }, () => element("div"));
    const onPick = this.#callbacks.onPick;
    this.#run = run;
    this.#placeholder.hidden = true;
    this.#stage.replaceChildren(
      counters,
      text,
      this.#result,
      folded("Confidence", curve, matchMedia(WIDE).matches),
      folded("Every forward at a glance", grid, false),
    );
    this.#views = [
      new Counters(counters),
      new TextView(text, { label: this.#title.textContent }),
      new Curve(curve, { onPick }),
      new Grid(grid, { onPick: (_, moment) => onPick(moment) }),
    ];
  }

  async #openRun() {
    const [file] = this.#file.files;
    if (file === undefined) {
      return;
    }
    try {
      const run = await readRun(file);
      this.#clear(`${run.header.model} · ${file.name}`);
      this.#take(run);
      this.#callbacks.onOpen();
      this.end();
    } catch (error) {
      this.fail(`${file.name} cannot be shown. ${error.message}`);
    }
    this.#file.value = ""; // so that the same file can be opened again
  }
}

function button(label, onPress) {
  const made = element("button", { class: "button", type: "button" }, label);
  made.addEventListener("click", onPress);
  return made;
}

/** Something under a line that opens and closes it. */
function folded(title, content, open) {
  return element("details", { open }, element("summary", {}, title), content);
}

function fileName({ header }) {
  const name = `dmax-${header.model}-${header.params.strategy}`;
  return `${name.replaceAll(/[^\w.-]+/g, "-")}.json`;
}
