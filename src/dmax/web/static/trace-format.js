/** What a trace must be for the views to show it. docs/trace.md describes all of it. */

const FORMAT = "dmax-trace";
const VERSION = 1;

const isText = (value) => typeof value === "string";
const isFlag = (value) => typeof value === "boolean";
const isNumber = (value) => typeof value === "number";
const isCount = (value) => Number.isSafeInteger(value) && value >= 0;
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const isProbability = (value) => isNumber(value) && value >= 0 && value <= 1;
const isKind = (value) => value === "provisional" || value === "committed";
const isMaybe = (check) => (value) => value === null || check(value);
const isList = (check) => (value) => Array.isArray(value) && value.every(check);

const PARAMS = { strategy: isText, max_new_tokens: isCount, ignore_eos: isFlag, options: isObject };
const HEADER = {
  version: isCount,
  model: isText,
  prompt_token_ids: isList(isCount),
  params: isObject,
  threshold: isMaybe(isNumber),
  stop_confidence: isMaybe(isNumber),
  eos_token_ids: isList(isCount),
  frames: Array.isArray,
  output: isObject,
};
const OUTPUT = { text: isText, token_ids: isList(isCount), seconds: isNumber };
const FRAME = {
  kind: isKind,
  position: isCount,
  step: isCount,
  num_forwards: isCount,
  seconds: isNumber,
  forced: isFlag,
  capped: isFlag,
};
const LISTS = {
  token_ids: isCount,
  texts: isText,
  masked: isFlag,
  confidence: isProbability,
  written: isFlag,
};
const isCandidate = (value) => {
  if (!Array.isArray(value) || value.length !== 3) return false;
  const [id, probability, text] = value;
  return isCount(id) && isProbability(probability) && isText(text);
};

/**
 * Why a value is no trace that can be shown, in one sentence; null if it is one.
 *
 * @param {unknown} trace
 * @returns {string | null}
 */
export function complaint(trace) {
  if (Array.isArray(trace)) return "It holds several traces; `dmax trace --open` shows those.";
  if (!isObject(trace) || trace.format !== FORMAT) return "It is no trace of dmax.";
  if (trace.version > VERSION) {
    return `It is a trace of version ${trace.version}, and this page reads up to ${VERSION}.`;
  }
  const wrong = missing(trace, HEADER, "")
    ?? missing(trace.params, PARAMS, "params.")
    ?? missing(trace.output, OUTPUT, "output.")
    ?? wrongFrame(trace.frames);
  return wrong === null ? null : `It is a damaged trace: \`${wrong}\` is wrong or missing.`;
}

function missing(object, checks, prefix) {
  const name = Object.keys(checks).find((each) => !checks[each](object[each]));
  return name === undefined ? null : `${prefix}${name}`;
}

/** What is wrong with one of the frames; blocks stand side by side, the first at position 0. */
function wrongFrame(frames) {
  const lengths = new Map();
  let forwards = 1;
  for (const [number, frame] of frames.entries()) {
    const where = `frames[${number}]`;
    if (!isObject(frame)) return where;
    const length = frame.token_ids?.length;
    const isRow = (check) => (value) => isList(check)(value) && value.length === length;
    const rows = Object.entries(LISTS).map(([name, check]) => [name, isRow(check)]);
    if (frame.candidates !== undefined) rows.push(["candidates", isRow(isList(isCandidate))]);
    const wrong = missing(frame, { ...FRAME, ...Object.fromEntries(rows) }, `${where}.`);
    if (wrong !== null) return wrong;
    if (frame.num_forwards < forwards) return `${where}.num_forwards`;
    forwards = frame.num_forwards;
    if ((lengths.get(frame.position) ?? length) !== length) return `${where}.token_ids`;
    lengths.set(frame.position, length);
  }
  let end = 0;
  for (const position of [...lengths.keys()].sort((one, other) => one - other)) {
    if (position !== end) return "frames";
    end += lengths.get(position);
  }
  return null;
}
