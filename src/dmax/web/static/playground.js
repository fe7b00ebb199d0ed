/** The playground: a prompt, one or two panes that decode it, and one player that shows them. */

import { ServerError, listModels, streamChat } from "dmax/client.js";
import { element } from "dmax/dom.js";
import { EXAMPLES } from "dmax/examples.js";
import { openingRace } from "dmax/models.js";
import { Pane } from "dmax/pane.js";
import { Player } from "dmax/player.js";
import { attachThemeSwitch } from "dmax/theme.js";

const KEY = "dmax-key"; // in the session's storage: gone with the tab
const RETRY = 1000; // milliseconds, while the models are being loaded

const form = document.getElementById("form");
const fields = form.elements;
const problem = document.getElementById("problem");
const verdict = document.getElementById("verdict");
const player = new Player(document.getElementById("player"), { onMove: show });
const callbacks = { onOpen: startOver, onPick: (moment) => player.moveTo(moment) };
const left = new Pane("Left", callbacks);
const right = new Pane("Right", callbacks);

/** Ends the runs in progress; null while there are none. @type {AbortController | null} */
let controller = null;

/** The call that `growSoon` has asked for. @type {number | null} */
let pending = null;

/** Whether the panes offer the models of the server. */
let isConnected = false;

/** The panes that take part. */
function racers() {
  return fields.race.checked ? [left, right] : [right];
}

/** Show every pane after so many forwards. */
function show(moment) {
  for (const pane of racers()) {
    pane.show(moment);
  }
  const runs = racers().map((pane) => pane.run);
  const isOver = runs.every((run) => run?.isFinished && moment >= run.numMoments - 1);
  verdict.textContent = isOver ? result(runs) : "";
}

/** The end of a race in a sentence. */
function result(runs) {
  const each = runs.map((run) => {
    const { model, params } = run.header;
    const { forwards, tpf } = run.at().counters;
    return `${model} by ${params.strategy}: ${forwards} forwards, TPF ${tpf.toFixed(1)}`;
  });
  return `Finished. ${each.join("; ")}.`;
}

/** Tell the player how much there is to play. */
function grow() {
  const lengths = racers().map((pane) => pane.run?.numMoments ?? 1);
  player.setLength(Math.max(...lengths), { isGrowing: controller !== null });
}

/** The same before the next picture: a fast model takes many steps between two. */
function growSoon() {
  pending ??= requestAnimationFrame(() => {
    pending = null;
    grow();
  });
}

/** Play what the panes hold from its beginning; without slow motion, show the newest of it. */
function startOver() {
  player.pause();
  grow();
  player.moveTo(fields.slow.checked ? 0 : Infinity);
  if (fields.slow.checked) {
    player.play();
  }
}

/** Run the prompt in every pane. */
async function run() {
  controller = new AbortController();
  setRunning(true);
  racers().forEach((pane) => pane.begin());
  startOver();
  await Promise.all(racers().map((pane) => follow(pane, controller.signal)));
  controller = null;
  setRunning(false);
  grow();
  show(player.moment);
}

/** Decode in a pane until the answer is finished, stopped or lost. */
async function follow(pane, signal) {
  try {
    for await (const chunk of streamChat(requestOf(pane), fields.key.value, signal)) {
      if (chunk.dmax) {
        pane.receive(chunk.dmax);
        growSoon();
      }
    }
  } catch (error) {
    pane.fail(signal.aborted ? "Stopped." : explain(error));
  }
  pane.end();
}

/** An error as a sentence; whoever mends the page finds the rest in the console. */
function explain(error) {
  if (!(error instanceof ServerError)) {
    console.error(error);
    return `The page cannot show this: ${error.message}`;
  }
  if (error.wantsKey) {
    document.getElementById("key-field").hidden = false;
    fields.key.focus();
  }
  return error.message;
}

/** The body of a request with the settings of a pane. */
function requestOf(pane) {
  const { model, strategy, threshold } = pane.settings;
  const seed = fields.seed.value === "" ? {} : { seed: fields.seed.valueAsNumber };
  return {
    model,
    messages: [{ role: "user", content: fields.prompt.value }],
    max_tokens: fields.max_tokens.valueAsNumber,
    temperature: fields.temperature.valueAsNumber,
    ...seed,
    stream: true,
    dmax: { strategy, stream: "provisional", ...(threshold === null ? {} : { threshold }) },
  };
}

function setRunning(isRunning) {
  fields.run.disabled = isRunning;
  fields.stop.disabled = !isRunning;
  fields.race.disabled = isRunning;
}

/** Ask the server for its models, and offer them. */
async function connect() {
  fields.run.disabled = true;
  problem.hidden = true;
  try {
    const models = await listModels(fields.key.value);
    const [first, second] = openingRace(models);
    left.offer(models, first);
    right.offer(models, second);
    isConnected = true;
  } catch (error) {
    problem.textContent = explain(error);
    problem.hidden = false;
    if (error.isLoading) {
      setTimeout(connect, RETRY);
    }
  }
  fields.run.disabled = false;
}

/** Run, once the server has said which models there are. */
async function submit(event) {
  event.preventDefault();
  if (!isConnected) {
    await connect();
  }
  if (isConnected && controller === null) {
    await run();
  }
}

/** Offer prompts to choose from, and begin with the first. */
function offerExamples() {
  for (const { name, prompt } of EXAMPLES) {
    const button = element("button", { class: "button", type: "button" }, name);
    button.addEventListener("click", () => {
      fields.prompt.value = prompt;
    });
    document.getElementById("examples").append(button);
  }
  fields.prompt.value = EXAMPLES[0].prompt;
}

document.getElementById("panes").append(left.element, right.element);
form.addEventListener("submit", submit);
fields.stop.addEventListener("click", () => controller?.abort());
fields.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    form.requestSubmit();
  }
});
fields.race.addEventListener("change", () => {
  left.element.hidden = !fields.race.checked;
  grow();
  show(player.moment);
});
fields.key.value = sessionStorage.getItem(KEY) ?? "";
fields.key.addEventListener("change", () => {
  sessionStorage.setItem(KEY, fields.key.value);
  if (!isConnected) {
    connect();
  }
});
attachThemeSwitch(document.getElementById("theme"));
player.listen(document);
offerExamples();
connect();
