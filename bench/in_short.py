"""What on-policy training buys, where, and what has come after: the results in a few sentences.

Each is drawn from the records of one or two studies, and left out where they are not there.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from beyond_runs import DMAX, TRAINED
from beyond_verdict import Found
from noise_findings import counted
from noise_plan import PRETRAINED, PRETRAINED_SLOW
from noise_points import RANDOM, Points, scientific
from paper_points import Results
from shares import difference, gap, share_of

from dmax.files import read_record

Record = Mapping[str, Any]
BENCH = Path(__file__).parent / "results"
STUDIES = (PRETRAINED, PRETRAINED_SLOW)
LABELS = ("DMax, SPD", "random tokens, SPD")  # own tokens, and random ones


def in_short(folder: Path, bench: Path = BENCH) -> list[str]:
    """All sentences that the records allow.

    Args:
        folder: of the records and pages of `docs/results`.
        bench: of the records of `bench/results`.
    """
    tiny = _read(bench / "tiny.json")
    controls = _read(bench / "controls.json")
    training = _read(folder / "training.json")
    noise = _read(folder / "noise.json")
    elsewhere = {name: record for name in STUDIES if (record := _read(folder / f"{name}.json"))}
    pretrained = _read(folder / "pretrained.json")
    beyond = _read(folder / "beyond.json")
    told: list[str] = []
    if tiny:
        told.append(without_noise(tiny))
    if training:
        told.append(with_noise(training))
    if noise and controls and tiny:
        told.append(own_or_random(noise, controls, tiny))
    if elsewhere and pretrained:
        told.append(on_pretrained(elsewhere, pretrained))
    if beyond:
        told.append(after_dmax(Found(beyond)))
    return told


def _read(path: Path) -> dict[str, Any]:
    """A record; empty if it is not there."""
    return dict(read_record(path)) if path.exists() else {}


def _decoded(record: Record) -> Results:
    return Results(dict(record), {}, {})


def without_noise(tiny: Record) -> str:
    """What the base's own answers teach with masks only."""
    decoded = _decoded(tiny)
    base, masks = (decoded.at(f"{name}, threshold", 0.95) for name in ("base", "masks only"))
    return (
        "**Masks alone buy most of the speed at the base's accuracy.** Trained on the base's own "
        f"answers with masks only, and decoded by threshold 0.95, a model solves {masks}, and the "
        f"base {base}: {masks.tpf / base.tpf:.1f} times as many tokens a forward, "
        f"{gap(masks, base)}. One training each, `python bench/tiny.py`."
    )


def with_noise(training: Record) -> str:
    """What training on wrong tokens adds, at like TPF."""
    retrained = Results({}, dict(training), {})
    oput = retrained.pooled("sampled rollouts", "SPD", 0.0)
    masks = retrained.pooled("masks only", "SPD", 0.5)
    return (
        "**Training on wrong tokens pays when decoding is pushed.** Then SPD can revise: at about "
        f"the same tokens a forward, OPUT solves {oput}, and masks only {masks}: "
        f"{gap(oput, masks)}. Three seeds of a quarter of the training ([below](#claims))."
    )


def own_or_random(noise: Record, controls: Record, tiny: Record) -> str:
    """Where it matters that the wrong tokens are the model's own."""
    compared = list(Points(dict(noise), []).comparisons(RANDOM))
    won, lost = counted(compared)
    gentle = min(compared, key=lambda each: (each.rate, -each.steps, each.threshold))
    longer = _decoded(controls)
    soft = [
        difference(*(longer.at(label, value) for label in LABELS))[0] for value in (0.0, 0.3, 0.5)
    ]
    own, random = (
        max(longer.at(label, value).tpf for value in (0.0, 0.3, 0.5)) for label in LABELS
    )
    names = ("DMax", "random tokens")
    hard = [_decoded(tiny).at(f"{name}, hard feedback", 0.3) for name in names]
    return (
        "**That they are the model's own matters early, at small rates, and for hard tokens.** "
        f"Over steps and rates, own tokens beat random ones in {won} of {len(compared)} "
        f"settings and lose in {lost} ([when](noise.md)). At {scientific(gentle.rate)}, nearest to "
        f"the paper's rate, the difference after {gentle.steps:,} steps is "
        f"{gap(gentle.own, gentle.other)} at "
        f"threshold {gentle.threshold:g}. After the whole training they lead by "
        f"{min(soft):.1f} to {max(soft):.1f} points by SPD at 0, 0.3 and 0.5 (2,000 problems), "
        f"where random tokens write up to {random:.1f} tokens a forward and own ones {own:.1f}. "
        f"With hard tokens at 0.3 the difference is {gap(*hard)} (one training each)."
    )


def on_pretrained(elsewhere: Mapping[str, Record], pretrained: Record) -> str:
    """What came of it on a pretrained model, in all studies by their names."""
    compared = [
        comparison
        for record in elsewhere.values()
        for comparison in Points(dict(record), []).comparisons(RANDOM)
    ]
    won, lost = counted(compared)
    pages = " and ".join(f"[study]({name}.md)" for name in elsewhere)
    points = pretrained["points"]
    names = {
        "the careful base": "base-threshold-0.95",
        "DMax": "DMax-SPD-0.3",
        "random tokens": "random-tokens-SPD-0.3",
    }
    shown = ", ".join(
        f"{name} {share_of(p)}" for name, place in names.items() if (p := points.get(place))
    )
    return (
        "**On a small pretrained model own tokens have not been seen to help.** They are better "
        f"than random ones in {won} of {len(compared)} settings and worse in {lost} "
        f"({pages}). Both make the base faster: {shown} (one seed each, "
        "[page](pretrained.md))."
    )


def after_dmax(found: Found) -> str:
    """What objectives and decoding after DMax buy at equal accuracy."""
    runs = {run.name: run for run in TRAINED}
    start, two_blocks = (found.tpf(DMAX, decoding) for decoding in ("spd", "mbd"))
    cforce = [_mean(found.tpfs(runs["cforce"], decoding)) for decoding in ("spd", "mbd")]
    more = _mean(found.tpfs(runs["oput"], "spd"))
    return (
        "**After DMax: two open blocks, then CForce.** At equal accuracy `tiny-dmax` writes "
        f"{_shown(start)} tokens a forward by SPD and {_shown(two_blocks)} with two blocks open "
        f"(MBD), without any training. Minutes of training with CForce make it {_shown(cforce[0])} "
        f"and {_shown(cforce[1])}. Going on with OPUT instead makes it {_shown(more)} by SPD "
        "([beyond](beyond.md))."
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Of all seeds; None where one of them is never as accurate, or none is measured."""
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known and len(known) == len(values) else None


def _shown(tpf: float | None) -> str:
    return "never as many correct" if tpf is None else f"{tpf:.2f}"
