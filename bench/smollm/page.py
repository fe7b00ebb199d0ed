"""docs/results/pretrained.md: what the stages of bench/pretrained.py have given so far."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmax.benchmark.run import hardware
from dmax.evaluation.sweep import Curve
from dmax.files import write_atomically
from smollm.measure import AUTOREGRESSIVE, slug
from smollm.size import CPU, GPU, Size

Record = Mapping[str, Any]
TASK = """\
The task is `short_word_problems`: two steps with numbers up to 20, each worked out in a sentence.
The second step needs the first one's result, and every sentence is put together from several
choices, so tokens that are decided together have to fit."""
METHOD = """\
  The base model starts from there. It keeps the original's reading: a token is predicted at the
  position before it (`shift: true`). Blocks have {block_length} tokens.
- **Base, DMax and both controls** are the recipes `recipes/pretrained_*.yaml`{changes}. DMax and
  the controls start from the base and learn the base's own answers. Own against random tokens after
  fewer steps, over several seeds, is {study}.
- **The judge** is a measure that needs no answers: the cross-entropy that the autoregressive
  original, after stage `ar`, gives to what a model wrote. Tokens that were decided together and do
  not fit cost it nats. It is not always right itself (first row), and charges for sums that it does
  not believe, so only large differences mean something.

`{command}` makes all of it, goes on where it stopped, and writes this page."""


@dataclass(frozen=True, slots=True)
class Words:
    """What the page of a size says that the other one does not.

    Attributes:
        introduction: its title, and what becomes of the original.
        start: what is trained, and from where.
        changes: to the recipes.
        study: where own and random tokens are compared.
        failed: its last section.
    """

    introduction: str
    start: str
    changes: str
    study: str
    failed: str = ""


WORDS = {
    CPU.name: Words(
        introduction=f"""\
# A real pretrained model

SmolLM2-135M-Instruct (Llama architecture, 30 layers, Apache-2.0) is a language model that was
trained on two trillion tokens of text. Here it becomes a block-diffusion model, and then DMax, on
one thread of a CPU. {TASK}

`python bench/pretrained.py --gpu` does the same on a GPU with the whole vocabulary, blocks of 32
and many more tokens. Of that, only the stages `convert` and half of `ar` have been run, on an H200.
""",
        start="""\
- **The whole network is trained**, all 30 layers. Only its vocabulary is cut, from 49,152 tokens
  to the {vocabulary} that the task needs, and every number is one token, whose row starts as a mix
  of the rows of its digits.
- **The original learns the task first** (stage `ar`), as the autoregressive model that it is, since
  the new tokens mean nothing to it.""",
        changes="",
        study="[a study of its own](noise_pretrained.md)",
        failed="""\
## What failed

- **SPD without OPUT does not collapse** on this base, as it does in the paper and on the bundled
  model: at threshold 0.5 it solves as many as DMax, and OPUT buys tokens per forward there, 2.8 in
  place of 1.9. At 0.95 masks alone buy more than OPUT.
- **OPUT pays only when it has been long enough.** After 80 steps on 320 answers DMax solved 181,
  167 and 138 of 200 at thresholds 0.95, 0.5 and 0.3 (TPF 1.07, 2.54, 2.79), and masks alone 180,
  167 and 132 (1.47, 3.08, 3.41): no reason for OPUT. After twice as many steps and answers, the
  table above, it has gained at 0.3 and nowhere else. There it leads masks alone by 13.5 points
  (+6.3 to +20.6).
- **Random tokens do nearly as well**: 170/200 at 0.3, with more tokens per forward. DMax leads
  by 5.5 points there (-1.0 to +12.0), within noise. All of this is one seed.
- **The last three stages do not get nearer to the task's own solutions.** They learn the base's
  answers, and on held-out answers of the base their losses fall. On solutions to the same problems,
  which are worded otherwise, the losses of the same models rose: OPUT's from 1.652 to 1.665 between
  steps 40 and 160, that of masks alone from 1.345 to 1.386.
