"""Every decoding method on the bundled models: accuracy, tokens per forward, cost of a token.

    python bench/methods.py

Writes `methods.json`, two plots and `methods.md` under `docs/results/`; an interrupted run goes on
where it stopped. Methods that need no training, or a head that comes with the package, decode the
base model; SPD and its windows decode the DMax model, and so do those that were made to be trained
and are not (`d2f`, `dparallel`, `joint_threshold`), beside the base model. `d2f` and `dparallel`
are also measured on what their recipes train, where it lies under `runs/`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from beyond_verdict import tpf_at
from command_line import check_page, check_plots, count, read_if_there, telling
from paper_points import of_all_seeds
from prose import table
from shares import FAILS, HOLDS, WITHIN_NOISE, decoding_seconds, gap, share_at, verdict
from sweeps import present, sweep

from dmax.benchmark.run import machines
from dmax.evaluation.plots import draw
from dmax.evaluation.statistics import Point
from dmax.evaluation.sweep import Curve
from dmax.files import check_ours, write_atomically

BASE = "tiny-base"
DMAX = "tiny-dmax"
CAREFUL = (0.95, 0.7, 0.5)
CURVES = (
    Curve("autoregressive", BASE, "autoregressive", (1,)),
    Curve("LLaDA, fixed schedule", BASE, "llada", (32, 16, 8)),
    Curve("threshold (LLaDA-2.0)", BASE, "threshold", CAREFUL),
    Curve("Fast-dLLM, factor", BASE, "fast_dllm_factor", (0.5, 1.0, 4.0)),
    Curve("Hierarchy-dLLM", BASE, "hierarchy", (0.9, 0.7, 0.5)),
    Curve("entropy bound (EB-Sampler)", BASE, "entropy_bound", (0.1, 0.3, 1.0)),
    Curve("dParallel's rule, untrained", BASE, "dparallel", (0.1, 0.5, 1.0)),
    Curve("SchED", BASE, "sched", (9.0, 6.0, 3.0)),
    Curve("credit", BASE, "credit", CAREFUL),
    Curve("joint threshold (LLaDA-2.1)", BASE, "joint_threshold", CAREFUL),
    Curve("IterSmooth", BASE, "iter_smooth", (0.9, 0.7, 0.5)),
    Curve("Learn2PD", BASE, "learn2pd", (0.99, 0.96, 0.8)),
    Curve("DEMASK", BASE, "demask", (0.03, 0.1, 0.3)),
    Curve("D2F's window, untrained", BASE, "d2f", (0.9, 0.7, 0.5)),
    Curve("LoPA", BASE, "lopa", (0.9, 0.7, 0.5)),
    Curve("D2F, trained", "runs/tiny-d2f", "d2f", (0.95, 0.9, 0.7)),
    Curve("dParallel, trained", "runs/tiny-dparallel", "dparallel", (0.1, 0.3, 0.5)),
    Curve("joint threshold on DMax", DMAX, "joint_threshold", CAREFUL),
    Curve("SPD (DMax)", DMAX, "spd", (0.9, 0.7, 0.5, 0.3)),
    Curve("SPD, two blocks (MBD)", DMAX, "mbd", (0.9, 0.7, 0.5, 0.3)),
)


OURS = "SPD (DMax)"
AGAINST = "threshold (LLaDA-2.0)"
# Recipes of methods that are also shown untrained: both curves, and the rule's default threshold.
TRAINED = {
    "tiny_d2f": ("D2F's window, untrained", "D2F, trained", 0.9),
    "tiny_dparallel": ("dParallel's rule, untrained", "dParallel, trained", 0.5),
}


def bought(points: list[Point]) -> str:
    """What the training of each recipe bought, a sentence each, at the rule's default threshold."""
    return "\n".join(
        f"- [{recipe}](../../recipes/{recipe}.yaml): "
        + (
            _compared(points, *curves)
            or f"not measured yet; `dmax train recipes/{recipe}.yaml`, then this script."
        )
        for recipe, curves in TRAINED.items()
    )


