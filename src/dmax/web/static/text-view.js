/** The text of a run at a moment: masks, drafts in shades of confidence, what was revised. */

import { element, setText } from "dmax/dom.js";
import { counted, percent } from "dmax/numbers.js";
import { MASK_SIGN } from "dmax/run.js";

const STATUS = { mask: "masked", provisional: "draft", revised: "revised", settled: "settled" };
/** What a forward did to a position, in words. */
export const EVENTS = {
  promoted: "written",
  revised: "revised",
  kept: "kept",
  remasked: "masked again",
  waiting: "still masked",
};
const MOST_CANDIDATES = 4; // shown of a position's step

/**
 * A list of tokens. Hovering over one shows its history, and so do the arrow keys once the list has
 * the focus. Escape hides it.
 */
export class TextView {
  #onSelect;
  #list;
  #card;
  #id;
  #tokens = [];
  #states = []; // what each of them shows, to touch only what has changed
  #active = null; // position whose history is shown
  #isPinned = false; // a press keeps it while the pointer goes elsewhere
  #run = null;
  #moment = 0;

  /**
   * @param {HTMLElement} container
   * @param {{label?: string, onSelect?: (position: number | null) => void}} options
   */
  constructor(container, { label = "the text, token by token", onSelect = () => {} } = {}) {
    this.#onSelect = onSelect;
    const list = { class: "tokens", role: "listbox", tabindex: 0, "aria-label": label };
    this.#list = element("div", list);
    this.#card = element("div", { class: "history", role: "tooltip", hidden: true });
    container.classList.add("text-view");
    container.append(this.#list, this.#card);
    this.#id = `tokens-${(counter += 1)}`;
    this.#listen(container);
  }

  /** Show a run at a moment; only what has changed is touched. */
  show(run, moment) {
    this.#run = run;
    this.#moment = moment;
    const { tokens } = run.at(moment);
    while (this.#tokens.length > tokens.length) this.#tokens.pop().remove();
    this.#states.length = this.#tokens.length;
    tokens.forEach((token, at) => this.#draw(token, at));
    if (this.#active !== null) this.select(this.#active);
  }

  /** Show the history of a position; null hides it. */
  select(position) {
    const isShown = position !== null && position < this.#tokens.length;
    this.#tokens[this.#active]?.classList.remove("active");
    this.#tokens[this.#active]?.removeAttribute("aria-selected");
    this.#active = isShown ? position : null;
    this.#card.hidden = !isShown;
    this.#isPinned &&= isShown;
    this.#card.classList.toggle("pinned", this.#isPinned);
    if (!isShown) {
      this.#list.removeAttribute("aria-activedescendant");
      return;
    }
    const token = this.#tokens[position];
    token.classList.add("active");
    token.setAttribute("aria-selected", "true");
    this.#list.setAttribute("aria-activedescendant", token.id);
    this.#card.replaceChildren(historyOf(this.#run, position, this.#moment));
    this.#place(token);
  }

  #draw(token, at) {
    if (!this.#tokens[at]) {
      const option = { class: "token", role: "option", id: `${this.#id}-${at}` };
      this.#tokens[at] = element("span", option);
      this.#tokens[at].dataset.position = token.position;
      this.#list.append(this.#tokens[at]);
    }
    const node = this.#tokens[at];
    const state = JSON.stringify(token);
    if (this.#states[at] === state) return;
    this.#states[at] = state;
    setText(node, shown(token));
    node.dataset.status = token.status;
    node.dataset.role = token.role;
    node.dataset.event = token.event ?? "";
    node.toggleAttribute("data-changed", token.changes > 0);
    node.style.setProperty("--confidence", token.confidence.toFixed(3));
    node.setAttribute("aria-label", inWords(token));
  }

  #listen(container) {
    this.#list.addEventListener("pointerover", ({ target }) => {
      if (!this.#isPinned) this.#pick(positionOf(target));
    });
    this.#list.addEventListener("click", ({ target }) => {
      const position = positionOf(target) ?? null;
      const isUnpinned = this.#isPinned && position === this.#active;
      this.#isPinned = position !== null && !isUnpinned;
      this.#pick(isUnpinned ? null : position);
    });
    container.addEventListener("pointerleave", () => {
      if (!this.#isPinned) this.#pick(null);
    });
    this.#list.addEventListener("blur", () => {
      if (!this.#card.matches(":hover")) this.#pick(null); // a press on a pinned card leaves it
    });
    this.#list.addEventListener("keydown", (event) => {
      const next = this.#target(event.key);
      if (next === undefined) return;
      event.preventDefault();
      this.#isPinned = next !== null;
      this.#pick(next);
      this.#tokens[next]?.scrollIntoView({ block: "nearest" });
    });
  }

  /** The position that a key leads to; undefined for other keys. */
  #target(key) {
    const last = this.#tokens.length - 1;
    const now = this.#active ?? -1;
    switch (key) {
      case "ArrowRight":
        return Math.min(now + 1, last);
      case "ArrowLeft":
        return Math.max(now - 1, 0);
      case "ArrowDown":
        return this.#nextLine(now, 1);
      case "ArrowUp":
        return this.#nextLine(now, -1);
      case "Home":
        return 0;
      case "End":
        return last;
      case "Escape":
        return this.#active === null ? undefined : null;
      default:
        return undefined;
    }
  }

  /** The nearest token in the line below (1) or above (-1). */
  #nextLine(now, direction) {
    const from = this.#tokens[now]?.getBoundingClientRect();
    if (!from) return 0;
    const beyond = this.#tokens
      .map((node, position) => ({ position, box: node.getClientRects()[0] ?? from }))
      .filter(({ box }) => (box.top - from.top) * direction > from.height / 2);
    const reach = Math.min(...beyond.map(({ box }) => Math.abs(box.top - from.top)));
    const line = beyond.filter(({ box }) => Math.abs(box.top - from.top) < reach + from.height / 2);
    const distance = ({ box }) => Math.abs(box.left - from.left);
    line.sort((one, other) => distance(one) - distance(other));
    return line[0]?.position ?? now;
  }

  #pick(position) {
    if (position === undefined) return;
    this.select(position);
    this.#onSelect(this.#active);
  }

  /** Below the token, or above it where the window ends, and never beyond the sides. */
  #place(token) {
    const frame = this.#card.parentElement.getBoundingClientRect();
    const box = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.#card;
    const left = Math.max(0, Math.min(box.left - frame.left, frame.width - width));
    const isRoom = box.bottom + height + 8 < innerHeight || box.top < height + 8;
    const top = isRoom ? box.bottom - frame.top + 4 : box.top - frame.top - height - 4;
    this.#card.style.setProperty("left", `${left}px`);
    this.#card.style.setProperty("top", `${top}px`);
  }
}

