/** A run as a file: the JSON of a trace, which `dmax trace --open` reads as well. */

import { element } from "dmax/dom.js";
import { Run } from "dmax/run.js";

const MAX_SIZE = 256 * 2 ** 20; // bytes; a tab does not live through much more

/**
 * Have the browser save a run.
 *
 * @param {Run} run
 * @param {string} name of the file.
 */
export function saveRun(run, name) {
  const blob = new Blob([JSON.stringify(run.toTrace())], { type: "application/json" });
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href)); // once the click has been heeded
}

/**
 * The run that a file holds.
 *
 * @param {File} file
 * @returns {Promise<Run>}
 * @throws {Error} one sentence: what is wrong with the file.
 */
export async function readRun(file) {
  if (file.size > MAX_SIZE) {
    throw new Error("It is larger than 256 MB.");
  }
  return Run.fromTrace(parse(await file.text()));
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Error("It is not JSON.");
  }
}
