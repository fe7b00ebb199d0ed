"""Accuracy against tokens per forward of the bundled models, and of the controls, in one command.

    python bench/tiny.py --limit 500 --output bench/results/tiny.json --plot docs/images/tiny.svg

Every model decodes the same unseen problems. The controls (`recipes/tiny_mdlm.yaml`,
`tiny_uniform.yaml`, `tiny_oput_*.yaml`) are measured where their checkpoints lie under `runs/`. The
output grows point by point; points it already holds are not measured again unless the weights have
changed. The last line on stdout is the JSON document.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from command_line import check_plots, count, seed, telling
from sweeps import BATCH_SIZE, SEED, present, sweep

from dmax.evaluation.plots import draw
from dmax.evaluation.sweep import Curve
from dmax.llm import LLM

HARD = (("soft_inputs", False),)
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
FEW = (0.1, 0.3, 0.5, 0.7, 0.95)
PUSHED = (0.0, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
COARSE = (0.0, 0.3, 0.5, 0.7)
CURVES = (
    Curve("base, threshold", "tiny-base", "threshold", THRESHOLDS),
    Curve("base, SPD", "tiny-base", "spd", COARSE),
    Curve("base, hard feedback", "tiny-base", "spd", COARSE, HARD),
    Curve("DMax, SPD", "tiny-dmax", "spd", PUSHED),
    Curve("DMax, hard feedback", "tiny-dmax", "spd", PUSHED, HARD),
    Curve("DMax, threshold", "tiny-dmax", "threshold", FEW),
    # The other rollouts; tiny-dmax was trained on sampled ones.
    Curve("argmax rollouts, SPD", "runs/tiny-oput-argmax", "spd", COARSE),
    Curve("argmax rollouts, hard feedback", "runs/tiny-oput-argmax", "spd", COARSE, HARD),
    Curve("soft rollouts, SPD", "runs/tiny-oput-soft", "spd", COARSE),
    Curve("soft rollouts, hard feedback", "runs/tiny-oput-soft", "spd", COARSE, HARD),
    Curve("spd rollouts, SPD", "runs/tiny-oput-spd", "spd", COARSE),
    Curve("spd rollouts, hard feedback", "runs/tiny-oput-spd", "spd", COARSE, HARD),
    Curve("masks only, threshold", "runs/tiny-mdlm", "threshold", FEW),
    Curve("masks only, SPD", "runs/tiny-mdlm", "spd", COARSE),
    Curve("random tokens, SPD", "runs/tiny-uniform", "spd", COARSE),
    Curve("random tokens, hard feedback", "runs/tiny-uniform", "spd", COARSE, HARD),
)
DRAWN = (
    "base, threshold",
    "base, SPD",
    "DMax, SPD",
    "DMax, hard feedback",
    "DMax, threshold",
    "masks only, threshold",
    "random tokens, SPD",
)


@telling()
def main() -> None:
    """Measure what is missing, write it down, draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=count, default=500, help="problems")
    parser.add_argument("--seed", type=seed, default=SEED, help="of the problems")
    parser.add_argument("--batch-size", type=count, default=BATCH_SIZE)
    parser.add_argument(
        "--dtype", default="auto", help="auto is bfloat16 where the hardware has it"
    )
    parser.add_argument("--only", nargs="*", help="labels of the curves to measure")
    parser.add_argument("--output", type=Path, default=Path("bench/results/tiny.json"))
    parser.add_argument("--plot", type=Path, help="SVG to draw (needs matplotlib)")
    options = parser.parse_args()
    if options.plot:
        check_plots(parser)
    labels = [curve.label for curve in CURVES]
    if unknown := [label for label in options.only or () if label not in labels]:
        parser.error(f"no curve is called {unknown[0]!r}; there are: {'; '.join(labels)}")
    record = sweep(
        present(curve for curve in CURVES if not options.only or curve.label in options.only),
        options.output,
        options.limit,
        seed=options.seed,
        open_model=lambda name: LLM(name, max_batch_size=options.batch_size, dtype=options.dtype),
    )
    if options.plot:
        drawn = [point for point in record["points"] if point["label"] in DRAWN]
        draw({**record, "points": drawn}, options.plot, ours="DMax, SPD", against="base, threshold")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