def _compared(points: list[Point], untrained: str, trained: str, threshold: float) -> str | None:
    before, after = (share_at(points, label, threshold) for label in (untrained, trained))
    if before is None or after is None:
        return None
    accuracy = {
        HOLDS: "is more accurate than without",
        FAILS: "is less accurate than without",
        WITHIN_NOISE: "is as accurate as without, within noise,",
    }[verdict(after, before)]
    reach = tpf_at([p for p in points if p["label"] == untrained], after.rate)
    as_far = "never as accurate" if reach is None else f"as accurate up to TPF {reach:.2f}"
    faster = ""
    if before.tpf:  # else it writes nothing, and nothing is so many times as much
        faster = f", and writes {after.tpf / before.tpf:.1f} times as many tokens a forward"
    return (
        f"at a threshold of {threshold:g}, the rule with its training {accuracy} "
        f"({after} against {before}: {gap(after, before)}){faster}; "
        f"without training it is {as_far}."
    )


def control(training: Path) -> str:
    """What masks alone do with the same answers, from the record of the ablation if it is there."""
    masks = of_all_seeds(read_if_there(training), "masks only", "threshold", 0.95)
    return CONTROL.format(control=f"{masks}, three seeds together") if masks else ""


def page(record: dict[str, Any], training: Path) -> str:
    """What training bought, and the table of all points, Markdown."""
    points = record["points"]
    here = record["environment"]
    days = {p.get("environment", here)["date"][:10] for p in points}
    rows = []
    for p in points:
        low, high = (100 * bound for bound in p["interval"])
        correct = f"{p['correct']}/{p['total']} ({low:.1f} to {high:.1f} %)"
        tokens = p["generated_tokens"]
        positions = f"{p['num_positions'] / tokens:.1f}" if tokens else "nothing written"
        setting = (f"`{p['strategy']}`", f"{p['knob']} {p['value']:g}")
        rows.append((p["label"], *setting, correct, f"{p['tpf']:.2f}", positions))
    return TEMPLATE.format(
        bought=bought(points),
        control=control(training),
        points=table(HEAD, rows),
        total=points[0]["total"],
        seed=record["seed"],
        machine=machines(record),
        days=", ".join(sorted(days)),
        minutes=decoding_seconds(points) / 60,
    )


HEAD = ("method", "strategy", "setting", "correct", "TPF", "positions a token")
CONTROL = """
Learning from masks alone on the same answers is worth much already: a quarter of the bundled
model's steps, and decoding by threshold at 0.95 has {control}
([the ablation](README.md#training-every-point)).
"""
TEMPLATE = """# Every method on the bundled models

Written by `python bench/methods.py` from [methods.json](methods.json): {total} unseen word problems
(seed {seed}), exact final answer with its 95 % interval. *Positions a token* is what a token costs
where a forward's width is not free: positions computed in denoising and commit forwards, all open
blocks and versions included, over generated tokens. [docs/methods.md](../methods.md) says what each
method is and what it needs. Machine: {machine}; {days};
{minutes:.0f} minutes of decoding.

![Accuracy against tokens per forward](methods.svg)

![Accuracy against tokens per computed position](methods-cost.svg)

## What training bought

D2F and dParallel are made to be trained. Each is shown on the model as it is, and on what its
recipe makes of it with one seed:

{bought}
{control}
## Every point

{points}
"""


@telling()
def main() -> None:
    """Measure what is missing, draw, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=count, default=200, help="problems")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    check_plots(parser)
    check_ours(options.output / "methods.json", "points")
    check_page(options.output / "methods.md", TEMPLATE)
    record = sweep(present(CURVES), options.output / "methods.json", options.limit)
    for name, x in (("methods.svg", "tpf"), ("methods-cost.svg", "tokens_per_position")):
        draw(record, options.output / name, x, ours=OURS, against=AGAINST)
    write_atomically(options.output / "methods.md", page(record, options.output / "training.json"))


if __name__ == "__main__":
    main()
