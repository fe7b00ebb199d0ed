"""How finished blocks get their clean keys and values: folded into the next block's first forward, or on their own.

    python bench/commit.py --model tiny-dmax --limit 64 --repeats 3

Both ways decode the same problems in turn, A B A B …; the last line on stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any, get_args

from dmax.engine.engine import Commit
from dmax.environment import environment
from dmax.evaluation.run import evaluate
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.tasks import get_task


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-dmax")
    parser.add_argument("--limit", type=int, default=64, help="problems")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    task = get_task("word_problems")
    params = DecodingParams(strategy="spd", max_new_tokens=task.max_new_tokens)
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in get_args(Commit)}
    for repeat in range(options.repeats + 1):
        for mode in runs:
            llm = LLM(options.model, max_batch_size=options.batch_size, commit=mode)
            summary, _ = evaluate(llm, task, params, limit=options.limit, seed=7)
            if repeat:  # the first round warms up
                runs[mode].append(
                    {
                        "tokens_per_second": summary.tokens_per_second,
                        "correct": summary.correct,
                        "num_forwards": summary.num_forwards,
                        "num_commit_forwards": summary.num_commit_forwards,
                        "tpf": summary.tpf,
                    }
                )
    speeds = {mode: [run["tokens_per_second"] for run in each] for mode, each in runs.items()}
    ratios = [a / b for a, b in zip(speeds["cross_block"], speeds["separate"], strict=True)]
    for mode, each in runs.items():
        print(
            f"{mode:12} {statistics.median(speeds[mode]):8.0f} tokens/s, {each[0]['correct']}/{options.limit} correct, "
            f"{each[0]['num_forwards']} denoising + {each[0]['num_commit_forwards']} commit forwards"
        )
    print(
        f"cross_block / separate: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    print(
        json.dumps({"runs": runs, "ratios": ratios, **vars(options), "environment": environment()})
    )


if __name__ == "__main__":
    main()
