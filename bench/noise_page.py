"""The page of `bench/noise.py`: what it found in one sentence, curves, and every point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from command_line import read_if_there
from noise_findings import (
    ARGMAX,
    BETWEEN_SEEDS,
    as_expected,
    by_seed,
    controls,
    elsewhere,
    extremes,
    how_far,
    plausible,
    published,
    reasons,
    sentence,
    speed,
    untrained,
)
from noise_plan import (
    BUNDLED,
    PRETRAINED,
    PRETRAINED_GPU,
    PRETRAINED_SLOW,
    RECIPE_RATIO,
    THRESHOLDS,
    Design,
    base_label,
)
from noise_points import RANDOM, Points, Record
from noise_tables import (
    along_training,
    base_noise,
    comparison_table,
    draw,
    every_point,
    missing,
    wrong_kinds,
)
from prose import bullet, filled
from shares import decoding_seconds, share_of

from dmax.benchmark.run import machines
from dmax.files import read_record, write_atomically

CONTROLS = ("same-kind", "at-errors")
ELSEWHERE = {
    PRETRAINED: "On a pretrained model",
    PRETRAINED_SLOW: "On a pretrained model at small rates",
    PRETRAINED_GPU: "On a pretrained model that a GPU has trained",
}
MEASURED = """\
{total} problems a point and seed, exact final answer, seeds pooled, intervals of 95 %. All seeds
decode the same problems, so pooled intervals are somewhat too narrow. Machine: {machine}. {alike}
Training and decoding took {hours:.1f} hours, jobs that ran side by side counted one by one.
`{command}` wrote this page from [{name}.json]({name}.json) and
[{name}_tokens.json]({name}_tokens.json)."""
LOOKS = """\
## Where the noise differs

What stands at masked positions of held-out examples when the base is trained:

{base_noise}

At the mask ratio of the runs, by the kind of the clean token:

{wrong_kinds}

{trained}"""


def write_page(points_file: Path, looks_file: Path, design: Design) -> None:
    """Write the page and its curves beside the records, with all that is planned or measured."""
    record = read_record(points_file)
    looked = {"looks": {}, "seconds": {}} | read_if_there(looks_file)
    points = Points(record, design.stages)
    draw(points, points_file.with_suffix(".svg"))
    parts = (
        f"# {design.title}",
        *map(filled, findings(points, looked["looks"], points_file, design)),
        filled(how_measured(record, looked, points_file.stem, design, alike(record, points))),
        f"![Accuracy over training steps for each kind of noise]({points_file.stem}.svg)",
        f"## The design, written before any result\n\n{design.text.strip()}",
        *sections(points, looked["looks"], design),
    )
    write_atomically(points_file.with_suffix(".md"), "\n\n".join(filter(None, parts)) + "\n")


def findings(points: Points, found: Record, points_file: Path, design: Design) -> Iterator[str]:
    """What was found, each in a paragraph; empty ones have nothing to say."""
    compared = list(points.comparisons(RANDOM))
    planned = len(points.rates) * len(points.steps) * len(THRESHOLDS)
    yield f"{sentence(compared, planned)} {extremes(compared)}".strip()
    if split := by_seed(points, compared):
        yield f"{split} {BETWEEN_SEEDS}"
    yield how_far(compared)
    yield speed(compared)
    if design.expected:
        yield as_expected(compared, design.expected)
    yield f"{untrained(points)} {sister(points_file)}".strip()
    yield plausible(found)
    if points.has([ARGMAX]):
        yield published(points)
    if points.has(CONTROLS):
        yield controls(points)
    if points_file.stem == BUNDLED:
        for name, base in ELSEWHERE.items():
            other = points_file.with_name(f"{name}.json")
            if other.exists():
                yield elsewhere(Points(read_record(other), []), name, base, compared)


def sister(points_file: Path) -> str:
    """What the base of the pretrained model's own page solves, whose stages are the same."""
    other = points_file.with_name("pretrained.json")
    if points_file.stem != PRETRAINED or not other.exists():
        return ""
    record = read_record(other)
    point = record["points"].get("base-SPD-0.5")
    if point is None:
        return ""
    return (
        f"So much depends on one training: the base of [the pretrained model's page]"
        f"(pretrained.md), of the same stages in {record['dtype']}, solves "
        f"{share_of(point)} at 0.5."
    )


def alike(record: Record, points: Points) -> str:
    """How often the two noises of a comparison ran on the same hardware in the same precision."""
    same, total = _same_machine(record, points, [RANDOM])
    told = (
        "Own and random tokens of a seed ran on the same hardware in the same precision in "
        f"{same} of {total} pairs"
    )
    if points.has(CONTROLS):
        same, total = _same_machine(record, points, [ARGMAX, *CONTROLS])
        told += f", own tokens and the other noises in {same} of {total}"
    return f"{told}."


def _same_machine(record: Record, points: Points, others: Sequence[str]) -> tuple[int, int]:
    pairs = [pair for other in others for pair in points.pairs(other)]
    kinds = [{machines(record | {"points": [point]}) for point in pair} for pair in pairs]
    return sum(len(kind) == 1 for kind in kinds), len(kinds)


def how_measured(record: Record, looked: Record, name: str, design: Design, alike: str) -> str:
    """Problems, machine, time and command."""
    hours = (sum(looked["seconds"].values()) + decoding_seconds(record["points"])) / 3600
    return MEASURED.format(
        total=record["limit"],
        machine=machines(record),
        hours=hours,
        command=design.command,
        name=name,
        alike=alike,
    )


def sections(points: Points, found: Record, design: Design) -> Iterator[str]:
    """The tables, each under its heading."""
    if points.has(CONTROLS):
        told = map(bullet, reasons(points, found))
        yield "## What came of the reasons\n\n" + "\n".join(told)
    compared = list(points.comparisons(RANDOM))
    yield f"## Own tokens against random tokens\n\n{comparison_table(compared)}"
    trained = (
        "What trained models (of one seed) say in place of the masks at once, and what one more "
        "forward makes of it: wrong tokens mended and right ones broken, of their own tokens by "
        "argmax, and of their samples with random tokens where those are wrong. " + design.note
    )
    yield LOOKS.format(
        base_noise=base_noise(found), wrong_kinds=wrong_kinds(found), trained=filled(trained)
    )
    if base_label(RECIPE_RATIO) in found:  # with which the others are compared
        yield along_training(found, points)
    yield f"## Every point\n\n{every_point(points)}"
    goes_on = f"How far each run is. `{design.command}` goes on from here."
    yield f"## What is measured\n\n{goes_on}\n\n{missing(points, design.noises)}"
