"""From an autoregressive model to one that is decoded with SPD, by the recipes, at toy length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cli import Dmax, dmax_fixture  # noqa: F401  (fixture)
from test_convert import write

pytest.importorskip("accelerate")

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = {
    "max_steps": 6,
    "save_steps": 3,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "warmup_steps": 1,
    "use_cpu": True,
}


def shortened(folder: Path, name: str, data: Path, **training: Any) -> Path:
    """A recipe for a few steps on a CPU, which reads and writes in a folder."""
    recipe = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))
    recipe["output_dir"] = str(folder / recipe["output_dir"])
    recipe["model"]["path"] = str(folder / recipe["model"]["path"])
    recipe["data"] = {"file": str(data), "max_length": 64, "too_long": "truncate"}
    recipe["training"] |= SHORT | training
    path = folder / name
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize("shift", ["--shift", "--no-shift"])
def test_the_commands_of_the_page_end_in_a_model_for_spd(
    shift: str, tmp_path: Path, dmax: Dmax
) -> None:
    source = write(tmp_path / "source", "qwen3", vocab_size=64)
    records = [{"prompt": f"w{k}", "response": f"w{k} w{k + 1} w{k + 2}"} for k in range(12)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    converted = tmp_path / "runs" / "converted"

    made = dmax("convert", source, "-o", converted, "--block-length", 8, shift)
    assert made.code == 0, made.err
    warmup = shortened(
        tmp_path, "convert_1_warmup.yaml", data, block_warmup=[[1, 1], [2, 1], [4, 1]]
    )
    trained = dmax("train", warmup)
    assert trained.code == 0, trained.err

    answers = tmp_path / "answers.jsonl"
    base = tmp_path / "runs" / "converted-warmup"
    written = dmax(
        *("distill", "--model", base, "--prompts", data, "--output", answers),
        *("--max-new-tokens", 16, "--num", 12),
    )
    assert written.code == 0, written.err
    oput = shortened(tmp_path, "convert_2_oput.yaml", data)
    trained = dmax("train", oput)
    assert trained.code == 0, trained.err

    final = json.loads((tmp_path / "runs" / "converted-dmax" / "config.json").read_text())
    expected = {"block_length": 8, "mask_token_id": 40, "decoding_strategy": "spd"}
    assert final.items() >= (expected | {"shift": shift == "--shift"}).items()
    used = dmax(
        "generate", "--model", tmp_path / "runs" / "converted-dmax", "w1", "--max-new-tokens", 8
    )
    assert used.code == 0 and "forwards" in used.err
