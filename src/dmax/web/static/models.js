/**
 * What /v1/models says of a model: how it can be decoded, and which two make the opening race.
 */

const OWN = "spd"; // the strategy of models that are trained to revise

/** As many tokens a forward as DMax writes, on the bundled base model (docs/results). */
export const PUSHED = 0.25;

/**
 * @typedef {object} Settings how a pane decodes.
 * @property {string} model
 * @property {string} strategy
 * @property {number | null} threshold null: the strategy's own.
 */

/**
 * The strategies that a model can be decoded with, its own first.
 *
 * @param {object} model an entry of /v1/models.
 * @returns {string[]}
 */
export function strategiesOf(model) {
  const { strategy, strategies } = model.dmax;
  const others = Object.keys(strategies).filter((name) => name !== strategy);
  return [strategy, ...others.sort()];
}

/**
 * The threshold of a strategy unless another is asked for; null if it has none.
 *
 * @param {object} model an entry of /v1/models.
 * @param {string} strategy
 * @returns {number | null}
 */
export function thresholdOf(model, strategy) {
  return model.dmax.strategies[strategy]?.threshold ?? null;
}

/**
 * The two settings that a race begins with: a base model that is pushed against one that revises.
 *
 * With one model served, both panes have it: pushed by `threshold`, and as it is meant to be.
 *
 * @param {object[]} models the entries of /v1/models; at least one.
 * @returns {Settings[]} of the left and the right pane.
 */
export function openingRace(models) {
  const revises = (model) => model.dmax.strategy === OWN;
  const right = models.find(revises) ?? models[0];
  const left = models.find((model) => !revises(model)) ?? right;
  const { strategy } = right.dmax;
  return [
    { model: left.id, strategy: "threshold", threshold: PUSHED },
    { model: right.id, strategy, threshold: thresholdOf(right, strategy) },
  ];
}

/**
 * Settings in a few words, as the heading of a pane.
 *
 * @param {Settings} settings
 * @returns {string}
 */
export function describe({ model, strategy, threshold }) {
  return `${model} · ${strategy}${threshold === null ? "" : ` ${threshold}`}`;
}
