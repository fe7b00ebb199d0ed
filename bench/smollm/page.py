"""docs/results/pretrained.md: what the stages of bench/pretrained.py have given so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prose import bullet, filled, table
from shares import FAILS, HOLDS, Share, collapses, difference, gap, share_of, verdict

from dmax.benchmark.run import machines
from dmax.evaluation.sweep import Curve
from dmax.files import write_atomically
from smollm.measure import AUTOREGRESSIVE, slug
from smollm.size import CPU, GPU, Size

Record = Mapping[str, Any]
Shares = Mapping[float, Share]  # what a model solves, by threshold, the most careful one first
BASE = "base, threshold"
BASE_SPD = "base, SPD"
DMAX = "DMax, SPD"
LONGER = "original, as long as the base"
CONTROLS = {"masks only": "masks only, SPD", "random tokens": "random tokens, SPD"}
LOG = "../log.md#2026-11-28-what-failed-on-a-pretrained-base-negative"
TASK = """\
The task is `short_word_problems`: two steps with numbers up to 20, each worked out in a sentence.
The second step needs the first one's result, and every sentence is put together from several
choices, so tokens that are decided together have to fit."""
METHOD = """\
  The base model starts from there. It keeps the original's reading: a token is predicted at the
  position before it (`shift: true`). Blocks have {block_length} tokens.
- **Base, DMax and both controls** are the recipes `recipes/pretrained_*.yaml`{changes}. DMax and
  the controls start from the base and learn the base's own answers. DMax learns with tokens of its
  own as noise (on-policy), the controls with masks only or with random tokens. What this noise does
  after fewer steps, over several seeds, is in {study}.
- **The judge** is a measure that needs no answers: the cross-entropy that the autoregressive
  original, after stage `ar`, gives to what a model wrote. Tokens that were decided together and do
  not fit cost it nats. It is not always right itself (first row), and scores a sum badly if it
  thinks the sum is wrong, so only large differences mean something.

`{command}` makes all of it, goes on where it stopped, and writes this page."""


@dataclass(frozen=True, slots=True)
class Words:
    """What the page of a size says that the other one does not.

    Attributes:
        introduction: its title, and what becomes of the original; `{on_gpu}` stands for where the
            results of a GPU are.
        start: what is trained, and from where.
        changes: to the recipes.
        study: where own and random tokens are compared.
        failed: what failed in the past, for its last section.
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
and many more tokens. {{on_gpu}}
""",
        start="""\
- **The whole network is trained**, all 30 layers. Only its vocabulary is cut, from 49,152 tokens
  to the {vocabulary} that the task needs, and every number is one token, whose row starts as a mix
  of the rows of its digits.
- **The original learns the task first** (stage `ar`), as the autoregressive model that it is, since
  the new tokens mean nothing to it.""",
        changes="",
        study="[a study of its own](noise_pretrained.md)",
        failed=f"""\
- **DMax and random tokens changed places** on 2026-11-28, when they learnt twice as long from twice
  as many answers. [The log]({LOG}) has what
  they solved before, and what else failed on the way.
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
ONE_SEED = """\
Each model was trained with one seed. The intervals, of 95 %, do not cover how much one training
differs from another."""
NOT_YET = "not measured yet"


def write_page(size: Size, record: Record, curves: Sequence[Curve], path: Path) -> None:
    """Write the page of a record; points that are missing are named."""
    words = WORDS[size.name]
    parts = [
        filled(words.introduction.format(on_gpu=on_gpu(path.parent))),
        headline(record, curves),
        method(size, record),
        "## Results\n\n" + "\n".join(results(size, record, curves)),
        f"![Accuracy against TPF]({path.stem}.svg)" if record["points"] else "",
        "\n".join(differences(measured(record, curves))),
        "## Stages\n\n" + "\n".join(stages(record)),
        "## Learning curves\n\n" + "\n".join(learning(size, record)),
        failures(words.failed, measured(record, curves)),
    ]
    write_atomically(path, "\n\n".join(filter(None, map(str.strip, parts))) + "\n")


def on_gpu(folder: Path) -> str:
    """Where the results of a GPU are, if there are any."""
    if (folder / f"{GPU.name}.json").exists():
        return f"What came of it has [a page of its own]({GPU.name}.md)."
    return "Nothing of that has been measured yet."


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
    """What was found among the models that are measured, and what is still to come."""
    shares = measured(record, curves)
    missing = dict.fromkeys(curve.label for curve in curves if curve.label not in shares)
    begin = "So far" if missing else "In short"
    paragraphs = [
        f"**{begin}:** {' '.join(finding(shares)) or 'nothing can be compared.'}",
        " ".join(filter(None, [*noise(shares), most(shares)])),
        ONE_SEED if shares else "",
        f"**Still to come:** {'; '.join(missing)}." if missing else "",
    ]
    return filled("\n\n".join(filter(None, paragraphs)))


