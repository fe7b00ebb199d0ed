/** The trace page: one or more runs side by side, on one timeline. The page brings their data. */

import { element } from "dmax/dom.js";
import { Player } from "dmax/player.js";
import { Run } from "dmax/run.js";
import { saveRun } from "dmax/run-file.js";
import { RunView } from "dmax/run-view.js";
import { attachThemeSwitch } from "dmax/theme.js";

const traces = JSON.parse(document.getElementById("dmax-traces").textContent);
const runs = traces.map((trace) => Run.fromTrace(trace));

const themeSwitch = element("button", { class: "button", type: "button" });
const header = element("header", {}, element("h1", {}, "dmax trace"), themeSwitch);
const timeline = element("div", { class: "panel timeline" });
const panes = element("div", { class: "panes" });
const app = document.getElementById("app");
app.append(header, promptOf(runs[0]), timeline, panes);
attachThemeSwitch(themeSwitch);

const player = new Player(timeline, { onMove: showAll });
const views = runs.map((run) => {
  const pane = element("article", { class: "panel" });
  const content = element("div");
  pane.append(content, settingsOf(run));
  panes.append(pane);
  return new RunView(content, { title: nameOf(run), onMove: (moment) => player.moveTo(moment) });
});
player.setLength(Math.max(...runs.map((run) => run.numMoments)));
player.listen(document);
showAll(player.moment);

function showAll(moment) {
  views.forEach((view, at) => view.show(runs[at], Math.min(moment, runs[at].numMoments - 1)));
}

function nameOf({ header: { model, params, threshold } }) {
  const at = threshold === null ? "" : `, threshold ${threshold}`;
  return `${model ?? "a model"}, ${params.strategy}${at}`;
}

function promptOf({ header: { prompt } }) {
  const summary = element("summary", {}, "Prompt");
  const details = element("details", { class: "prompt", open: true }, summary);
  const messages = typeof prompt === "string" ? [{ role: "", content: prompt }] : (prompt ?? []);
  for (const { role, content } of messages) {
    const text = typeof content === "string" ? content : JSON.stringify(content);
    const speaker = role ? element("strong", {}, `${role}: `) : "";
    details.append(element("p", { tabindex: 0 }, speaker, text));
  }
  if (messages.length === 0) details.append(element("p", { class: "quiet" }, "token ids only"));
  return details;
}

/** Everything that was set, and the trace as a file. */
function settingsOf(run) {
  const { prompt, prompt_token_ids: ids, ...settings } = run.header;
  const save = element("button", { class: "button", type: "button" }, "Save the trace as JSON");
  save.addEventListener("click", () => saveRun(run, "trace.json"));
  return element(
    "details",
    { class: "settings" },
    element("summary", {}, "Settings and raw trace"),
    element("p", {}, `The prompt has ${ids.length} tokens.`),
    element("pre", { tabindex: 0 }, JSON.stringify(settings, null, 2)),
    save,
  );
}
