"""Self-distillation: the model's own responses to prompts, which OPUT learns from (paper, 4.1).

Responses are decoded at a conservative threshold, unfinished ones are set apart, and nothing
filters for correctness (A22 in docs/paper.md). The files grow line by line, so an interrupted run
goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from dmax.engine.request import Request
from dmax.errors import InputError
from dmax.files import (
    append,
    check_writable,
    drop_unfinished_line,
    json_lines,
    read_lines,
    writing,
)
from dmax.llm import LLM
from dmax.outputs import GenerationOutput
from dmax.params import DecodingParams


@dataclass(frozen=True, slots=True)
class DistillReport:
    """What came of the prompts, those of earlier parts of the run included.

    Attributes:
        prompts: how many there are.
        kept: responses that ended by themselves.
        unfinished: responses that did not, or that are empty.
    """

    prompts: int
    kept: int
    unfinished: int


def distill(
    llm: LLM,
    prompts: Sequence[str],
    output: Path,
    params: DecodingParams,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DistillReport:
    """Append a line `{"index", "prompt", "response"}` to `output` for every prompt without one.

    Lines come in the order in which responses are finished; `index` is the number of the prompt.
    Unfinished responses go to `<output>.unfinished.jsonl`, so that a resumed run does not decode
    them again.

    Args:
        llm: its `max_batch_size` prompts are decoded at a time.
        prompts: texts; each is one user message.
        output: JSONL file; one that this function wrote for these prompts is continued.
        params: how to decode.
        progress: told how many of how many prompts are done.

    Raises:
        InputError: a file holds lines that are not responses to these prompts, or cannot be
            written.
    """
    check_writable(output)
    apart = output.with_suffix(".unfinished.jsonl")
    kept = _answered(output, prompts)
    unfinished = _answered(apart, prompts)
    for file in (output, apart):  # only now that both are known to be ours
        append(file, "")
        drop_unfinished_line(file)

    done = kept | unfinished
    waiting = {index: prompt for index, prompt in enumerate(prompts) if index not in done}
    for index, response in _responses(llm, waiting, params):
        is_finished = response.finish_reason == "stop" and bool(response.text.strip())
        append(output if is_finished else apart, _line(index, prompts[index], response.text))
        (kept if is_finished else unfinished).add(index)
        progress(len(kept) + len(unfinished), len(prompts))
    return DistillReport(len(prompts), len(kept), len(unfinished))


def _responses(
    llm: LLM, prompts: Mapping[int, str], params: DecodingParams
) -> Iterator[tuple[int, GenerationOutput]]:
    """Number and output of every prompt, as soon as it is finished.

    The next prompt takes the place of one that is finished, so the batch stays full. The longest
    goes first: the engine plans its memory for it, and all others fit.
    """
    if not prompts:
        return
    messages = {index: [{"role": "user", "content": text}] for index, text in prompts.items()}
    longest = max(messages, key=lambda index: len(llm.encode(messages[index])))
    others = [index for index in messages if index != longest]
    waiting = iter([longest, *others])
    batch_size = min(llm.options.max_batch_size, len(prompts))
    engine = llm.engine(params.block_length, max_batch_size=batch_size)
    requests: dict[int, Request] = {}

    def add(count: int) -> None:
        for index in islice(waiting, count):
            requests[index] = llm.request(index, messages[index], params)
            engine.add(requests[index])

    add(batch_size)
    while engine.is_busy():
        for event in engine.step():
            if event.kind == "finished":
                request = requests.pop(event.index)
                yield event.index, llm.output(request, event)
                add(1)


def _answered(file: Path, prompts: Sequence[str]) -> set[int]:
    """Numbers of the prompts that a file answers already; raises `InputError` if it is not ours."""
    with writing(file):
        lines, rest = read_lines(file)
    answered: set[int] = set()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            index = record["index"]
            is_ours = isinstance(index, int) and index >= 0 and prompts[index] == record["prompt"]
        except (ValueError, LookupError, TypeError):
            is_ours = False
        if not is_ours:
            raise InputError(
                f"{file}:{number} answers another prompt", hint="choose a new output file"
            )
        answered.add(index)
    if rest and not _is_beginning(rest, prompts, is_first=not lines):
        raise InputError(
            f"{file}:{len(lines) + 1} is no response to a prompt", hint="choose a new output file"
        )
    return answered


def _is_beginning(rest: bytes, prompts: Sequence[str], *, is_first: bool) -> bool:
    """Whether the rest of a file is the beginning of a line of ours that was cut off."""
    if is_first and not rest.startswith(b'{"index": '):
        return False  # too little to say whose it is
    beginnings = [
        _line(index, prompt, response="").removesuffix('"}\n').encode()
        for index, prompt in enumerate(prompts)
    ]
    return any(each.startswith(rest) or rest.startswith(each) for each in beginnings)


def _line(index: int, prompt: str, response: str) -> str:
    record = {"index": index, "prompt": prompt, "response": response}
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_prompts(path: Path) -> list[str]:
    """The `prompt` (or `question`) of every line of a JSONL file.

    Raises:
        InputError: the file is missing or empty, or a line has no prompt; names file and line.
    """
    if not path.is_file():
        raise InputError(f"prompts `{path}` is not a file")
    prompts = []
    for where, record in json_lines(path):
        prompt = record.get("prompt", record.get("question")) if isinstance(record, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"{where}: no `prompt`")
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"prompts `{path}` is empty")
    return prompts