let counter = 0;

/** What stands for a token: its text, with signs where a text alone would show nothing. */
export function shown({ text, id, status, role, isEos }) {
  if (status === "mask") return MASK_SIGN;
  if (role === "end") return "⟨end⟩";
  if (isEos) return "⟨eos⟩";
  if (text === "") return `⟨${id}⟩`;
  return status === "settled" ? text : text.replaceAll("\n", "↵\n");
}

function positionOf(target) {
  const { position } = target.dataset ?? {};
  return position === undefined ? undefined : Number(position);
}

function inWords(token) {
  const parts = [`position ${token.position}`, quoted(token), STATUS[token.status]];
  if (token.status !== "settled") parts.push(`${percent(token.confidence)} sure`);
  if (token.changes > 0) parts.push(counted(token.changes, "change"));
  return parts.filter(Boolean).join(", ");
}

function quoted({ status, text, id }) {
  if (status === "mask") return "";
  return text === "" ? `token ${id}` : `“${text}”`;
}

function historyOf(run, position, moment) {
  const rows = run.history(position, moment).map((entry) => {
    const row = element(
      "tr",
      { "data-event": entry.event },
      element("td", { class: "number" }, String(entry.forward)),
      element("td", { class: "token-text" }, entry.id === null ? MASK_SIGN : visible(entry)),
      element("td", { class: "number" }, percent(entry.confidence)),
      element("td", {}, EVENTS[entry.event], candidatesOf(entry)),
    );
    return row;
  });
  const head = (name) => element("th", { scope: "col" }, name);
  const names = ["forward", "token", "sure", "what happened"].map(head);
  return element(
    "table",
    {},
    element("caption", {}, `Position ${position}`),
    element("thead", {}, element("tr", {}, ...names)),
    element("tbody", {}, ...rows),
  );
}

function visible({ text, id }) {
  return text === "" ? `⟨${id}⟩` : text.replaceAll("\n", "↵").replaceAll(" ", "␣");
}

/** The tokens that the next input blends, where there are several. */
function candidatesOf({ candidates }) {
  if (candidates.length < 2) return "";
  const best = candidates.slice(0, MOST_CANDIDATES);
  const texts = best.map((each) => `${visible(each)} ${percent(each.probability)}`);
  return element("span", { class: "quiet" }, ` (${texts.join(", ")})`);
}
