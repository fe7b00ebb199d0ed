/** The fields of a pane that say how it decodes: model, strategy, threshold. */

import { element } from "dmax/dom.js";
import { strategiesOf, thresholdOf } from "dmax/models.js";

/** Three fields, of which each offers what goes with the ones before it. */
export class Choices {
  #models = [];
  #model = element("select");
  #strategy = element("select");
  #threshold = element("input", { type: "number", min: 0, max: 1, step: "any" });

  constructor() {
    this.element = element(
      "div",
      { class: "settings" },
      element("label", { class: "field" }, "Model", this.#model),
      element("label", { class: "field" }, "Strategy", this.#strategy),
      element("label", { class: "field" }, "Threshold", this.#threshold),
    );
    this.#model.addEventListener("change", () => this.#offerStrategies());
    this.#strategy.addEventListener("change", () => this.#offerThreshold());
  }

  /** What is chosen. @returns {import("dmax/models.js").Settings} */
  get value() {
    const threshold = this.#threshold.value === "" ? null : this.#threshold.valueAsNumber;
    return { model: this.#model.value, strategy: this.#strategy.value, threshold };
  }

  /**
   * Offer models, and choose one of them.
   *
   * @param {object[]} models the entries of /v1/models.
   * @param {import("dmax/models.js").Settings} chosen
   */
  offer(models, chosen) {
    this.#models = models;
    fill(this.#model, models.map((model) => model.id));
    this.#model.value = chosen.model;
    this.#offerStrategies();
    this.#strategy.value = chosen.strategy;
    this.#offerThreshold();
    this.#threshold.value = chosen.threshold ?? "";
  }

  #offerStrategies() {
    fill(this.#strategy, strategiesOf(this.#chosenModel));
    this.#offerThreshold();
  }

  #offerThreshold() {
    const threshold = thresholdOf(this.#chosenModel, this.#strategy.value);
    this.#threshold.disabled = threshold === null;
    this.#threshold.value = threshold ?? "";
  }

  get #chosenModel() {
    return this.#models.find((model) => model.id === this.#model.value);
  }
}

function fill(select, names) {
  select.replaceChildren(...names.map((name) => element("option", { value: name }, name)));
}
