/**
 * A pane of the playground: how it decodes, the run that it shows, and the file of that run.
 */

import { Counters } from "dmax/counters.js";
import { Curve } from "dmax/curve.js";
import { element } from "dmax/dom.js";
import { closingNumber } from "dmax/examples.js";
import { Grid } from "dmax/grid.js";
import { describe, strategiesOf, thresholdOf } from "dmax/models.js";
import { readRun, saveRun } from "dmax/run-file.js";
import { Run } from "dmax/run.js";
import { TextView } from "dmax/text-view.js";

/** What a saved run is called. */
const FILE = "dmax-run.json";

/** One of the panes that race. It owns the children of its element. */
export class Pane {
  #models = [];
  #run = null;
  #views = [];
  #expected = null;
  #callbacks;

  /**
   * @param {HTMLElement} parent the pane is put at its end.
   * @param {string} name what screen readers call it, such as "Left".
   * @param {object} callbacks
   * @param {() => void} callbacks.onOpen a run was read from a file.
   * @param {(moment: number) => void} callbacks.onPick a moment was picked in the pictures.
   */
  constructor(parent, name, callbacks) {
    this.#callbacks = callbacks;
    this.#build(name);
    parent.append(this.element);
  }

  #build(name) {
    this.model = element("select", { name: `${name}-model` });
    this.strategy = element("select", { name: `${name}-strategy` });
    this.threshold = element("input", { type: "number", min: "0", max: "1", step: "any" });
    this.title = element("h2", {}, name);
    this.stage = element("div", { class: "stage" });
    this.placeholder = element("p", { class: "placeholder" });
    this.result = element("p", { class: "result" });
    this.problem = element("p", { class: "problem", role: "alert", hidden: true });
    this.save = element("button", { class: "button quiet", type: "button", disabled: true }, "Save run");
    this.open = element("button", { class: "button quiet", type: "button" }, "Open a run…");
    this.file = element("input", { type: "file", accept: ".json,application/json", hidden: true });
    this.element = element(
      "section",
      { class: "panel pane", "aria-label": `${name} pane` },
      this.title,
      element(
        "div",
        { class: "settings" },
        element("label", { class: "field" }, "Model", this.model),
        element("label", { class: "field" }, "Strategy", this.strategy),
        element("label", { class: "field" }, "Threshold", this.threshold),
      ),
      this.problem,
      this.placeholder,
      this.stage,
      element("div", { class: "actions" }, this.save, this.open, this.file),
    );
    this.model.addEventListener("change", () => this.#offerStrategies());
    this.strategy.addEventListener("change", () => this.#offerThreshold());
    this.save.addEventListener("click", () => saveRun(this.#run, FILE));
    this.open.addEventListener("click", () => this.file.click());
    this.file.addEventListener("change", () => this.#openRun());
  }

  /** How the next run is decoded. @returns {import("dmax/models.js").Settings} */
  get settings() {
    const threshold = this.threshold.value === "" ? null : this.threshold.valueAsNumber;
    return { model: this.model.value, strategy: this.strategy.value, threshold };
  }

  /** How many moments there are to step through. */
  get numMoments() {
    return this.#run?.numMoments ?? 0;
  }

  /** The run that is shown; null before the first. @returns {Run | null} */
  get run() {
    return this.#run;
  }

  /**
   * Offer models, and choose one of them.
   *
   * @param {object[]} models the entries of /v1/models.
   * @param {import("dmax/models.js").Settings} settings
   */
  offer(models, settings) {
    this.#models = models;
    fill(this.model, models.map((model) => model.id));
    this.model.value = settings.model;
    this.#offerStrategies();
    this.strategy.value = settings.strategy;
    this.#offerThreshold();
    this.threshold.value = settings.threshold ?? "";
    this.placeholder.textContent = "The answer appears here, masks first.";
  }

  get #chosen() {
    return this.#models.find((model) => model.id === this.model.value);
  }

  #offerStrategies() {
    fill(this.strategy, strategiesOf(this.#chosen));
    this.#offerThreshold();
  }

  #offerThreshold() {
    const threshold = thresholdOf(this.#chosen, this.strategy.value);
    this.threshold.disabled = threshold === null;
    this.threshold.value = threshold ?? "";
  }

  /**
   * Begin a run: the one before is gone.
   *
   * @param {string | null} expected the right answer, where it is known.
   */
  begin(expected) {
    this.#expected = expected;
    this.#run = null;
    this.stage.replaceChildren();
    this.title.textContent = describe(this.settings);
    this.placeholder.hidden = false;
    this.placeholder.textContent = "Waiting for the first forward…";
    this.problem.hidden = true;
    this.save.disabled = true;
  }

  /**
   * Take in what the server says of the run.
   *
   * @param {object} record the `dmax` object of a chunk: "begin", a frame, or "finished".
   */
  receive(record) {
    if (record.kind === "begin") {
      this.#take(new Run(record));
    } else if (record.kind === "finished") {
      this.#run.finish(record);
      this.save.disabled = false;
    } else {
      this.#run.push(record);
    }
  }

  /** Make the views of a run. */
  #take(run) {
    const [counters, text, curve, grid] = Array.from({ length: 4 }, () => element("div"));
    const hasRoom = matchMedia("(min-width: 40rem)").matches;
    const onMove = this.#callbacks.onPick;
    this.#run = run;
    this.placeholder.hidden = true;
    this.stage.replaceChildren(
      counters,
      text,
      this.result,
      folded("Confidence", curve, hasRoom),
      folded("Every forward at a glance", grid, false),
    );
    this.#views = [
      new Counters(counters),
      new TextView(text, { label: this.title.textContent }),
      new Curve(curve, { onPick: onMove }),
      new Grid(grid, { onPick: (_, moment) => onMove(moment) }),
    ];
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
    const isOver = this.#run.isFinished && moment >= last;
    this.result.textContent = isOver && this.#expected !== null ? this.#judgement() : "";
  }

  /** Whether the answer is the right one. */
  #judgement() {
    const answer = closingNumber(this.#run.output.text);
    const isRight = answer === this.#expected;
    this.result.classList.toggle("wrong", !isRight);
    if (isRight) {
      return `✓ ${answer} is right`;
    }
    return `✗ ${answer === null ? "It gives no answer" : `${answer} is wrong`}; ${this.#expected} is right`;
  }

  /**
   * Say what went wrong; what has been decoded stays.
   *
   * @param {string} message
   */
  fail(message) {
    this.problem.textContent = message;
    this.problem.hidden = false;
    this.placeholder.hidden = true;
  }

  async #openRun() {
    const [file] = this.file.files;
    if (file === undefined) {
      return;
    }
    try {
      const run = await readRun(file);
      this.begin(null);
      this.#take(run);
      this.title.textContent = `${run.header.model} · ${file.name}`;
      this.save.disabled = false;
      this.#callbacks.onOpen();
    } catch (error) {
      this.fail(`${file.name} cannot be shown. ${error.message}`);
    }
    this.file.value = ""; // so that the same file can be opened again
  }
}

/** Something under a line that opens and closes it. */
function folded(title, content, open) {
  return element("details", { open }, element("summary", {}, title), content);
}

/** Make the options of a list anew. */
function fill(select, names) {
  select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
}
