/**
 * What a run is: its header, its frames and its output, and what follows from them. No DOM.
 *
 * docs/trace.md says what header, frames and output hold. A *moment* is a point in time that can be
 * shown: 0 is before the first forward, k is after the k-th. Several frames of one forward, which
 * strategies with several open blocks give, belong to one moment.
 *
 * @typedef {"mask" | "provisional" | "revised" | "settled"} Status
 * @typedef {"promoted" | "revised" | "kept" | "remasked" | "waiting"} Event
 * @typedef {"text" | "end" | "after"} Role  "end": the first EOS; "after": what it cuts off.
 *
 * @typedef {object} Token  A position at a moment.
 * @property {number} position  within the completion
 * @property {number | null} id  null while it is masked
 * @property {string} text
 * @property {Status} status
 * @property {number} confidence  of its token, or of the token that was predicted for a mask
 * @property {number} changes  how often another token has taken its place
 * @property {Event | null} event  what this very forward did to it; null if its block took no step
 * @property {Role} role
 * @property {boolean} isEos
 * @property {number} block  index of its block
 *
 * @typedef {object} Counters
 * @property {number} forwards
 * @property {number} settled  tokens of finished blocks, up to the end of the text
 * @property {number} tpf  settled tokens per forward
 * @property {number} tokensPerSecond
 * @property {number} revisions  how often a token has taken another one's place
 *
 * @typedef {object} Snapshot
 * @property {number} moment
 * @property {number} forwards
 * @property {number} seconds  since the request was submitted
 * @property {boolean} isLast  the run is over and this is its end
 * @property {Token[]} tokens
 * @property {Counters} counters
 * @property {string} text  with MASK_SIGN where masks are
 */

import { complaint } from "dmax/trace-format.js";

export const MASK_SIGN = "░";
const ROUNDING = 0.00005; // frames have four digits of a probability

const REASONS = {
  agree: () => "two forwards agree",
  sure: (run) => `every position is at least ${run.header.stop_confidence} sure`,
  unmasked: () => "no mask is left",
  waited: () => "no mask is left and the block before it has ended",
  capped: (run, block) => `the cap on steps was reached (${block.steps.length})`,
};

/** A run that is over, or one that still grows. */
export class Run {
  #forwards = [0];
  #seconds = [0];
  #blocks = [];
  #last = { key: "", snapshot: null };

  /** @param {object} header  the settings of the run, as in docs/trace.md */
  constructor(header) {
    this.header = header;
    this.frames = [];
    this.output = null;
  }

  /**
   * The run that a trace file holds.
   *
   * @throws {Error} one sentence: why it is no trace that can be shown
   */
  static fromTrace(trace) {
    const wrong = complaint(trace);
    if (wrong !== null) throw new Error(wrong);
    const { frames, output, ...header } = trace;
    const run = new Run(header);
    frames.forEach((frame) => run.push(frame));
    run.finish(output);
    return run;
  }

  /** What `fromTrace` reads, for a file. */
  toTrace() {
    return { ...this.header, frames: this.frames, output: this.output };
  }

  /** Take the next frame; frames come in the order of their forwards. */
  push(frame) {
    this.frames.push(frame);
    if (frame.num_forwards > this.#forwards.at(-1)) {
      this.#forwards.push(frame.num_forwards);
      this.#seconds.push(frame.seconds);
    }
    const block = this.#blockAt(frame);
    block.steps.push(nextStep(block.steps.at(-1), frame, this.numMoments - 1));
  }

  /** The run is over. */
  finish(output) {
    this.output = output;
  }

  get isFinished() {
    return this.output !== null;
  }

  /** Moments that can be shown, the one before the first forward included. */
  get numMoments() {
    return this.#forwards.length;
  }

  /** Positions that have been open so far. */
  get numPositions() {
    return this.#blocks.reduce((end, block) => Math.max(end, block.position + block.length), 0);
  }

  /** Forwards of the request at a moment. */
  forwardsAt(moment) {
    return this.#forwards[moment];
  }

