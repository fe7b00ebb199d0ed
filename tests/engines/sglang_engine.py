"""SGLang on a CPU, and what it must answer: the token ids and the forwards of `dmax.LLM`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reference import Wanted, model_path
from safetensors.torch import load_file, save_file

from dmax.integrations.sglang.completer import sampling

EOS = 976  # of the bundled models

OPTIONS: dict[str, Any] = {
    "attention_backend": "torch_native",
    "device": "cpu",
    "disable_cuda_graph": True,
    "dtype": "float32",
    "log_level": "warning",
    "max_running_requests": 4,
    "max_total_tokens": 4096,
    "mem_fraction_static": 0.05,
    "sampling_backend": "pytorch",
    "skip_server_warmup": True,
}
"""None of them is about DMax: the plugin chooses its algorithm from the checkpoint."""


@contextmanager
def running(**options: Any) -> Iterator[Any]:
    """An engine in processes of its own."""
    import sglang

    engine = sglang.Engine(**{"model_path": model_path(), **OPTIONS, **options})
    try:
        yield engine
    finally:
        engine.shutdown()


def answers(engine: Any, wanted: Sequence[Wanted]) -> list[dict[str, Any]]:
    """What the engine makes of requests, all of them at once."""
    prompts = [list(each.prompt) for each in wanted]
    found: list[dict[str, Any]] = engine.generate(
        input_ids=prompts, sampling_params=[sampling(each.params) for each in wanted]
    )
    return found


def token_ids(answer: dict[str, Any]) -> tuple[int, ...]:
    """The completion, cut at its EOS as `dmax.LLM` cuts it."""
    ids = answer["output_ids"]
    ends_in_eos = answer["meta_info"]["finish_reason"].get("matched") == EOS
    return tuple(ids[:-1] if ends_in_eos else ids)


def num_forwards(answer: dict[str, Any]) -> int:
    """Denoising forwards of a completion."""
    count: int = answer["meta_info"]["dmax_num_forwards"][-1]
    return count


def differences(found: Sequence[dict[str, Any]], wanted: Sequence[Wanted]) -> list[str]:
    """What is not as `dmax.LLM` has it, one line for each request that differs."""
    assert len(found) == len(wanted) > 0
    lines = []
    for index, (answer, right) in enumerate(zip(found, wanted, strict=True)):
        mine = (token_ids(answer), num_forwards(answer))
        theirs = (right.token_ids, right.num_forwards)
        if mine != theirs:
            lines.append(f"request {index}: {mine} and not {theirs}")
    return lines


def changed_model(folder: Path, model: str = "tiny-dmax", **changes: Any) -> str:
    """A copy of a bundled model with other settings; a value of None leaves a key out."""
    shutil.copytree(model_path(model), folder)
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8")) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    file.write_text(json.dumps(kept), "utf-8")
    return str(folder)


def broken_model(folder: Path, token: int) -> str:
    """A copy of the bundled model in which the embedding of a token is not a number."""
    path = changed_model(folder)
    for file in folder.glob("*.safetensors"):
        weights = load_file(file)
        name = "model.word_embeddings.weight"
        if name in weights:
            weights[name][token] = float("nan")
        save_file(weights, file, {"format": "pt"})
    return path
