"""Whether the row of EOS in the input table learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import CONFIG, write_recipe
from torch import Tensor, nn

from dmax.checkpoint import Checkpoint, load_checkpoint
from dmax.recipe.run import run_recipe
from dmax.recipe.sections import load_recipe
from dmax.training.embedding import without_gradient
from dmax.training.trainer import DMaxTrainer

pytest.importorskip("accelerate")

LLAMA = {
    "model_type": "llama",
    "block_length": 8,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


def train(folder: Path, model: dict[str, Any], **training: Any) -> tuple[Checkpoint, Checkpoint]:
    """The model of a run after its first step and after its third, without weight decay."""
    folder.mkdir()
    options = {
        "max_steps": 3,
        "save_steps": 1,
        "weight_decay": 0.0,
        "lr_scheduler_type": "constant",
    }
    path = write_recipe(folder, model=model, training=options | {"warmup_steps": 0} | training)
    end = run_recipe(load_recipe(path))
    first = folder / "out-run" / "checkpoint-1"
    before, after = (
        load_checkpoint(each, dtype=torch.float32, device="cpu") for each in (first, end)
    )
    return before, after


def learnt(before: Checkpoint, after: Checkpoint) -> tuple[list[int], list[int]]:
    """Rows that differ: of the input table, and of the head."""

    def changed(one: Tensor, other: Tensor) -> list[int]:
        return (one != other).any(dim=1).nonzero()[:, 0].tolist()

    models: list[Any] = [before.model, after.model]
    inputs = [model.get_input_embeddings().weight for model in models]
    heads = [model.get_output_embeddings().weight for model in models]
    return changed(*inputs), changed(*heads)


@pytest.mark.parametrize("config", [CONFIG, LLAMA], ids=["llada2_moe", "llama"])
@pytest.mark.parametrize("learns", [False, True])
def test_the_row_of_eos_learns_only_if_it_is_asked_to(
    tmp_path: Path, config: dict[str, Any], learns: bool
) -> None:
    """Llama's own class has the padding, which is EOS here, as its `padding_idx`."""
    runs = train(tmp_path / "run", {"config": config}, train_eos_embedding=learns)
    special_ids = runs[0].special_ids
    inputs, heads = learnt(*runs)
    assert special_ids.mask_token_id in inputs
    assert (special_ids.eos_token_ids[0] in inputs) == learns
    assert special_ids.eos_token_ids[0] in heads


def test_without_being_asked_it_does_not(tmp_path: Path) -> None:
    inputs, _ = learnt(*(runs := train(tmp_path / "run", {"config": CONFIG})))
    assert inputs and runs[0].special_ids.eos_token_ids[0] not in inputs


def test_a_tied_head_moves_the_row(tmp_path: Path) -> None:
    tied = {"config": LLAMA | {"tie_word_embeddings": True}}
    inputs, heads = learnt(*(runs := train(tmp_path / "run", tied)))
    assert inputs == heads
    assert runs[0].special_ids.eos_token_ids[0] in inputs


def test_padding_idx_is_back_after_a_step_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[nn.Embedding, int | None]] = []

    def fails(self: DMaxTrainer, *_: Any, **__: Any) -> Any:
        table: Any = self.model.get_input_embeddings()
        seen.append((table, table.padding_idx))
        raise KeyboardInterrupt

    monkeypatch.setattr(DMaxTrainer, "compute_loss", fails)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load_recipe(write_recipe(tmp_path, model={"config": CONFIG})))
    [(table, within)] = seen
    assert within is not None and table.padding_idx is None


def test_tables_within_adapters_are_found() -> None:
    """peft wraps a table that it trains, and keeps the original beside its copy."""
    wrapped = nn.ModuleDict({"original": nn.Embedding(4, 2, 1), "copy": nn.Embedding(4, 2)})
    with without_gradient(wrapped, 3):
        wrapped["copy"](torch.tensor([2, 3])).sum().backward()
        assert [table.padding_idx for table in wrapped.values()] == [3, 3]
    assert [table.padding_idx for table in wrapped.values()] == [1, None]
    assert wrapped["copy"].weight.grad.any(dim=1).tolist() == [False, False, True, False]