  /** Its blocks in order, each with what happened to it as a whole. */
  get blocks() {
    return this.#blocks.map((block) => ({
      position: block.position,
      length: block.length,
      steps: block.steps.length,
      firstMoment: block.steps[0].moment,
      lastMoment: block.steps.at(-1).moment,
      firstForward: block.steps[0].frame.num_forwards,
      lastForward: block.steps.at(-1).frame.num_forwards,
      forced: count(block.steps, (step) => step.frame.forced),
      revisions: sum(block.steps.at(-1).changes),
      end: this.#endOf(block),
    }));
  }

  /**
   * What the text looks like at a moment.
   *
   * @param {number} moment
   * @returns {Snapshot}
   */
  at(moment = this.numMoments - 1) {
    const key = `${moment} ${this.frames.length} ${this.isFinished}`;
    if (this.#last.key !== key) this.#last = { key, snapshot: this.#snapshot(moment) };
    return this.#last.snapshot; // every view of a page asks for the same one
  }

  #snapshot(moment) {
    const isLast = this.isFinished && moment === this.numMoments - 1;
    const tokens = this.#tokensAt(moment);
    this.#markTheEnd(tokens, isLast);
    const seconds = isLast ? this.output.seconds : this.#seconds[moment];
    const forwards = this.#forwards[moment];
    const kept = tokens.filter((token) => token.role === "text");
    const settled = count(kept, (token) => token.status === "settled");
    return {
      moment,
      forwards,
      seconds,
      isLast,
      tokens,
      counters: {
        forwards,
        settled,
        tpf: ratio(settled, forwards),
        tokensPerSecond: ratio(settled, seconds),
        revisions: sum(tokens.map((token) => token.changes)),
      },
      text: kept.map((token) => (token.status === "mask" ? MASK_SIGN : token.text)).join(""),
    };
  }

  /**
   * What happened to a position, forward by forward, up to a moment.
   *
   * @returns {{forward: number, step: number, id: number | null, text: string, confidence: number,
   *   event: Event, candidates: {id: number, probability: number, text: string}[]}[]}
   */
  history(position, moment = this.numMoments - 1) {
    const block = this.#blocks.find((each) => holds(each, position));
    const steps = block ? block.steps.filter((step) => step.moment <= moment) : [];
    return steps.map(({ frame, events }) => {
      const at = position - frame.position;
      const candidates = frame.candidates?.[at] ?? [];
      return {
        forward: frame.num_forwards,
        step: frame.step,
        id: frame.masked[at] ? null : frame.token_ids[at],
        text: frame.texts[at],
        confidence: frame.confidence[at],
        event: events[at],
        candidates: candidates.map(([id, probability, text]) => ({ id, probability, text })),
      };
    });
  }

  /**
   * How each block converged.
   *
   * @returns {{block: number, points: {moment: number, mean: number, lowest: number,
   *   decoded: number, changed: number}[]}[]}  `decoded` is a share, `changed` a number of
   *   positions that got a token or another token
   */
  curve() {
    return this.#blocks.map((block, index) => ({
      block: index,
      points: block.steps.map(({ frame, events, moment }) => ({
        moment,
        mean: ratio(sum(frame.confidence), frame.confidence.length),
        lowest: frame.confidence.reduce((low, each) => Math.min(low, each), 1),
        decoded: 1 - ratio(count(frame.masked, Boolean), frame.masked.length),
        changed: count(events, (event) => event !== "kept" && event !== "waiting"),
      })),
    }));
  }

  /** Every step of every block, for those who draw all of them. */
  steps() {
    return this.#blocks.flatMap((block) => block.steps);
  }

  #blockAt(frame) {
    const known = this.#blocks.find((block) => block.position === frame.position);
    if (known) return known;
    const block = { position: frame.position, length: frame.token_ids.length, steps: [] };
    this.#blocks.push(block);
    this.#blocks.sort((one, other) => one.position - other.position);
    return block;
  }

  #tokensAt(moment) {
    const shown = moment === 0 ? this.#unwritten() : this.#blocks;
    return shown.flatMap((block) => {
      const index = this.#blocks.indexOf(block);
      const step = block.steps.findLast((each) => each.moment <= moment);
      if (!step) return moment === 0 ? maskedTokens(block, index) : [];
      return tokensOf(step, index, step.moment === moment);
    });
  }

  /** The blocks that the first forward reads, before anything is written. */
  #unwritten() {
    return this.#blocks.filter((block) => block.steps[0].moment === 1);
  }

  /** Give each token its role: the text ends at the first EOS, or where the limit cuts it off. */
  #markTheEnd(tokens, isLast) {
    const { params, eos_token_ids: eos } = this.header;
    let limit = params.max_new_tokens;
    if (isLast) limit = Math.min(limit, this.output.token_ids.length);
    let hasEnded = false;
    for (const token of tokens) {
      token.isEos = token.id !== null && eos.includes(token.id);
      const isEnd = token.isEos && !params.ignore_eos;
      token.role = hasEnded || token.position >= limit ? "after" : "text";
      if (isEnd && !hasEnded) token.role = "end";
      hasEnded ||= isEnd;
    }
  }

  #endOf(block) {
    const last = block.steps.at(-1);
    if (last.frame.kind !== "committed") return null;
    const kinds = this.#whyEnded(block);
    return { kinds, text: kinds.map((kind) => REASONS[kind](this, block)).join(", and ") };
  }

  #whyEnded(block) {
    const last = block.steps.at(-1);
    if (last.frame.capped) return ["capped"];
    const before = block.steps.at(-2);
    const wasWhole = before !== undefined && !before.frame.masked.includes(true);
    const isUnchanged = last.events.every((event) => event === "kept");
    const { stop_confidence: stop, params } = this.header;
    if (stop === null) {
      // It ends blocks without masks, or else goes on until a forward edits nothing.
      if (!wasWhole || !isUnchanged) return ["unmasked"];
      return [this.#endsWithTheOneBefore(block) ? "waited" : "agree"];
    }
    const { stop_on_consistency: onConsistency, stop_on_confidence: onConfidence } = params.options;
    const isSure = last.frame.confidence.every((each) => each >= stop - ROUNDING);
    const kinds = [];
    if (wasWhole && isUnchanged && onConsistency !== false) kinds.push("agree");
    if (isSure && onConfidence !== false) kinds.push("sure");
    return kinds.length > 0 ? kinds : ["unmasked"];
  }

  /** Blocks close in order, so one that is done waits for the one before it. */
  #endsWithTheOneBefore(block) {
    const before = this.#blocks[this.#blocks.indexOf(block) - 1];
    return before?.steps.at(-1).moment === block.steps.at(-1).moment;
  }
}

