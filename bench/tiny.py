"""The bundled models' results in one command: accuracy against tokens per forward, base, DMax and the controls.

    python bench/tiny.py --limit 500 --output bench/results/tiny.json --plot docs/images/tiny.svg

Every model decodes the same unseen problems. The controls (`recipes/tiny_mdlm.yaml`, `tiny_uniform.yaml`,
`tiny_oput_*.yaml`) are measured where their checkpoints lie under `runs/`. The output grows point by point; points
it already holds are not measured again unless the weights have changed. The last line on stdout is the JSON document.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dmax.checkpoint import weights_digest
from dmax.environment import environment
from dmax.evaluation.run import evaluate, write_atomically
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tasks import get_task


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of the plot: a model, how it is decoded, and the thresholds to try."""

    label: str
    model: str
    strategy: str
    thresholds: tuple[float, ...]
    soft_inputs: bool = True


PUSHED = (0.0, 0.2, 0.3, 0.5, 0.7, 0.9)
CURVES = (
    Curve("base, threshold", "tiny-base", "threshold", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
    Curve("base, SPD", "tiny-base", "spd", PUSHED),
    Curve("DMax, SPD", "tiny-dmax", "spd", PUSHED),
    Curve("DMax, hard feedback", "tiny-dmax", "spd", PUSHED, soft_inputs=False),
    Curve("DMax, threshold", "tiny-dmax", "threshold", (0.3, 0.5, 0.7, 0.9, 0.95)),
    Curve("argmax rollouts, SPD", "runs/tiny-oput-argmax", "spd", PUSHED),
    Curve("argmax rollouts, hard feedback", "runs/tiny-oput-argmax", "spd", PUSHED, soft_inputs=False),
    Curve("masks only, SPD", "runs/tiny-mdlm", "spd", PUSHED),
    Curve("masks only, threshold", "runs/tiny-mdlm", "threshold", (0.1, 0.3, 0.5, 0.7, 0.9, 0.95)),
    Curve("random tokens, SPD", "runs/tiny-uniform", "spd", PUSHED),
    Curve("random tokens, hard feedback", "runs/tiny-uniform", "spd", PUSHED, soft_inputs=False),
)


def main() -> None:
    """Measure what is missing, write it down, draw it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=int, default=500, help="problems")
    parser.add_argument("--seed", type=int, default=7, help="of the problems")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--only", nargs="*", help="labels of the curves to measure")
    parser.add_argument("--output", type=Path, default=Path("bench/results/tiny.json"))
    parser.add_argument("--plot", type=Path, help="SVG to draw (needs matplotlib)")
    options = parser.parse_args()
    record = json.loads(options.output.read_text()) if options.output.exists() else {"points": []}
    record |= {"environment": environment(), "limit": options.limit, "seed": options.seed}
    for curve in CURVES:
        wanted = not options.only or curve.label in options.only
        if not wanted or (curve.model.startswith("runs/") and not Path(curve.model).is_dir()):
            continue
        llm = LLM(curve.model, max_batch_size=options.batch_size)
        weights = weights_digest(llm.model)
        stale = [p for p in record["points"] if p["label"] == curve.label and p["weights"] != weights]
        record["points"] = [p for p in record["points"] if p not in stale]
        for threshold in (t for t in curve.thresholds if not _has(record, curve, t, options.limit)):
            point = _measure(llm, curve, threshold, options)
            record["points"].append(point)
            write_atomically(options.output, json.dumps(record, indent=1) + "\n")
            print(_line(point), flush=True)
    if options.plot:
        plot(record, options.plot)
    print(json.dumps(record))


def _has(record: dict[str, Any], curve: Curve, threshold: float, limit: int) -> bool:
    key = (curve.label, threshold, limit)
    return any((p["label"], p["threshold"], p["total"]) == key for p in record["points"])


def _measure(llm: LLM, curve: Curve, threshold: float, options: argparse.Namespace) -> dict[str, Any]:
    task = get_task("word_problems")
    params = DecodingParams(
        strategy=curve.strategy,
        threshold=threshold,
        soft_inputs=curve.soft_inputs,
        max_new_tokens=task.max_new_tokens,
    )
    summary, _ = evaluate(llm, task, params, limit=options.limit, seed=options.seed, model_name=curve.model)
    kept = ("weights", "accuracy", "correct", "total", "interval", "tpf", "tpf_paper", "generated_tokens")
    more = ("num_forwards", "num_prefill_forwards", "num_commit_forwards", "tokens_per_second", "batch_size")
    figures = {name: value for name, value in asdict(summary).items() if name in kept + more}
    settings = {"strategy": curve.strategy, "threshold": threshold, "soft_inputs": curve.soft_inputs}
    return {"label": curve.label, "model": curve.model, **settings, **figures, "threads": torch.get_num_threads()}


def _line(point: dict[str, Any]) -> str:
    share = f"{point['correct']}/{point['total']}"
    return f"{point['label']:32} threshold {point['threshold']:<5g} {share:>9} TPF {point['tpf']:.2f}"


def plot(record: dict[str, Any], path: Path) -> None:
    """Accuracy against TPF with 95 % intervals; markers and dashes keep the lines apart without colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.2))
    colours = ("#000000", "#999999", "#D55E00", "#E69F00", "#0072B2", "#56B4E9", "#009E73", "#CC79A7")
    labels = list(dict.fromkeys(point["label"] for point in record["points"]))
    for index, label in enumerate(labels):
        points = sorted((p for p in record["points"] if p["label"] == label), key=lambda p: p["tpf"])
        shares = [100 * p["accuracy"] for p in points]
        low = [s - 100 * p["interval"][0] for s, p in zip(shares, points, strict=True)]
        high = [100 * p["interval"][1] - s for s, p in zip(shares, points, strict=True)]
        axes.errorbar(
            [p["tpf"] for p in points],
            shares,
            yerr=(low, high),
            label=label,
            color=colours[index % len(colours)],
            marker="os^Dv<>P*X"[index % 10],
            linestyle=("-", "--", "-.", ":")[index % 4],
            linewidth=2.2 if label == "DMax, SPD" else 1.2,
            markersize=4,
            capsize=2,
        )
    axes.set_xlabel("tokens per forward (TPF)")
    axes.set_ylabel(f"correct answers, % of {record['limit']}")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main()