def measured(record: Record, curves: Sequence[Curve]) -> dict[str, Shares]:
    """What the models solve whose points are all there, by label."""
    points = record["points"]
    shares: dict[str, Shares] = {}
    for curve in curves:
        names = {value: slug(curve, value) for value in sorted(curve.values, reverse=True)}
        if all(name in points for name in names.values()):
            shares[curve.label] = {value: share_of(points[name]) for value, name in names.items()}
    return shares


def finding(shares: Mapping[str, Shares]) -> Iterator[str]:
    """The careful base, DMax at its lowest threshold, and the autoregressive original."""
    base, dmax, original = (list(shares.get(name, {}).items()) for name in (BASE, DMAX, LONGER))
    if base:
        yield f"The careful base, at threshold {base[0][0]:g}, solves {solved(base[0][1])}."
    if dmax:
        lead = f", {more(dmax[-1][1], base[0][1], ' than the base')}" if base else ""
        yield f"DMax, at {dmax[-1][0]:g}, solves {solved(dmax[-1][1])}{lead}."
    for before, (value, now), after in zip(dmax, dmax[1:], dmax[2:], strict=False):
        if now.rate < min(before[1].rate, after[1].rate):
            yield f"At {value:g} it dips to {solved(now)}."
    if original:
        lead = f", {more(original[0][1], dmax[-1][1], ' than DMax')}" if dmax else ""
        yield "The autoregressive original, trained as long as the base, writes one token at a time"
        yield f"and solves {solved(original[0][1])}{lead}."


def solved(share: Share) -> str:
    """How many problems, and at which TPF."""
    return f"{share.correct}/{share.total} at TPF {share.tpf:.2f}"


def more(a: Share, b: Share, than: str = "") -> str:
    """The difference of a and b in words, with its interval."""
    delta, low, high = difference(a, b)
    word = "more" if delta >= 0 else "fewer"
    return f"{abs(delta):.1f} points {word}{than} ({low:+.1f} to {high:+.1f})"


def noise(shares: Mapping[str, Shares]) -> Iterator[str]:
    """What on-policy noise bought over each control that is measured, and what it cost."""
    for name, label in CONTROLS.items():
        found = pairs(shares, label)
        if not found:
            continue
        verdicts = [verdict(*pair) for pair in found.values()]
        won, lost, total = verdicts.count(HOLDS), verdicts.count(FAILS), len(found)
        slower = sum(dmax.tpf < other.tpf for dmax, other in found.values())
        accuracy = f"accuracy beyond chance at {won} of {total} thresholds"
        costs = [
            f"accuracy beyond chance at {lost} of {total}" if lost else "",
            f"tokens a forward at {slower} of {total}" if slower else "",
        ]
        yield f"Over {name}, on-policy noise bought"
        yield f"{accuracy if won else 'no accuracy beyond chance'}."
        yield f"It cost {' and '.join(filter(None, costs)) or 'nothing'}."
        lowest = min(found)
        dmax, other = found[lowest]
        yield f"At {lowest:g} {name} solve {solved(other)}, DMax {more(dmax, other)}."


def most(shares: Mapping[str, Shares]) -> str:
    """Which model solves the most by SPD, once a control can be compared with DMax."""
    if not any(pairs(shares, label) for label in CONTROLS.values()):
        return ""
    by_spd = {
        f"{solved(share)}, of {label.removesuffix(', SPD')} at {value:g}": (share.rate, share.tpf)
        for label in (DMAX, BASE_SPD, *CONTROLS.values())
        for value, share in shares.get(label, {}).items()
    }
    return f"The most right answers by SPD are {max(by_spd, key=by_spd.__getitem__)}."


def pairs(shares: Mapping[str, Shares], label: str) -> dict[float, tuple[Share, Share]]:
    """DMax and another model at the thresholds that both have."""
    dmax, other = shares.get(DMAX, {}), shares.get(label, {})
    return {value: (dmax[value], other[value]) for value in dmax if value in other}


