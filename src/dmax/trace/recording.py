"""Record a request while it is decoded, without changing a token of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmax.errors import translated
from dmax.params import DecodingParams
from dmax.trace.file import Trace
from dmax.trace.frames import Frame, Frames

if TYPE_CHECKING:
    from dmax.llm import LLM
    from dmax.prompts import Prompt

NO_NAME = "a model in memory"


@translated()
def record(
    llm: LLM, prompt: Prompt, params: DecodingParams | None = None, *, name: str | None = None
) -> Trace:
    """Decode a prompt and keep every step of it.

    Tokens and cost are those of `LLM.generate`, whatever the strategy.

    Args:
        llm: the model.
        prompt: in any form that `LLM.generate` takes for one.
        params: how it is decoded.
        name: of the model in the trace; None: that of its folder.

    Raises:
        InputError: as `LLM.generate`.
    """
    request = llm.request(0, prompt, DecodingParams() if params is None else params)
    request = replace(request, provisional=True)
    path = llm.checkpoint.path
    shown = name or (Path(path).name if path else NO_NAME)
    frames = Frames(llm, request)
    header = frames.header(shown, _as_json(prompt))
    steps = []
    with llm.submit([request]) as call:
        for event in call:
            if event.kind == "finished":
                output = frames.output(llm.output(request, event))
            else:
                steps.append(frames.frame(event))
    return Trace.from_record(run_record(header, steps, output))


def run_record(
    header: Mapping[str, Any], frames: Iterable[Frame], output: Mapping[str, Any]
) -> dict[str, Any]:
    """A whole run as a file would give it back, in plain lists.

    Args:
        header: from `Frames.header`.
        frames: in order.
        output: from `Frames.output`.
    """
    whole = {**header, "frames": [frame.as_record() for frame in frames], "output": output}
    record: dict[str, Any] = json.loads(json.dumps(whole))
    return record


def _as_json(prompt: Any) -> str | list[dict[str, Any]] | None:
    """The prompt as text or messages; None for token ids, which the header has anyway."""
    if isinstance(prompt, str):
        return prompt
    is_chat = isinstance(prompt, Sequence) and all(isinstance(each, dict) for each in prompt)
    return list(prompt) if is_chat else None
