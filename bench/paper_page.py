"""The page of `bench/paper.py`: verdicts with their counts, then every point."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ablation_training import SEEDS, VARIANTS
from paper_claims import CLAIMS
from paper_plan import TAUS
from paper_points import Record, Results

from dmax.benchmark.run import machines


def page(results: Results) -> str:
    """The Markdown page: verdicts with counts, then every point."""
    rows = ["| # | the paper says | there | here | |", "|---|---|---|---|---|"]
    briefs: dict[str, list[str]] = {"holds": [], "fails": [], "within noise": []}
    for entry in CLAIMS:
        verdict, figures = entry.judge(results)
        cells = (entry.number, entry.text, entry.paper, figures, f"**{verdict}**")
        rows.append(f"| {' | '.join(cells)} |")
        briefs[verdict].append(f"{entry.brief} ({entry.number})")
    record = results.decoding
    return TEMPLATE.format(
        summary="\n\n".join(_line(verdict, briefs[verdict]) for verdict in briefs),
        claims="\n".join(rows),
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
    return f"{machines(record)}; {record['environment']['date'][:10]}"


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
    return textwrap.fill(f"**{verdict.capitalize()}:** {'; '.join(briefs) or 'none'}.", width=120)


def _points(points: Sequence[Record]) -> str:
    rows = [
        "| model, decoding | threshold | correct | 95 % interval | TPF |",
        "|---|---|---|---|---|",
    ]
    for p in points:
        low, high = (100 * bound for bound in p["interval"])
        share = f"{p['correct']}/{p['total']}"
        interval = f"{low:.1f} to {high:.1f}"
        rows.append(f"| {p['label']} | {p['value']:g} | {share} | {interval} | {p['tpf']:.2f} |")
    return "\n".join(rows)


def _pooled(results: Results) -> str:
    rows = [
        "| trained with | decoded by | threshold | each seed | pooled |",
        "|---|---|---|---|---|",
    ]
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
                rows.append(f"| {variant} | {how} | {value:g} | {each} | {pooled} |")
    return "\n".join(rows)


TEMPLATE = """# The paper's experiments in miniature

{summary}

Numbers in brackets are rows of the table below. A verdict is computed. *Holds* and *fails* mean
that the 95 % interval of the difference leaves out zero, or that a ratio lies on that side. *Within
noise* means that it does not.

- **Single settings** were decoded on {problems} unseen word problems. Machine:
  {decoded_on}.
- **Retrained models** come from `python bench/ablation_training.py`
  ([recipes/tiny_ablation.yaml](../../recipes/tiny_ablation.yaml)), {seeds} seeds each, and were
  decoded on {retrained} problems. Machine:
  {retrained_on}.{earlier}

`python bench/paper.py` wrote this page from the records in this folder. `make results` runs both,
and [every decoding method](methods.md). Pages of their own have [a real pretrained
model](pretrained.md), [what came after DMax](beyond.md), and
[when on-policy noise matters](noise.md), which looks into claim 23.

![Accuracy against TPF of the decoding variants](decoding.svg)

## Claims

{claims}

## Decoding, every point

{decoding}

## Training, every point

A quarter of the bundled model's OPUT training each.

{training}
"""
