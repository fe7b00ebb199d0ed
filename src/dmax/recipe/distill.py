"""Self-distillation: the model's own responses to prompts, which OPUT learns from (paper, 4.1).

Responses are decoded at a conservative threshold, unfinished ones are set apart, and nothing
filters for correctness (A22 in docs/paper.md). The files grow line by line, so an interrupted run
goes on where it stopped, if the manifest beside them names the same model, settings and version.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dmax import __version__
from dmax.chat_template import tokenizer_digest
from dmax.decoding import get_strategy
from dmax.engine.request import Request
from dmax.environment import weights_digest
from dmax.errors import InputError, shorten, show
from dmax.files import (
    append,
    changes,
    check_writable,
    drop_unfinished_line,
    json_lines,
    read_lines,
    write_atomically,
    writing,
)
from dmax.llm import LLM
from dmax.messages import read_messages
from dmax.outputs import GenerationOutput
from dmax.params import DecodingParams

OPENING = b'{"index": '
"""How every line of responses begins."""
ANEW = "choose a new output file, or move the earlier one away"


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


@dataclass(frozen=True, slots=True)
class Answers:
    """What the files of an earlier run hold.

    Attributes:
        kept: numbers of the prompts with a response that ended by itself.
        unfinished: of those with another one.
        exist: whether there is anything in the files.
    """

    kept: frozenset[int]
    unfinished: frozenset[int]
    exist: bool


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
    them again. `<output>.manifest.json` says what the responses depend on; it is there before the
    first of them.

    Args:
        llm: its `max_batch_size` prompts are decoded at a time.
        prompts: texts; each is one user message.
        output: JSONL file; one that this function wrote for these prompts is continued.
        params: how to decode.
        progress: told how many of how many prompts are done.

    Raises:
        InputError: a file holds lines that are not responses to these prompts, or responses of
            another model, other settings or another version; or it cannot be written.
    """
    answers = check_outputs(output, prompts)
    settings = _settings(llm, params)
    manifest = _manifest(output)
    if answers.exist:
        _check_same(manifest, settings)

    kept = set(answers.kept)
    unfinished = set(answers.unfinished)
    done = kept | unfinished
    waiting = {index: prompt for index, prompt in enumerate(prompts) if index not in done}
    responses = _responses(llm, waiting, params)
    for index, response in responses:
        if len(kept) + len(unfinished) == len(done):  # the first one: now there is what to keep
            _begin(output, settings)
        is_finished = response.finish_reason == "stop" and bool(response.text.strip())
        file = output if is_finished else _apart(output)
        append(file, _line(index, prompts[index], response.text))
        (kept if is_finished else unfinished).add(index)
        progress(len(kept) + len(unfinished), len(prompts))
    return DistillReport(len(prompts), len(kept), len(unfinished))


def check_outputs(output: Path, prompts: Sequence[str]) -> Answers:
    """What the files of an earlier run answer; asked before a model is loaded, and changes nothing.

    Raises:
        InputError: as `check_files`, or a file holds something that is not of these prompts.
    """
    check_files(output)
    kept, is_begun = _answered(output, prompts)
    unfinished, is_apart_begun = _answered(_apart(output), prompts)
    return Answers(kept, unfinished, is_begun or is_apart_begun)


def check_files(output: Path) -> None:
    """Make sure that a run can write here, or go on; asked before there are any prompts.

    Raises:
        InputError: a file cannot be written, is not of a distillation, or nothing says what its
            responses depend on.
    """
    check_writable(output)
    check_writable(_apart(output))
    for file in (output, _apart(output)):
        beginning = _beginning(file)
        if beginning and beginning != OPENING:
            raise InputError(
                f"{shorten(str(file))}:1 is no response to a prompt",
                hint="choose a new output file",
            )
        if beginning:
            _read_manifest(_manifest(output))


def _beginning(file: Path) -> bytes:
    """The first bytes of a file, as many as `OPENING` has; none if it does not exist."""
    with writing(file):
        if not file.exists():
            return b""
        with file.open("rb") as opened:
            return opened.read(len(OPENING))


def _begin(output: Path, settings: Mapping[str, Any]) -> None:
    """Make the files ready for the first line."""
    write_atomically(_manifest(output), json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    for file in (output, _apart(output)):
        append(file, "")
        drop_unfinished_line(file)


def _settings(llm: LLM, params: DecodingParams) -> dict[str, Any]:
    """All that a response depends on, as JSON has it, but for the last bits of a number.

    These may depend on the device and on how many prompts are decoded together, which may change.
    """
    resolved = llm.resolve(params)
    settings = {
        "dmax": __version__,
        "weights": weights_digest(llm.model),
        "dtype": str(llm.model.dtype).removeprefix("torch."),
        "tokenizer": tokenizer_digest(llm.tokenizer),
        "special_ids": asdict(llm.checkpoint.special_ids),
        "params": asdict(resolved),
        "decoding": repr(get_strategy(resolved)),  # with the digest of a head
    }
    return dict(json.loads(json.dumps(settings)))


def _apart(output: Path) -> Path:
    return output.with_suffix(".unfinished.jsonl")


def _manifest(output: Path) -> Path:
    return output.with_suffix(".manifest.json")


def _read_manifest(manifest: Path) -> dict[str, Any]:
    try:
        settings = json.loads(manifest.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{manifest} is missing, which says what wrote the responses beside it", hint=ANEW
        ) from None
    except (OSError, ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{manifest} is not the manifest of a distillation", hint=ANEW)
    return settings


def _check_same(manifest: Path, settings: Mapping[str, Any]) -> None:
    differing = [
        f"`{shorten(name)}` was {show(old)} and is {show(new)}"
        for name, old, new in changes(_read_manifest(manifest), settings)
    ]
    if differing:
        raise InputError(
            f"the responses beside {manifest} are of another run: {', '.join(differing)}", hint=ANEW
        )


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


def _answered(file: Path, prompts: Sequence[str]) -> tuple[frozenset[int], bool]:
    """Numbers of the prompts that a file answers already, and whether anything stands in it.

    Raises:
        InputError: it is not ours.
    """
    lines, rest = read_lines(file)
    answered: set[int] = set()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            index = record["index"]
            is_ours = isinstance(index, int) and index >= 0 and prompts[index] == record["prompt"]
        except (ValueError, LookupError, TypeError, RecursionError):
            is_ours = False
        if not is_ours:
            raise InputError(
                f"{file}:{number} answers another prompt", hint="choose a new output file"
            )
        answered.add(index)
    if rest and not _is_beginning(rest, prompts):
        raise InputError(
            f"{file}:{len(lines) + 1} is no response to a prompt", hint="choose a new output file"
        )
    return frozenset(answered), bool(lines or rest)


def _is_beginning(rest: bytes, prompts: Sequence[str]) -> bool:
    """Whether the rest of a file is the beginning of a line of ours that was cut off."""
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
    if not path.exists():
        raise InputError(f"prompts `{path}` is not a file")
    prompts = []
    for where, record in json_lines(path):
        prompt = record.get("prompt", record.get("question")) if isinstance(record, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"{where}: no `prompt`")
        try:
            read_messages([{"role": "user", "content": prompt}])
        except InputError as error:
            raise InputError(f"{where}: {error.message}", error.hint) from None
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"prompts `{path}` is empty")
    return prompts
