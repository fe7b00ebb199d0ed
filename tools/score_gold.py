"""Score the gold answer of every row of a benchmark: it has to be right, strictly and as published.

    python tools/score_gold.py gsm8k=gsm8k.jsonl math500=math500.jsonl mbpp=mbpp.jsonl

A row without a worked solution answers with its gold answer in a box. What does not score right is
named by its number in the file, so that every exception can be looked at.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dmax.tasks import Example, get_task
from dmax.tasks.published import published_scorer, published_tasks


def gold_completion(task: str, example: Example) -> str:
    """What a perfect model answers."""
    is_boxed = task in ("math500", "minerva_algebra") and example.reference is None
    if task == "asdiv" or is_boxed:
        return f"So the answer is \\boxed{{{example.answer}}}."
    return example.reference or ""


def score(name: str, data: Path) -> dict[str, object]:
    """Rows, and numbers of the rows whose gold answer is wrong under each scoring."""
    task = get_task(name, data)
    is_correct = published_scorer(name)
    examples = task.examples(sys.maxsize, seed=0)
    wrong: dict[str, list[int]] = {"strict": [], "published": []}
    for number, example in enumerate(examples, 1):
        text = gold_completion(name, example)
        if not task.score(text, example):
            wrong["strict"].append(number)
        if not is_correct(text, example):
            wrong["published"].append(number)
    return {"task": name, "rows": len(examples), "wrong": wrong}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", help="TASK=FILE, the rows of a benchmark")
    for text in parser.parse_args().files:
        name, _, path = text.partition("=")
        if name not in published_tasks() or not path:
            parser.error(f"TASK=FILE with one of {', '.join(published_tasks())}, got {text}")
        print(json.dumps(score(name, Path(path))), flush=True)


if __name__ == "__main__":
    main()
