"""Self-distillation: the model's own responses to prompts, the data that OPUT is trained on (paper section 4.1).

Responses are decoded at a conservative threshold, unfinished ones are dropped, and nothing filters
for correctness (A22). The output grows line by line, so that an interrupted run goes on where it
stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dmax.errors import InputError
from dmax.llm import LLM
from dmax.params import DecodingParams


@dataclass(frozen=True, slots=True)
class DistillReport:
    """How many prompts were answered, how many answers were dropped as unfinished, and what it took."""

    prompts: int
    kept: int
    unfinished: int


def distill(
    llm: LLM,
    prompts: Sequence[str],
    output: Path,
    params: DecodingParams,
    *,
    chunk: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DistillReport:
    """Append `{"index", "prompt", "response"}` lines to `output` for every prompt not answered there yet.

    Unfinished responses go to `<output>.unfinished.jsonl`, so that a resumed run does not decode
    them again.

    Raises:
        InputError: `output` holds lines that do not belong to these prompts, or cannot be written.
    """
    if output.is_dir():
        raise InputError(f"cannot write {output}: it is a folder", hint="name a file")
    dropped = output.with_suffix(".unfinished.jsonl")
    try:
        finished = _answered(output, prompts)
        others = _answered(dropped, prompts)
        kept = len(finished)
        unfinished = len(others)
        waiting = [index for index in range(len(prompts)) if index not in finished | others]
        output.parent.mkdir(parents=True, exist_ok=True)
        with output.open("a", encoding="utf-8") as good, dropped.open("a", encoding="utf-8") as bad:
            for start in range(0, len(waiting), chunk):
                indices = waiting[start : start + chunk]
                results = llm.generate(
                    [[{"role": "user", "content": prompts[i]}] for i in indices], params
                )
                for index, result in zip(indices, results, strict=True):
                    is_finished = result.finish_reason == "stop" and bool(result.text.strip())
                    record = {"index": index, "prompt": prompts[index], "response": result.text}
                    (good if is_finished else bad).write(
                        json.dumps(record, ensure_ascii=False) + "\n"
                    )
                    kept = kept + is_finished
                    unfinished = unfinished + (not is_finished)
                good.flush()
                bad.flush()
                progress(kept + unfinished, len(prompts))
    except OSError as error:
        raise InputError(
            f"cannot write {output}: {error.strerror}", hint="choose another output"
        ) from None
    return DistillReport(len(prompts), kept, unfinished)


def _answered(file: Path, prompts: Sequence[str]) -> set[int]:
    """Indices of the prompts a file answers already; a last line cut off by an interruption is removed."""
    if not file.exists():
        return set()
    data = file.read_bytes()
    end = data.rfind(b"\n") + 1
    if end != len(data):
        os.truncate(file, end)
    done = set()
    for number, line in enumerate(
        data[:end].split(b"\n")[:-1], 1
    ):  # texts may hold other separators of lines
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        index = record.get("index") if isinstance(record, dict) else None
        if (
            not isinstance(index, int)
            or not 0 <= index < len(prompts)
            or prompts[index] != record.get("prompt")
        ):
            raise InputError(
                f"{file}:{number} answers another prompt", hint="choose a new output file"
            )
        done.add(index)
    return done


def read_prompts(path: Path) -> list[str]:
    """Prompts of a JSONL file, one `prompt` (or `question`) a line; raises `InputError` naming file and line."""
    if not path.is_file():
        raise InputError(f"prompts `{path}` is not a file")
    prompts = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: not a JSON object ({error})") from None
        prompt = record.get("prompt", record.get("question")) if isinstance(record, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"{path}:{number}: no `prompt`")
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"prompts `{path}` is empty")
    return prompts
