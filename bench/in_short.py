"""What on-policy training buys, where, and what has come after: the results in a few sentences.

Each is drawn from the records of one or two studies, its headline included, and left out where
what it tells is not measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import beyond_verdict
from beyond_runs import DECODINGS, DMAX, TRAINED
from beyond_verdict import FASTER, NEVER, SOME_SEEDS, Found
from command_line import read_if_there
from noise_findings import counted
from noise_plan import PRETRAINED, PRETRAINED_SLOW
from noise_points import RANDOM, Comparison, Points, scientific
from paper_points import of_all_seeds
from shares import FAILS, HOLDS, WITHIN_NOISE, Share, difference, gap, share_at, share_of, verdict

Record = Mapping[str, Any]
BENCH = Path(__file__).parent / "results"
STUDIES = (PRETRAINED, PRETRAINED_SLOW)
OWN, RANDOM_TOKENS = "DMax, SPD", "random tokens, SPD"
SOFT = (0.0, 0.3, 0.5)  # thresholds
RUNS = {run.name: run for run in TRAINED}
BOTH = ("spd", "mbd")  # ways of decoding after DMax


def in_short(folder: Path, bench: Path = BENCH) -> list[str]:
    """All sentences that the records allow.

    Args:
        folder: of the records and pages of `docs/results`.
        bench: of the records of `bench/results`.
    """
    tiny = read_if_there(bench / "tiny.json")
    controls = read_if_there(bench / "controls.json")
    elsewhere = {name: read_if_there(folder / f"{name}.json") for name in STUDIES}
    told = [
        without_noise(tiny),
        with_noise(read_if_there(folder / "training.json")),
        own_or_random(read_if_there(folder / "noise.json"), controls, tiny),
        on_pretrained(elsewhere, read_if_there(folder / "pretrained.json")),
        after_dmax(Found({"points": []} | read_if_there(folder / "beyond.json"))),
    ]
    return [each for each in told if each]


def _points(record: Record, *places: tuple[str, float]) -> list[Share]:
    """The points of these labels and values; none where one of them is not measured."""
    found = [share_at(record.get("points", []), *place) for place in places]
    shares = [share for share in found if share is not None]
    return shares if len(shares) == len(places) else []


def without_noise(tiny: Record) -> str:
    """What the base's own answers teach with masks only."""
    careful = [(f"{name}, threshold", 0.95) for name in ("base", "masks only")]
    found = _points(tiny, *careful, (OWN, 0.3))
    if not found:
        return ""
    base, masks, dmax = found
    speed = "none"
    if masks.tpf > base.tpf:
        speed = "most" if masks.tpf - base.tpf > (dmax.tpf - base.tpf) / 2 else "a part"
    accuracy = {
        HOLDS: "and raise the base's accuracy",
        WITHIN_NOISE: "at the base's accuracy",
        FAILS: "and lower the base's accuracy",
    }[verdict(masks, base)]
    return (
        f"**Masks alone buy {speed} of the speed {accuracy}.** Trained on the base's own "
        f"answers with masks only, and decoded by threshold 0.95, a model solves {masks}, and the "
        f"base {base}: {masks.tpf / base.tpf:.1f} times as many tokens a forward, "
        f"{gap(masks, base)}. One training each, `python bench/tiny.py`."
    )


def with_noise(training: Record) -> str:
    """What training on wrong tokens adds, at like TPF."""
    oput = of_all_seeds(training, "sampled rollouts", "SPD", 0.0)
    masks = of_all_seeds(training, "masks only", "SPD", 0.5)
    if oput is None or masks is None:
        return ""
    pays = {
        HOLDS: "pays",
        WITHIN_NOISE: "has not been seen to pay",
        FAILS: "costs accuracy",
    }[verdict(oput, masks)]
    alike = "at about the same tokens a forward, " if 0.9 < oput.tpf / masks.tpf < 1.1 else ""
    return (
        f"**Training on wrong tokens {pays} when decoding is pushed.** Then SPD can revise: "
        f"{alike}OPUT solves {oput}, and masks only {masks}: "
        f"{gap(oput, masks)}. Three seeds of a quarter of the training ([below](#claims))."
    )


def own_or_random(noise: Record, controls: Record, tiny: Record) -> str:
    """Where it matters that the wrong tokens are the model's own."""
    compared = _compared(noise)
    soft = [_points(controls, (OWN, value), (RANDOM_TOKENS, value)) for value in SOFT]
    names = ("DMax", "random tokens")
    hard = _points(tiny, *((f"{name}, hard feedback", 0.3) for name in names))
    if not (compared and all(soft) and hard):
        return ""
    won, lost = counted(compared)
    gentle = min(compared, key=lambda each: (each.rate, -each.steps, each.threshold))
    leads = [difference(*pair)[0] for pair in soft]
    lead = f"they lead by {min(leads):.1f} to {max(leads):.1f} points"
    if min(leads) <= 0:
        lead = f"the difference is {min(leads):+.1f} to {max(leads):+.1f} points"
    own, random = (max(pair[side].tpf for pair in soft) for side in (0, 1))
    return (
        f"**{_matters(compared, gentle, hard)}** "
        f"Over steps and rates, own tokens beat random ones in {won} of {len(compared)} "
        f"settings and lose in {lost} ([when](noise.md)). At {scientific(gentle.rate)}, nearest to "
        f"the paper's rate, the difference after {gentle.steps:,} steps is "
        f"{gap(gentle.own, gentle.other)} at "
        f"threshold {gentle.threshold:g}. After the whole training {lead} "
        f"by SPD at 0, 0.3 and 0.5 ({soft[0][0].total:,} problems), "
        f"where random tokens write up to {random:.1f} tokens a forward and own ones {own:.1f}. "
        f"With hard tokens at 0.3 the difference is {gap(*hard)} (one training each)."
    )


