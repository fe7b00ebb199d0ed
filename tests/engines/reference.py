"""What `dmax.LLM` decodes, for the engines to be compared with: prompts, token ids and forwards.

    .venv/bin/python tests/engines/reference.py .engines/reference.json

All of it is greedy or seeded, so that a request does not depend on its neighbours in a batch; in
float32 to the last bit. The file holds groups of requests by name. `load` reads them in an engine's
environment, which needs no more of dmax than its parameters.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmax.params import DecodingParams

if TYPE_CHECKING:
    from dmax.llm import LLM

MODEL = "tiny-dmax"
OTHERS: dict[str, dict[str, Any]] = {
    "base": {"model": "tiny-base", "dtype": "float32"},
    "bfloat16": {"model": MODEL, "dtype": "bfloat16"},
    "alone": {"model": MODEL, "dtype": "bfloat16", "max_batch_size": 1},
}
"""Models of the groups whose name begins with one of these words."""
BLOCK = 32
NUM_PROMPTS = 64
NUM_DRAWN = 400
"""Problems, of which the first one of each tail is taken besides."""
CONTEXT = 128
"""Positions of the engines that are to reach their limit."""
SPD = DecodingParams(strategy="spd", max_new_tokens=96)
STRATEGIES: dict[str, DecodingParams] = {
    "spd": SPD,
    "threshold": replace(SPD, strategy="threshold"),
    "spd_top_3": replace(SPD, top_k=3),
    "spd_careful": replace(SPD, threshold=0.9, stop_confidence=0.99),
    "joint_threshold": replace(SPD, strategy="joint_threshold"),
    "autoregressive": replace(SPD, strategy="autoregressive", max_new_tokens=40),
    "credit": replace(SPD, strategy="credit"),
    "dparallel": replace(SPD, strategy="dparallel"),
    "entropy_bound": replace(SPD, strategy="entropy_bound"),
    "fast_dllm": replace(SPD, strategy="fast_dllm"),
    "fast_dllm_factor": replace(SPD, strategy="fast_dllm_factor"),
    "hierarchy": replace(SPD, strategy="hierarchy"),
    "iter_smooth": replace(SPD, strategy="iter_smooth"),
    "llada": replace(SPD, strategy="llada"),
    "sched": replace(SPD, strategy="sched"),
}
"""Every strategy with one open block, beside some settings of SPD."""


Rows = list[tuple[tuple[int, ...], DecodingParams]]
"""Prompts, and how each is decoded."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A request, and what `dmax.LLM` makes of it.

    Attributes:
        prompt: token ids.
        params: how it is decoded; the strategy is never "auto".
        token_ids: the completion, cut at the first EOS.
        text: of the completion.
        num_forwards: denoising forwards.
        finish_reason: "stop" or "length".
    """

    prompt: tuple[int, ...]
    params: DecodingParams
    token_ids: tuple[int, ...]
    text: str
    num_forwards: int
    finish_reason: str


def load(group: str) -> list[Wanted]:
    """The requests of a group, from the file that the environment variable DMAX_REFERENCE names."""
    groups = json.loads(Path(os.environ["DMAX_REFERENCE"]).read_text("utf-8"))["groups"]
    return [
        Wanted(
            prompt=tuple(row["prompt"]),
            params=DecodingParams(**row["params"]),
            token_ids=tuple(row["token_ids"]),
            text=row["text"],
            num_forwards=row["num_forwards"],
            finish_reason=row["finish_reason"],
        )
        for row in groups[group]
    ]


def texts() -> list[str]:
    """The prompts of the group "spd" as texts."""
    found: list[str] = json.loads(Path(os.environ["DMAX_REFERENCE"]).read_text("utf-8"))["texts"]
    return found


def model_path(name: str = MODEL) -> str:
    """The folder of a bundled model, which engines take in place of its name."""
    from dmax.tiny import bundled

    return str(bundled(name))


def requests(
    all_prompts: Sequence[tuple[int, ...]], answers: Sequence[tuple[int, ...]]
) -> dict[str, Rows]:
    """Groups of requests by name.

    Args:
        all_prompts: token ids of problems, of so many lengths that every tail is among them.
        answers: completions of the first of them by SPD.
    """
    prompts = all_prompts[:NUM_PROMPTS]
    first = prompts[:8]
    groups: dict[str, Rows]
    groups = {name: [(prompt, params) for prompt in first] for name, params in STRATEGIES.items()}
    groups["64_spd"] = [(prompt, SPD) for prompt in prompts]
    groups["64_threshold"] = [(prompt, STRATEGIES["threshold"]) for prompt in prompts]
    kinds = list(STRATEGIES.values())
    thresholds = (None, 0.3, 0.7, 0.95)
    groups["mixed"] = [
        (prompt, replace(kinds[index % len(kinds)], threshold=thresholds[index % 4]))
        for index, prompt in enumerate(prompts[:32])
    ]
    by_tail = {len(prompt) % BLOCK: prompt for prompt in reversed(all_prompts)}
    groups["tails"] = [(by_tail[tail], SPD) for tail in range(BLOCK)]
    # Half a question leaves SPD without an end in sight: there the last bit of a product decides.
    longest = max(prompts, key=len)
    cut = (longest[:length] for length in (1, 2, 7, 16, 30, 31, 32, 33))
    groups["short"] = [(prompt, STRATEGIES["threshold"]) for prompt in cut]
    # All of the answer is given, so that the block that the prompt ends in holds the EOS.
    groups["eos_first"] = [
        ((*prompt, *answer), SPD) for prompt, answer in zip(first, answers[:8], strict=True)
    ]
    groups["eos_ignored"] = [(prompt, replace(SPD, ignore_eos=True)) for prompt in first[:4]]
    groups["few_tokens"] = [
        (prompt, replace(SPD, max_new_tokens=count))
        for prompt, count in zip(first, (1, 2, 5, 31, 32, 33, 64, 65), strict=True)
    ]
    groups["context"] = [
        (prompt, replace(SPD, max_new_tokens=CONTEXT - len(prompt), ignore_eos=True))
        for prompt in (*first, longest[:1], longest[:31], longest[:32])
    ]
    sampled = (replace(SPD, temperature=1.5, seed=seed) for seed in range(8))
    groups["sampled"] = list(zip(first, sampled, strict=True))
    for word in ("bfloat16", "alone"):  # our own engine rounds otherwise at another batch size
        groups[f"{word}_spd"] = groups["64_spd"]
        groups[f"{word}_threshold"] = groups["64_threshold"]
    learned = replace(SPD, strategy="learn2pd", options={"head": "tiny-base"})
    groups["base_learn2pd"] = [(prompt, learned) for prompt in first]
    groups["base_joint_threshold"] = groups["joint_threshold"]
    groups["base_threshold"] = groups["threshold"]
    return groups


def decode(rows: Rows, llm: LLM) -> list[dict[str, Any]]:
    """Requests with what a model makes of them, ready for JSON."""
    outputs = llm.generate([list(prompt) for prompt, _ in rows], [params for _, params in rows])
    return [
        {
            "prompt": prompt,
            "params": asdict(params),
            "token_ids": output.token_ids,
            "text": output.text,
            "num_forwards": output.num_forwards,
            "finish_reason": output.finish_reason,
        }
        for (prompt, params), output in zip(rows, outputs, strict=True)
    ]


def main() -> None:
    """Decode and write."""
    from transformers.utils import logging

    from dmax.llm import LLM
    from dmax.tasks import get_task

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output

    logging.disable_progress_bar()
    llm = LLM(MODEL, dtype="float32", device="cpu")
    others = {word: LLM(device="cpu", **options) for word, options in OTHERS.items()}
    questions = [example.prompt for example in get_task("word_problems").examples(NUM_DRAWN, 0)]
    prompts = [llm.encode(question) for question in questions]
    answers = [done.token_ids for done in llm.generate([list(ids) for ids in prompts[:8]], SPD)]
    groups = {
        name: decode(rows, others.get(name.partition("_")[0], llm))
        for name, rows in requests(prompts, answers).items()
    }
    output.write_text(json.dumps({"texts": questions, "groups": groups}), "utf-8")


if __name__ == "__main__":
    main()
