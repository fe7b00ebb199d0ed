"""The paper's experiments in miniature, on the bundled models: all that `docs/results/` shows.

    python bench/ablation_training.py   # the retrained models, about an hour on two cores
    python bench/paper.py               # decode, measure, draw, write the page

Both go on where they were interrupted. Which claims hold is computed from the figures, by the rules
of `paper_claims.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from command_line import check_page, check_plots, count, read_if_there, telling
from in_short import in_short
from noise_kinds import count_mended
from noise_plan import RECIPE_RATIO
from paper_page import TEMPLATE, page
from paper_plan import DECODING, MEASURED, TRAINING
from paper_points import Record, Results
from sweeps import sweep

from dmax.checkpoint import load_checkpoint
from dmax.environment import environment, weights_digest
from dmax.errors import InputError
from dmax.evaluation.plots import draw
from dmax.evaluation.run import evaluate
from dmax.files import check_ours, write_atomically
from dmax.llm import LLM
from dmax.params import DecodingParams
from dmax.records.encoding import encode_dataset
from dmax.tasks import get_task
from dmax.tasks.word_problems import problems
from dmax.training import noise
from dmax.training.clean_stream import CleanStream
from dmax.training.data import Collator
from dmax.training.rollout import pick
from dmax.training.vocabulary import IGNORE


def revisions(llm: LLM, questions: Sequence[str], params: DecodingParams) -> Record:
    """How often a decoded token changes.

    Returns:
        `changes`, and the `chances` of one: decoded positions, counted at every forward.
    """
    changes = 0
    chances = 0
    for question in questions:
        previous = None
        for event in llm.stream(question, params):
            if event.kind == "finished":
                break
            if previous is not None and previous.position == event.position:
                decoded = [i for i, masked in enumerate(previous.masked) if not masked]
                chances += len(decoded)
                changes += sum(previous.token_ids[i] != event.token_ids[i] for i in decoded)
            previous = event
    return {"changes": changes, "chances": chances}


@torch.no_grad()
def corrections(llm: LLM, num: int = 256) -> Record:
    """One pass over the model's own predictions: wrong tokens mended, right ones broken.

    Reference answers are masked at `RECIPE_RATIO`, predicted in one pass by argmax, and the
    predictions are predicted anew. A valid paraphrase counts as wrong, for every model alike.
    """
    data = [
        {"prompt": problem.question, "response": problem.response}
        for problem in problems(num, seed=7, split="test")
    ]
    checkpoint = llm.checkpoint
    eos = llm.checkpoint.special_ids.eos_token_ids[0]
    length = checkpoint.special_ids.block_length
    mask = checkpoint.special_ids.mask_token_id
    dataset = encode_dataset(
        data, checkpoint.tokenizer, checkpoint.special_ids, max_length=1024, end_turn=False
    )
    collate = Collator(length, eos, 0, None)
    generator = torch.Generator().manual_seed(0)
    counts = Counter[str]()
    for start in range(0, num, 32):
        inputs = collate([dataset[i] for i in range(start, min(start + 32, num))])
        clean = inputs["clean_ids"]
        labels = inputs["labels"]
        noisy = noise.mask_tokens(
            clean, inputs["corruptible"], torch.full((len(clean),), RECIPE_RATIO), mask, generator
        )
        stream = CleanStream(llm.model, clean, length)
        embed = llm.model.get_input_embeddings()
        predicted, _ = pick(stream.denoise(embed(noisy)).logits(), mask)
        was_masked = (noisy == mask) & (labels != IGNORE)
        fed = torch.where(noisy == mask, predicted, noisy)
        again, _ = pick(stream.denoise(embed(fed)).logits(), mask)
        counts["wrong"] += int((was_masked & (fed != labels)).sum())
        counts.update(count_mended(again, fed, labels, was_masked))
    return dict(counts)


def forward_times(llm: LLM, num: int = 24, repeats: int = 5) -> Record:
    """Milliseconds a forward at batch 1, threshold decoding and SPD in turn, A B A B …"""
    task = get_task("word_problems")
    ways = {
        "threshold": DecodingParams(strategy="threshold"),
        "spd": DecodingParams(strategy="spd"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, params in ways.items():
            run, _ = evaluate(llm, task, params, limit=num, seed=7)
            forwards = run.cost.num_forwards + run.cost.num_prefill_forwards
            times[name].append(1000 * run.seconds / forwards)
    pairs = zip(times["spd"], times["threshold"], strict=True)
    ratios = [spd / threshold for spd, threshold in pairs]
    return {"milliseconds": times, "ratios": ratios, "ratio": statistics.median(ratios)}


def measure(output: Path) -> Record:
    """All of the above, each written as soon as it is known.

    It is repeated for other weights only. What was measured before their digests were kept counts
    as measured: nobody can tell whose it is.
    """
    record = read_if_there(output) or {"environment": environment()}
    questions = [p.question for p in problems(64, seed=7, split="test")]
    hard = DecodingParams("spd", 0.5, options={"soft_inputs": False})
    soft = DecodingParams("spd", 0.5)
    jobs: dict[str, tuple[str, Callable[[LLM], Record]]] = {}
    for name, path in MEASURED.items():
        jobs[f"revisions, hard tokens, {name}"] = path, lambda llm: revisions(llm, questions, hard)
        jobs[f"revisions, SPD, {name}"] = path, lambda llm: revisions(llm, questions, soft)
        jobs[f"corrections, {name}"] = path, corrections
    jobs["forward times"] = "tiny-dmax", forward_times
    for name, (path, job) in jobs.items():
        held = record.get(name)
        if held is None or ("weights" in held and held["weights"] != digest(path)):
            llm = LLM(path, max_batch_size=1) if job is forward_times else LLM(path)
            record[name] = {**job(llm), "weights": digest(path)}
            print(name, json.dumps(record[name]), flush=True)
            write_atomically(output, json.dumps(record, indent=1) + "\n")
    return record


@cache
def digest(path: str) -> str:
    """Tells the weights of a model apart, on machines of any dtype alike."""
    return weights_digest(load_checkpoint(path, dtype=torch.float32, device="cpu").model)


def check_retrained() -> None:
    """Raise `InputError` now if a retrained model is missing, and not when all else is measured."""
    for model in dict.fromkeys(curve.model for curve in TRAINING):
        if not Path(model).is_dir():
            raise InputError(
                f"{model} is not there yet", hint="run `python bench/ablation_training.py` first"
            )


@telling()
def main() -> None:
    """Measure what is missing, write the page, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--limit", type=count, default=500, help="problems for a decoding setting")
    parser.add_argument(
        "--retrained-limit", type=count, default=200, help="problems for a retrained model"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    check_plots(parser)
    check_retrained()
    output = options.output
    check_ours(output / "measures.json", "environment")
    check_page(output / "README.md", TEMPLATE)

    decoding = sweep(DECODING, output / "decoding.json", options.limit)
    training = sweep(TRAINING, output / "training.json", options.retrained_limit)
    results = Results(decoding, training, measure(output / "measures.json"))
    shown = [
        p for p in decoding["points"] if "block" not in p["label"] and "top-k" not in p["label"]
    ]
    picture = output / "decoding.svg"
    draw({**decoding, "points": shown}, picture, ours="DMax, SPD", against="base, threshold")
    write_atomically(output / "README.md", page(results, in_short(output)))


if __name__ == "__main__":
    main()