/** A frame with what it changed, given the step of its block before it. */
function nextStep(before, frame, moment) {
  const events = frame.masked.map((isMasked, at) => {
    const wasMasked = before === undefined || before.frame.masked[at];
    if (isMasked) return wasMasked ? "waiting" : "remasked";
    if (wasMasked) return "promoted";
    return before.frame.token_ids[at] === frame.token_ids[at] ? "kept" : "revised";
  });
  // The last token that a position had counts, be it masked again in between.
  const tokens = frame.token_ids.map((id, at) =>
    frame.masked[at] ? (before?.tokens[at] ?? null) : id,
  );
  const changes = tokens.map((id, at) => {
    const old = before?.tokens[at] ?? null;
    return (before?.changes[at] ?? 0) + Number(old !== null && old !== id);
  });
  return { frame, moment, events, tokens, changes };
}

function tokensOf({ frame, events, changes }, block, isNow) {
  return frame.token_ids.map((id, at) => ({
    position: frame.position + at,
    id: frame.masked[at] ? null : id,
    text: frame.texts[at],
    status: statusOf(frame, at, changes[at]),
    confidence: frame.confidence[at],
    changes: changes[at],
    event: isNow ? events[at] : null,
    role: "text",
    block,
  }));
}

function statusOf(frame, at, changes) {
  if (frame.kind === "committed") return "settled";
  if (frame.masked[at]) return "mask";
  return changes > 0 ? "revised" : "provisional";
}

function maskedTokens(block, index) {
  return Array.from({ length: block.length }, (_, at) => ({
    position: block.position + at,
    id: null,
    text: "",
    status: "mask",
    confidence: 0,
    changes: 0,
    event: null,
    role: "text",
    block: index,
  }));
}

function holds(block, position) {
  return block.position <= position && position < block.position + block.length;
}

function ratio(gain, cost) {
  return cost > 0 ? gain / cost : 0;
}

function sum(numbers) {
  return numbers.reduce((total, each) => total + each, 0);
}

function count(items, isCounted) {
  return items.filter(isCounted).length;
}
