"""Decode the models of all stages, and ask the autoregressive original about what they wrote."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dmax.environment import select_device, select_dtype, weights_digest
from dmax.evaluation.results import ResultFiles
from dmax.evaluation.run import evaluate
from dmax.evaluation.sweep import Curve, is_decoded_so
from dmax.files import read_record
from dmax.llm import LLM
from dmax.tasks import Task
from smollm.likelihood import CrossEntropy, cross_entropy
from smollm.size import Size

Point = dict[str, Any]
SEED = 7  # of the decoded problems
AUTOREGRESSIVE = "autoregressive"
STOPPED = "stop"


def dtype() -> torch.dtype:
    """In which models decode, and the judge reads: what the hardware computes in."""
    return select_dtype("auto", select_device())


def slug(curve: Curve, value: float) -> str:
    """The file name of a point."""
    name = curve.label.replace(", ", "-").replace(" ", "-")
    return name if curve.strategy == AUTOREGRESSIVE else f"{name}-{value:g}"


def decode(size: Size, curve: Curve, value: float, task: Task, llm: LLM) -> Point:
    """One point of a curve, from the files of earlier if they are of the same weights and settings.

    An interrupted evaluation goes on where it stopped.

    Args:
        size: where files lie, and how many problems.
        curve: a model, and how it is decoded.
        value: of its threshold.
        task: what is decoded.
        llm: what `open_model` gives for the curve.
    """
    path = size.evaluations / f"{slug(curve, value)}.json"
    params = curve.params(value, task.max_new_tokens)
    if path.exists():
        held: Point = read_record(path) or {}
        asked: Point = {"weights": weights_digest(llm.model), "task": task.name}
        asked |= {"limit": size.limit, "seed": SEED}
        if held.items() >= asked.items() and is_decoded_so(held["params"], params):
            return held
    size.evaluations.mkdir(parents=True, exist_ok=True)
    files = ResultFiles(path, overwrite=True)
    summary, samples = evaluate(
        llm,
        task,
        params,
        limit=size.limit,
        seed=SEED,
        model_name=curve.model,
        journal=files,
    )
    files.finish(summary, samples)
    return dict(json.loads(path.read_text()))


def open_model(size: Size, curve: Curve) -> LLM:
    """A model as its curve decodes it: an autoregressive one in blocks of one token."""
    if curve.strategy == AUTOREGRESSIVE:
        return LLM(curve.model, dtype(), block_length=1, shift=True, max_batch_size=size.batch_size)
    return LLM(curve.model, dtype(), max_batch_size=size.batch_size)


class Judge:
    """An autoregressive model that says how likely it finds what was written.

    Args:
        folder: of the model.

    Attributes:
        weights: digest of its weights.
    """

    def __init__(self, folder: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype())
        self._model = model.eval().to(select_device())
        self.weights = weights_digest(self._model)

    def evaluation(self, path: Path) -> CrossEntropy:
        """What it says of the answers of an evaluation, whose summary is in the file."""
        lines = path.with_name(f"{path.stem}.samples.jsonl").read_text(encoding="utf-8")
        return self._of([json.loads(line) for line in lines.splitlines()])

    def references(self, task: Task, limit: int) -> CrossEntropy:
        """What it says of the solutions that the task itself has for the same problems."""
        return self._of(
            {"prompt": each.prompt, "output": each.reference, "finish_reason": STOPPED}
            for each in task.examples(limit, SEED)
        )

    def _of(self, samples: Iterable[Mapping[str, Any]]) -> CrossEntropy:
        return cross_entropy(self._model, [written(self._tokenizer, each) for each in samples])


def written(tokenizer: Any, sample: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """The ids of a prompt and of its answer, with an EOS if the answer ends by itself."""
    chat = [{"role": "user", "content": sample["prompt"]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
    answer = list(tokenizer(sample["output"], add_special_tokens=False)["input_ids"])
    if sample["finish_reason"] == STOPPED:
        answer.append(tokenizer.eos_token_id)
    return list(prompt["input_ids"]), answer