- **Signs are dropped**, such as the line break before `#### N`, and the strict score counts that as
  wrong: 10 of 22 wrong answers of DMax at 0.95, 19 of 36 at 0.5 and 6 of 19 at 0.3 end with the
  right number.
- **Digits.** A first trial, with the published tokens for digits, no stage `ar`, and the 4 to 8
  steps of `word_problems`, reached a cross-entropy of 0.52 (mask ratio 0.25) and 1.27 (0.75) on
  held-out problems after 274,000 tokens and 50 minutes, and solved 0 of 24 at threshold 0.95.
- **Two or three steps, in batches of 16.** After 640 problems in stage `ar` the original still gave
  0.81 nats to a number of 24 held-out solutions. With two steps and batches of 8 it was 0.54 after
  as many problems (of 32 solutions).
""",
    ),
    GPU.name: Words(
        introduction=f"""\
# A real pretrained model, on a GPU

SmolLM2-135M-Instruct as it was published becomes a block-diffusion model, and then DMax. {TASK}
This is [what two cores have done](pretrained.md), with the whole vocabulary, blocks of 32 and many
more tokens.""",
        start="""\
- **The whole network is trained**, with all {vocabulary} tokens, the mask token among them. Numbers
  are written digit by digit, as the original writes them.
- **The original learns the task first** (stage `ar`), as the autoregressive model that it is.""",
        changes=" with the changes of `bench/smollm/size.py`",
        study="a study of its own (`python bench/noise.py --study noise_pretrained_gpu --gpu`)",
    ),
}
NOT_YET = "not measured yet"


def write_page(size: Size, record: Record, curves: Sequence[Curve], path: Path) -> None:
    """Write the page of a record; points that are missing are named."""
    words = WORDS[size.name]
    parts = [
        filled(words.introduction),
        headline(record, curves),
        method(size, record),
        "## Results\n\n" + "\n".join(results(size, record, curves)),
        f"![Accuracy against TPF]({path.stem}.svg)" if record["points"] else "",
        "## Stages\n\n" + "\n".join(stages(record)),
        "## Learning curves\n\n" + "\n".join(learning(record)),
        words.failed,
    ]
    write_atomically(path, "\n\n".join(filter(None, map(str.strip, parts))) + "\n")


def filled(text: str) -> str:
    """Paragraphs of at most 100 columns."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(textwrap.fill(each, 100, break_on_hyphens=False) for each in paragraphs)


def method(size: Size, record: Record) -> str:
    """How the models were made, and the judge."""
    words = WORDS[size.name]
    start = words.start.format(vocabulary=f"{record['vocabulary']:,}")
    rest = METHOD.format(
        block_length=size.block_length,
        changes=words.changes,
        study=words.study,
        command=size.command,
    )
    return f"{start}\n{rest}"


def headline(record: Record, curves: Sequence[Curve]) -> str:
    """What was found, in a sentence for each model that is measured, and what is still to come."""
    measured = [
        (curve, [record["points"][slug(curve, value)] for value in curve.values])
        for curve in curves
        if all(slug(curve, value) in record["points"] for value in curve.values)
    ]
    found = [f"{curve.label}: {' to '.join(ends(points))}" for curve, points in measured]
    names = {curve.label for curve, _ in measured}
    missing = list(dict.fromkeys(curve.label for curve in curves if curve.label not in names))
    begin = "So far" if missing else "In short"
    sentences = [f"**{begin}:** {'; '.join(found) or 'nothing is measured'}."]
    if missing:
        sentences.append(f"**Still to come:** {'; '.join(missing)}.")
    return "\n".join(line for text in sentences for line in textwrap.wrap(text, 100))


def ends(points: Sequence[Record]) -> list[str]:
    """The first and the last point of a curve, in words."""
    chosen = points if len(points) == 1 else (points[0], points[-1])
    return [f"{point['correct']}/{point['total']} at TPF {point['tpf']:.2f}" for point in chosen]