def differences(shares: Mapping[str, Shares]) -> Iterator[str]:
    """The table of DMax against the base and the controls, decoded in the same way."""
    rows = [
        (label, f"{value:g}", str(dmax), str(other), gap(dmax, other))
        for label in (BASE_SPD, *CONTROLS.values())
        for value, (dmax, other) in pairs(shares, label).items()
    ]
    if rows:
        yield "## DMax against the base and the controls at the same threshold\n"
        yield table(("DMax against", "threshold", "DMax", "the other", "difference"), rows)


def failures(of_earlier: str, shares: Mapping[str, Shares]) -> str:
    """The last section of a page that has one."""
    parts = ["## What failed\n", without_oput(shares), of_earlier]
    return "\n".join(filter(None, parts)) if of_earlier else ""


def without_oput(shares: Mapping[str, Shares]) -> str:
    """Whether SPD collapses on the base, as it does in the paper and on the bundled model."""
    if BASE not in shares or BASE_SPD not in shares:
        return ""
    (threshold, careful), *_ = shares[BASE].items()
    worst = min(shares[BASE_SPD].values(), key=lambda share: share.rate)
    at = ", ".join(f"{value:g}" for value in shares[BASE_SPD])
    if collapses(worst, careful):
        said = (
            "**SPD without OPUT collapses** on this base, as in the paper and on the bundled "
            f"model: {solved(worst)}, against {solved(careful)} by threshold decoding at "
            f"{threshold:g}."
        )
    else:
        said = (
            "**SPD without OPUT does not collapse** on this base, unlike in the paper and on the "
            "bundled model."
        )
    return bullet(said) + f"\n  It was measured at threshold {at} only (`base, SPD`)."


def results(size: Size, record: Record, curves: Sequence[Curve]) -> Iterator[str]:
    """The table of points, in the order of the curves, and what it was measured with."""
    points = [{"dtype": record["dtype"], **point} for point in record["points"].values()]
    here = {"environment": record["environment"], "points": points or [{"dtype": record["dtype"]}]}
    computed = machines(here)
    yield f"{record['limit']} unseen problems, seed {record['seed']}, greedy; {computed}."
    said = f"{record['references']:.3f}"
    yield f"The judge gives {said} nats a token to the task's own solutions, which are worded at"
    yield f"random, so {said} is no lower bound.\n"
    yield table(
        ("model, decoding", "threshold", "correct", "95 % interval", "TPF", "judge, nats a token"),
        [
            (
                curve.label,
                "–" if curve.strategy == AUTOREGRESSIVE else str(value),
                *figures(record["points"].get(slug(curve, value))),
            )
            for curve in curves
            for value in curve.values
        ],
    )
    missing = [
        Path(curve.model).name.removeprefix(f"{size.name}-")
        for curve in curves
        if any(slug(curve, value) not in record["points"] for value in curve.values)
    ]
    if missing:
        names = " ".join(dict.fromkeys(missing))
        yield f"\nWhat is missing is measured by `{size.command} {names} measure`."


def figures(point: Record | None) -> tuple[str, ...]:
    """The cells of a point behind its name."""
    if point is None:
        return NOT_YET, "", "", ""
    low, high = (100 * end for end in point["interval"])
    count = f"{point['correct']}/{point['total']}"
    said = f"{point['cross_entropy']:.3f}" if "cross_entropy" in point else ""
    return count, f"{low:.1f} to {high:.1f}", f"{point['tpf']:.2f}", said


def stages(record: Record) -> Iterator[str]:
    """What each stage has taken."""
    yield "Tokens are those of the problems and of the EOS behind them, without padding.\n"
    yield table(
        ("stage", "steps", "sequences", "tokens", "hours", "held-out loss, first and last"),
        [(name, *taken(stage)) for name, stage in record["stages"].items()],
    )
    yield f"\nHeld-out loss fell {where_it_fell(record)}."


def taken(stage: Record) -> tuple[str, ...]:
    """The cells of a stage behind its name."""
    if not stage["steps"] and not stage["is_done"]:
        return "not run yet", "", "", "", ""
    losses = held_out_losses(stage["log"])
    ends = f"{losses[0]:.3f}, {losses[-1]:.3f}" if losses else ""
    steps = f"{stage['steps'] or 'not kept'}{'' if stage['is_done'] else ', not finished'}"
    hours = f"{stage['seconds'] / 3600:.1f}" if stage["seconds"] else ""
    return steps, f"{stage['sequences']:,}", f"{stage['tokens']:,}", hours, ends


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


def learning(size: Size, record: Record) -> Iterator[str]:
    """Held-out losses over the steps of each stage."""
    problems = f"{size.num_held_out} held-out problems"
    yield f"Loss on {problems} after so many steps; each stage has its own objective."
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