def _compared(record: Record) -> list[Comparison]:
    """Own tokens against random ones in all settings of a study of noise."""
    return list(Points({"points": [], **record}, []).comparisons(RANDOM))


def _matters(compared: Sequence[Comparison], gentle: Comparison, hard: Sequence[Share]) -> str:
    """The headline: where own tokens are better beyond chance."""
    won, lost = counted(compared)
    place = (gentle.rate, gentle.steps)
    gently = [each for each in compared if (each.rate, each.steps) == place]
    is_early = won > lost and all(each.verdict == HOLDS for each in gently)
    is_hard = verdict(*hard) == HOLDS
    if is_early and is_hard:
        where = "matters early, at small rates, and for hard tokens"
    elif is_early:
        where = "matters early and at small rates"
    elif is_hard:
        where = "matters for hard tokens"
    else:
        where = "matters in some settings" if won > lost else "has not been seen to matter"
    return f"That they are the model's own {where}."


def on_pretrained(elsewhere: Mapping[str, Record], pretrained: Record) -> str:
    """What came of it on a pretrained model, in all studies by their names."""
    studies = {name: _compared(record) for name, record in elsewhere.items()}
    found = {name: each for name, each in studies.items() if each}
    compared = [comparison for each in found.values() for comparison in each]
    if not compared:
        return ""
    won, lost = counted(compared)
    helped = "have not been seen to help"
    if won:
        helped = "help in some settings" + (" and harm in as many or more" if won <= lost else "")
    pages = " and ".join(f"[study]({name}.md)" for name in found)
    return (
        f"**On a small pretrained model own tokens {helped}.** They are better "
        f"than random ones in {won} of {len(compared)} settings and worse in {lost} "
        f"({pages}).{_decoded(pretrained)}"
    )


def _decoded(pretrained: Record) -> str:
    """What the pretrained model solves after either training; nothing if that is not measured."""
    points = pretrained.get("points", {})
    names = {
        "the careful base": "base-threshold-0.95",
        "DMax": "DMax-SPD-0.3",
        "random tokens": "random-tokens-SPD-0.3",
    }
    if not points.keys() >= set(names.values()):
        return ""
    base, *trained = (points[place]["tpf"] for place in names.values())
    makes = ("Neither makes", "One of them makes", "Both make")[sum(tpf > base for tpf in trained)]
    shown = ", ".join(f"{name} {share_of(points[place])}" for name, place in names.items())
    return f" {makes} the base faster: {shown} (one seed each, [page](pretrained.md))."


def after_dmax(found: Found) -> str:
    """What objectives and decoding after DMax buy at equal accuracy."""
    if not all(found.curve(DMAX, decoding) for decoding in BOTH):
        return ""
    cforce = RUNS["cforce"]
    told = {
        "Tokens a forward of `tiny-dmax` at equal accuracy, without any training": {
            decoding: [found.tpf(DMAX, decoding)] for decoding in BOTH
        },
        "After minutes of training with CForce": {
            decoding: found.tpfs(cforce, decoding) for decoding in BOTH
        },
        "After going on with OPUT instead": {"spd": found.tpfs(RUNS["oput"], "spd")},
    }
    known = {said: tpfs for said, tpfs in told.items() if any(tpfs.values())}
    sentences = [f"{said}: {_listed(tpfs)}" for said, tpfs in known.items()]
    return f"**After DMax: {_faster(found)}.** {'. '.join(sentences)} ([beyond](beyond.md))."


def _faster(found: Found) -> str:
    """What makes `tiny-dmax` faster, with and without training."""
    start, two_blocks = (found.tpf(DMAX, decoding) or 0 for decoding in BOTH)
    faster = ["two open blocks (MBD)"] if two_blocks > start else []
    verdicts = {name: beyond_verdict.verdict(found, RUNS["cforce"], name) for name in BOTH}
    ways = [DECODINGS[name][0] for name in BOTH if verdicts[name] == FASTER]
    if ways:
        faster.append("CForce" if len(ways) == len(BOTH) else f"CForce by {ways[0]}")
    return ", then ".join(faster) or "nothing has been seen to be faster"


def _listed(tpfs: Mapping[str, Sequence[float | None]]) -> str:
    """The TPF by each way of decoding that is measured."""
    measured = {DECODINGS[name][0]: each for name, each in tpfs.items() if each}
    return ", ".join(f"by {way} {_shown(each)}" for way, each in measured.items())


def _shown(tpfs: Sequence[float | None]) -> str:
    """The mean TPF of all seeds, or that not all are as accurate."""
    known = [tpf for tpf in tpfs if tpf is not None]
    if len(known) < len(tpfs):
        return f"it is {SOME_SEEDS if known else NEVER}"
    return f"{statistics.mean(known):.2f}"
