"""`dmax demo`: the bundled models side by side, and one answer watched forward by forward."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dmax.environment import environment
from dmax.evaluation.run import Summary, evaluate
from dmax.evaluation.statistics import pareto
from dmax.llm import LLM
from dmax.outputs import StreamEvent, as_record
from dmax.params import DecodingParams
from dmax.tasks import get_task

NUM_PROBLEMS = 32
SEED = 2026  # whatever the seed, test problems are never in the training split
TEXT_COLUMNS = ("setting", "strategy")
STYLES = {
    "masked": "dim",
    "provisional": "bright_blue",
    "revised": "bold dark_orange",
    "final": "green",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """A row of the table.

    Attributes:
        label: its name.
        model: bundled model.
        strategy: how it is decoded.
        threshold: of the strategy.
        soft_inputs: whether SPD feeds decoded positions back as blends.
    """

    label: str
    model: str
    strategy: str
    threshold: float
    soft_inputs: bool = True

    @property
    def params(self) -> DecodingParams:
        """Decoding parameters, with room for the longest answer."""
        options = {} if self.soft_inputs else {"soft_inputs": False}
        return DecodingParams(self.strategy, self.threshold, options=options)

    @property
    def method(self) -> str:
        """The strategy, and for SPD how decoded positions are fed back."""
        if self.strategy != "spd":
            return self.strategy
        return "spd, soft" if self.soft_inputs else "spd, hard"


SETTINGS = (
    Setting("base, careful", "tiny-base", "threshold", 0.95),
    Setting("base, pushed", "tiny-base", "threshold", 0.3),
    Setting("base, SPD", "tiny-base", "spd", 0.5),
    Setting("DMax, hard inputs", "tiny-dmax", "spd", 0.7, soft_inputs=False),
    Setting("DMax", "tiny-dmax", "spd", 0.7),
    Setting("DMax, pushed", "tiny-dmax", "spd", 0.5),
)


def run_demo(*, as_json: bool = False) -> None:
    """Print the machine, the table and the watched answer.

    With `as_json`, stdout gets only the figures of the table, as one object.
    """
    console = Console(stderr=as_json)
    models = {name: LLM(name, max_batch_size=NUM_PROBLEMS) for name in ("tiny-base", "tiny-dmax")}
    console.print(f"{NUM_PROBLEMS} unseen word problems, {_machine()}\n", highlight=False)
    summaries = _measure(models, console)
    if as_json:
        rows = [
            {"label": setting.label, **as_record(summary)}
            for setting, summary in zip(SETTINGS, summaries, strict=True)
        ]
        sys.stdout.write(json.dumps({"rows": rows}) + "\n")
        return
    console.print(_comparison(summaries))
    watched = SETTINGS[-1]
    _watch_one(models[watched.model], watched.params, console)


def _machine() -> str:
    record = environment()
    return f"{record['cpu']}, {record['threads']} threads, torch {record['torch']}"


def _measure(models: dict[str, LLM], console: Console) -> list[Summary]:
    """Summaries of all settings, in their order."""
    task = get_task("word_problems")
    summaries = []
    for setting in SETTINGS:
        with console.status(f"decoding: {setting.label}"):
            summary, _ = evaluate(
                models[setting.model],
                task,
                setting.params,
                limit=NUM_PROBLEMS,
                seed=SEED,
                model_name=setting.model,
            )
        summaries.append(summary)
    return summaries


def _comparison(summaries: Sequence[Summary]) -> Table:
    table = Table(
        title="exact final answer, block length 32",
        caption="bold: no other setting is as good in both correct answers and TPF",
    )
    for column in ("setting", "strategy", "threshold", "correct", "TPF", "tokens/s"):
        is_text = column in TEXT_COLUMNS
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    best = _best(summaries)
    for index, (setting, summary) in enumerate(zip(SETTINGS, summaries, strict=True)):
        table.add_row(
            setting.label,
            setting.method,
            f"{setting.threshold:g}",
            f"{summary.correct}/{summary.total}",
            f"{summary.tpf:.2f}",
            f"{summary.tokens_per_second:.0f}",
            style="bold" if index in best else None,
        )
    return table


def _best(summaries: Sequence[Summary]) -> set[int]:
    """Which rows no other row beats in accuracy and TPF at once."""
    points = [
        {"index": index, "accuracy": summary.accuracy, "tpf": summary.tpf}
        for index, summary in enumerate(summaries)
    ]
    return {point["index"] for point in pareto(points)}


def _watch_one(llm: LLM, params: DecodingParams, console: Console) -> None:
    """Print a problem and how its answer is written."""
    (example,) = get_task("word_problems").examples(1, SEED + 1)
    console.print(_legend())
    console.print(Text(example.prompt, style="italic"))
    began = time.perf_counter()
    for line in watch(llm, example.prompt, params):
        console.print(line, highlight=False, soft_wrap=True)
    seconds = time.perf_counter() - began
    closing = f"{seconds:.2f} s at batch 1; expected answer {example.answer}"
    console.print(closing, style="dim", highlight=False)


def _legend() -> Text:
    legend = Text("\nDMax, one forward per line: ")
    for state, style in STYLES.items():
        legend.append(f" {state} ", style=style)
    return legend


def watch(llm: LLM, prompt: str, params: DecodingParams) -> Iterator[Text]:
    """One coloured line per forward, and a last one with the cost."""
    previous: StreamEvent | None = None
    for event in llm.stream(prompt, params):
        if event.output is not None:
            output = event.output
            cost = f"{len(output.token_ids)} tokens, {output.num_forwards} forwards"
            yield Text(f"\n{cost}, TPF {output.tokens_per_forward:.2f}", style="bold")
            return
        is_same_block = previous is not None and previous.position == event.position
        yield _block_line(llm, event, previous if is_same_block else None)
        previous = event


def _block_line(llm: LLM, event: StreamEvent, before: StreamEvent | None) -> Text:
    """The block up to its EOS, each token in the colour of its state."""
    assert llm.tokenizer is not None, "the bundled models have one"
    line = Text(f"{event.step:>3} ")
    for index, token in enumerate(event.token_ids):
        if token in llm.checkpoint.special_ids.eos_token_ids:
            break
        state = _state(event, before, index)
        text = " ·" if state == "masked" else llm.tokenizer.decode([token])
        line.append(str(text).replace("\n", "⏎"), style=STYLES[state])
    return line


def _state(event: StreamEvent, before: StreamEvent | None, index: int) -> str:
    """What the forward made of a position; `before` is the block one forward earlier."""
    if event.masked[index]:
        return "masked"
    was_masked = before is None or before.masked[index]
    has_changed = before is not None and before.token_ids[index] != event.token_ids[index]
    if has_changed and not was_masked:
        return "revised"
    return "final" if event.kind == "committed" else "provisional"
