"""`dmax demo`: the bundled models on unseen problems, side by side, and one decode watched step by step."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dmax.environment import environment
from dmax.evaluation.run import Summary, evaluate
from dmax.llm import LLM
from dmax.outputs import StreamEvent, as_record
from dmax.params import DecodingParams
from dmax.tasks import get_task

NUM_PROBLEMS = 32
SEED = 2026  # held out: none of its problems is in the training split, whatever the training seed
TEXT_COLUMNS = ("setting", "strategy")
STYLES = {"masked": "dim", "provisional": "yellow", "revised": "bold red", "settled": "green"}


@dataclass(frozen=True, slots=True)
class Setting:
    """A row of the table."""

    label: str
    model: str
    strategy: str
    threshold: float
    soft_inputs: bool = True

    @property
    def params(self) -> DecodingParams:
        """Decoding parameters of the row, with room for the longest answer."""
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
    """Print the table, the watched decode and the environment; with `as_json` the numbers alone, as one object."""
    console = Console(stderr=as_json)
    task = get_task("word_problems")
    models = {name: LLM(name, max_batch_size=NUM_PROBLEMS) for name in ("tiny-base", "tiny-dmax")}
    console.print(f"{NUM_PROBLEMS} unseen word problems, {_machine()}\n", highlight=False)
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
    if as_json:
        rows = [
            {"label": setting.label, **as_record(s)}
            for setting, s in zip(SETTINGS, summaries, strict=True)
        ]
        sys.stdout.write(json.dumps({"rows": rows}) + "\n")
        return
    console.print(_table(summaries))
    console.print(_legend())
    example = task.examples(1, SEED + 1)[0]
    console.print(Text(example.prompt, style="italic"))
    began = time.perf_counter()
    for line in watch(models[SETTINGS[-1].model], example.prompt, SETTINGS[-1].params):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        f"{time.perf_counter() - began:.2f} s at batch 1; expected answer {example.answer}",
        style="dim",
    )


def _machine() -> str:
    record = environment()
    return f"{record['cpu']}, {record['threads']} threads, torch {record['torch']}"


def _table(summaries: list[Summary]) -> Table:
    table = Table(title="exact final answer, block length 32")
    for column in ("setting", "strategy", "threshold", "correct", "TPF", "tokens/s"):
        table.add_column(
            column, justify="left" if column in TEXT_COLUMNS else "right", no_wrap=True
        )
    for setting, summary in zip(SETTINGS, summaries, strict=True):
        table.add_row(
            setting.label,
            setting.method,
            f"{setting.threshold:g}",
            f"{summary.correct}/{summary.total}",
            f"{summary.tpf:.2f}",
            f"{summary.tokens_per_second:.0f}",
        )
    return table


def _legend() -> Text:
    legend = Text("\nDMax, one forward a line: ")
    for name, style in STYLES.items():
        legend.append(f" {name} ", style=style)
    return legend


def watch(llm: LLM, prompt: str, params: DecodingParams) -> Iterator[Text]:
    """One coloured line per forward, and a last one with the cost."""
    previous: StreamEvent | None = None
    for event in llm.stream(prompt, params):
        if event.output is not None:
            output = event.output
            tpf = f"TPF {output.tokens_per_forward:.2f}"
            yield Text(
                f"\n{len(output.token_ids)} tokens, {output.num_forwards} forwards, {tpf}",
                style="bold",
            )
            return
        same_block = previous is not None and previous.position == event.position
        yield _line(llm, event, previous if same_block else None)
        previous = event


def _line(llm: LLM, event: StreamEvent, before: StreamEvent | None) -> Text:
    line = Text(f"{event.step:>3} ")
    for index, (token, masked) in enumerate(zip(event.token_ids, event.masked, strict=True)):
        if token in llm.checkpoint.special_ids.eos_token_ids:
            break
        was = before.token_ids[index] if before is not None and not before.masked[index] else token
        state = "masked" if masked else "revised" if was != token else "provisional"
        if event.kind == "committed" and state == "provisional":
            state = "settled"
        text = " ·" if masked or llm.tokenizer is None else llm.tokenizer.decode([token])
        line.append(str(text).replace("\n", "⏎"), style=STYLES[state])
    return line
