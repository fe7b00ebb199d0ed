"""The page of `bench/paper.py`: verdicts with their counts, then every point."""

from __future__ import annotations

from collections.abc import Sequence

from ablation_training import SEEDS, VARIANTS
from paper_claims import CLAIMS
from paper_plan import TAUS
from paper_points import Record, Results
from prose import bullet, filled, table
from shares import FAILS, HOLDS, WITHIN_NOISE, decoding_seconds

from dmax.benchmark.run import machines

WIDTH = 120  # columns of the page


def page(results: Results, short: Sequence[str]) -> str:
    """The Markdown page: all studies in short, verdicts with counts, then every point."""
    rows = []
    briefs: dict[str, list[str]] = {HOLDS: [], FAILS: [], WITHIN_NOISE: []}
    for entry in CLAIMS:
        verdict, figures = entry.judge(results)
        rows.append((entry.number, entry.text, entry.paper, figures, f"**{verdict}**"))
        briefs[verdict].append(f"{entry.brief} ({entry.number})")
    record = results.decoding
    return TEMPLATE.format(
        short="\n".join(bullet(told, width=WIDTH) for told in short),
        summary="\n\n".join(_line(verdict, briefs[verdict]) for verdict in briefs),
        claims=table(("#", "the paper says", "there", "here", ""), rows),
        decoding=_points(record["points"]),
        training=_pooled(results),
        problems=record["limit"],
        retrained=results.training["limit"],
        seeds=len(SEEDS),
        decoded_on=_where_and_when(record),
        retrained_on=_where_and_when(results.training),
        earlier=_earlier(results.training),
    )


def _where_and_when(record: Record) -> str:
    minutes = decoding_seconds(record["points"]) / 60
    date = record["environment"]["date"][:10]
    return f"{machines(record)}; {date}; {minutes:.0f} minutes"


def _earlier(record: Record) -> str:
    """Which variants were measured on another day than most."""
    day = record["environment"]["date"][:10]
    days = {
        f"{variant} on {other}"
        for variant in VARIANTS
        for point in record["points"]
        if point["label"].startswith(f"{variant}, ")
        and (other := point.get("environment", record["environment"])["date"][:10]) != day
    }
    return f" Measured on another day: {', '.join(sorted(days))}." if days else ""


def _line(verdict: str, briefs: Sequence[str]) -> str:
    title = {HOLDS: "Holds here", FAILS: "Does not hold here", WITHIN_NOISE: "Within noise"}
    return filled(f"**{title[verdict]}:** {'; '.join(briefs) or 'none'}.", width=WIDTH)


def _points(points: Sequence[Record]) -> str:
    rows = []
    for p in points:
        low, high = (100 * bound for bound in p["interval"])
        share = f"{p['correct']}/{p['total']}"
        interval = f"{low:.1f} to {high:.1f}"
        rows.append((p["label"], f"{p['value']:g}", share, interval, f"{p['tpf']:.2f}"))
    return table(("model, decoding", "threshold", "correct", "95 % interval", "TPF"), rows)


def _pooled(results: Results) -> str:
    rows = []
    for variant in VARIANTS:
        for how, values in (("SPD", TAUS), ("hard tokens", (0.5,)), ("threshold", (0.5, 0.95))):
            for value in values:
                labels = [f"{variant}, {how}, seed {seed}" for seed in SEEDS]
                found = {
                    p["label"]: p["correct"]
                    for p in results.training["points"]
                    if p["value"] == value
                }
                each = ", ".join(str(found[label]) for label in labels)
                pooled = results.pooled(variant, how, value)
                rows.append((variant, how, f"{value:g}", each, str(pooled)))
    return table(("trained with", "decoded by", "threshold", "each seed", "pooled"), rows)


TEMPLATE = """# What is measured, in short

{short}

Every study has a page: [the paper's experiments](#the-papers-experiments-in-miniature), below;
[when on-policy noise matters](noise.md), and [on a pretrained model](noise_pretrained.md); [a real
pretrained model](pretrained.md); [what came after DMax](beyond.md); [every decoding
method](methods.md).

## The paper's experiments in miniature

{summary}

Numbers in brackets are rows of the table of claims. Verdicts are computed. A claim that something
is more accurate *holds* if the 95 % interval of the difference lies above zero; it does not if it
lies below, and else it is *within noise*. "As good" and "no loss" (19, 26, sampled rollouts) hold
unless the other is better by that rule; "little" (21) is at most 2 points. TPF, times and rates
(24, 25, 28, 29) are compared as measured, without intervals. A model *collapses* (17, 18) if it
solves less than half of what the base solves by threshold at 0.95.

- **Single settings** were decoded on {problems} unseen word problems. Machine and time:
  {decoded_on}.
- **Retrained models** come from `python bench/ablation_training.py`
  ([recipes/tiny_ablation.yaml](../../recipes/tiny_ablation.yaml)), {seeds} seeds each, six to ten
  minutes a model on one thread, and were decoded on {retrained} problems. Machine and time:
  {retrained_on}.{earlier}

`python bench/paper.py` wrote this page from the records in this folder and, for the first lines, in
[bench/results](../../bench/results). `make results` measures what the records in this folder lack;
remove one to have it measured anew. `make pretrained` makes those on a pretrained model, its
studies of noise under `runs/results`.

![Accuracy against TPF of the decoding variants](decoding.svg)

## Claims

{claims}

Claim 23 has [a page of its own](noise.md). In 29 the models are shown solutions of the task, many
of which the base words otherwise; shown held-out answers of the base, a model trained on its own
tokens [breaks no more](noise.md#what-came-of-the-reasons) than one trained on random tokens.

## Decoding, every point

{decoding}

## Training, every point

A quarter of the bundled model's OPUT training each.

{training}
"""