def results(size: Size, record: Record, curves: Sequence[Curve]) -> Iterator[str]:
    """The table of points, in the order of the curves, and what it was measured with."""
    machine = record["environment"]
    computed = f"{hardware(machine)}, torch {machine['torch']}, {record['dtype']}"
    yield f"{record['limit']} unseen problems, seed {record['seed']}, greedy; {computed}."
    yield f"The judge gives {record['references']:.3f} nats a token to the task's own solutions,"
    yield "whose wording is drawn and not the likeliest.\n"
    yield "| model, decoding | threshold | correct | 95 % interval | TPF | judge, nats a token |"
    yield "|---|---|---|---|---|---|"
    for curve in curves:
        for value in curve.values:
            name = f"| {curve.label} | {'–' if curve.strategy == AUTOREGRESSIVE else value} "
            yield name + figures(record["points"].get(slug(curve, value)))
    missing = [
        Path(curve.model).name.removeprefix(f"{size.name}-")
        for curve in curves
        if any(slug(curve, value) not in record["points"] for value in curve.values)
    ]
    if missing:
        names = " ".join(dict.fromkeys(missing))
        yield f"\nWhat is missing is measured by `{size.command} {names} measure`."


def figures(point: Record | None) -> str:
    """The cells of a point behind its name."""
    if point is None:
        return f"| {NOT_YET} | | | |"
    low, high = (100 * end for end in point["interval"])
    count = f"{point['correct']}/{point['total']}"
    said = f"{point['cross_entropy']:.3f}" if "cross_entropy" in point else ""
    return f"| {count} | {low:.1f} to {high:.1f} | {point['tpf']:.2f} | {said} |"


def stages(record: Record) -> Iterator[str]:
    """What each stage has taken."""
    yield "Tokens are those of the problems and of the EOS behind them, without padding.\n"
    yield "| stage | steps | sequences | tokens | hours | held-out loss, first and last |"
    yield "|---|---|---|---|---|---|"
    for name, stage in record["stages"].items():
        if not stage["steps"]:
            yield f"| {name} | not run yet | | | | |"
            continue
        losses = held_out_losses(stage["log"])
        ends = f"{losses[0]:.3f}, {losses[-1]:.3f}" if losses else ""
        steps = f"{stage['steps']}{'' if stage['is_done'] else ', not finished'}"
        hours = f"{stage['seconds'] / 3600:.1f}" if stage["seconds"] else ""
        size = f"{stage['sequences']:,} | {stage['tokens']:,}"
        yield f"| {name} | {steps} | {size} | {hours} | {ends} |"
    yield f"\nHeld-out loss fell {where_it_fell(record)}."


def held_out_losses(log: Sequence[Mapping[str, float]]) -> list[float]:
    """Those of the evaluations of a stage, in their order."""
    return [entry["eval_loss"] for entry in log if "eval_loss" in entry]


def where_it_fell(record: Record) -> str:
    """In which of the stages that were evaluated twice the held-out loss is less at the end."""
    fell = {}
    for name, stage in record["stages"].items():
        losses = held_out_losses(stage["log"])
        if len(losses) > 1:
            fell[name] = losses[-1] < losses[0]
    if not fell:
        return "nowhere yet"
    if all(fell.values()):
        return "in every stage that has been run"
    others = ", ".join(name for name, has_fallen in fell.items() if not has_fallen)
    return f"in {sum(fell.values())} of {len(fell)} stages, not in {others}"


def learning(record: Record) -> Iterator[str]:
    """Held-out losses over the steps of each stage."""
    yield "Loss on 64 held-out problems after so many steps; each stage has its own objective."
    yield "DMax and both controls learn the base's answers, so their losses are on its answers to"
    yield "these problems.\n"
    for name, stage in record["stages"].items():
        points = [
            f"{entry['step']}: {entry['eval_loss']:.3f}"
            for entry in stage["log"]
            if "eval_loss" in entry
        ]
        if points:
            yield f"- **{name}**: {', '.join(points)}"
