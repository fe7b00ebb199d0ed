"""Models that predict a token at the position before it, as autoregressive ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from dmax import LLM, DecodingParams
from dmax.checkpoint import load_checkpoint, new_checkpoint, save_checkpoint
from dmax.engine.batch import Batch
from dmax.engine.runner import ModelRunner
from dmax.errors import InputError
from dmax.special_ids import reads_shifted
from dmax.training.clean_stream import CleanStream

L = 8
EOS = 2
MASK = 3
# The head of gemma is not known to be linear, and that of bert is not. Bert also asks a cache how
# long it is, whatever the positions.
KINDS = ("llama", "qwen3", "gemma", "bert")
PROMPTS = ([5], [7] * 40, [9, 8, 7, 6, 5, 4, 11, 20], [12, 13] * 9, [30, 31, 32])


def config_of(kind: str, **changes: Any) -> Any:
    fields: dict[str, Any] = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=EOS,
        pad_token_id=0,
        bos_token_id=1,
    )
    if kind == "bert":
        fields |= {"is_decoder": True, "num_key_value_heads": 4}
    return CONFIG_MAPPING[kind](**(fields | changes))


def autoregressive(kind: str, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(kind)).eval()
    model.save_pretrained(folder)
    return model


def shifted(kind: str = "llama") -> Any:
    torch.manual_seed(1)
    config = config_of(kind, block_length=L, mask_token_id=MASK, shift=True)
    return new_checkpoint(config, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix_cache_mib", [0, 1])
def test_an_autoregressive_model_writes_what_transformers_does(
    kind: str, prefix_cache_mib: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts in chunks, several in a batch, and one sequence that grows while others run."""
    model = autoregressive(kind, tmp_path)
    llm = LLM(
        str(tmp_path),
        dtype="float32",
        max_batch_size=3,
        prefill_tokens=8,
        prefix_cache_mib=prefix_cache_mib,
    )
    assert "autoregressive" in caplog.text
    params = DecodingParams(max_new_tokens=40)
    for _ in range(2):  # the second time prompts come from the cache of prefixes
        outputs = llm.generate(list(PROMPTS), params)
        for prompt, output in zip(PROMPTS, outputs, strict=True):
            given = torch.tensor([prompt])
            written = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=40, do_sample=False
            )
            expected = written[0, len(prompt) :].tolist()
            assert list(output.token_ids) == [token for token in expected if token != EOS]
            assert output.num_forwards == len(expected)


def test_only_a_model_that_says_nothing_of_diffusion_is_autoregressive(tmp_path: Path) -> None:
    autoregressive("llama", tmp_path)
    with pytest.raises(InputError, match="names no block length"):
        LLM(str(tmp_path), mask_token_id=MASK)
    with pytest.raises(InputError, match="names no mask token"):
        LLM(str(tmp_path), block_length=4)
    with pytest.raises(InputError, match="names no mask token"):
        load_checkpoint(tmp_path, dtype=torch.float32, device="cpu")


def test_shift_is_of_the_model_and_stays_with_it(tmp_path: Path) -> None:
    checkpoint = shifted()
    save_checkpoint(checkpoint.model, None, tmp_path / "a", checkpoint.special_ids)
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    again = load_checkpoint(tmp_path / "a", **options)
    assert again.model.config.shift is True
    unshifted = load_checkpoint(tmp_path / "a", **options, shift=False)
    save_checkpoint(unshifted.model, None, tmp_path / "b", unshifted.special_ids)
    assert load_checkpoint(tmp_path / "b", **options).model.config.shift is False
    again.model.config.shift = None
    assert not reads_shifted(again.model.config), "null says nothing, as in the other keys"
    again.model.config.shift = "yes"
    with pytest.raises(InputError, match="`shift` must be true or false, got 'yes'") as error:
        LLM.from_checkpoint(again).generate([[1, 2, 4]], DecodingParams(max_new_tokens=8))
    assert "config.json" in str(error.value.hint)


def logits_of(model: Any, ids: Tensor, block: Tensor, *, num_pending: int, branch: bool) -> Tensor:
    """What decoding sees of a block behind `ids`, whose last blocks are not in the cache yet."""
    checkpoint_ids = shifted().special_ids
    runner = ModelRunner(model, checkpoint_ids, num_slots=2, capacity=64)
    start = len(ids)
    encoded = start - num_pending * L
    if encoded:
        runner.prefill([1], ids[None, :encoded])
    pending = [(1, position, position, -1, -1) for position in range(encoded, start, L)]
    rows = [*pending, (1, start, start, 0, -1)]
    embeds = runner.embed(block[None])
    if branch:  # another content of the same block, further behind in the cache
        rows.append((1, start + L, start, 0, -1))
        embeds = torch.cat((runner.embed(block.flip(0)[None]), embeds))
    blocks = [tuple(ids[row[1] : row[1] + L].tolist()) for row in pending]
    output = runner.forward(Batch.of(rows, blocks, L, 1 + branch), embeds)
    return output.logits[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_training_shows_what_decoding_sees(kind: str) -> None:
    """For every block, in the cache or pending, of a second stream as of the first."""
    checkpoint = shifted(kind)
    model = checkpoint.model
    embed = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(2)
    clean = torch.randint(4, 64, (1, 3 * L), generator=generator)
    masked = clean.masked_fill(torch.rand(clean.shape, generator=generator) < 0.6, MASK)
    predicted = torch.randint(4, 64, clean.shape, generator=generator)
    with torch.no_grad():
        stream = CleanStream(model, clean, L)
        trained = [stream.denoise(embed(noisy)).logits() for noisy in (masked, predicted)]
        for noisy, logits in zip((masked, predicted), trained, strict=True):
            logits[..., MASK] = -torch.inf  # decoding never writes it
            for block in range(3):
                where = slice(block * L, (block + 1) * L)
                for num_pending in range(block + 1):
                    for branch in (False, True):
                        seen = logits_of(
                            model,
                            clean[0, : block * L],
                            noisy[0, where],
                            num_pending=num_pending,
                            branch=branch,
                        )
                        torch.testing.assert_close(seen, logits[0, where], rtol=1e-9, atol=1e-9)


def test_a_token_is_predicted_at_the_position_before_it() -> None:
    """A model of one layer that only copies: what it is fed at i - 1 is what it says of i."""
    checkpoint = shifted()
    model = checkpoint.model
    clean = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20]])
    embed = model.get_input_embeddings()
    with torch.no_grad():
        for layer in model.model.layers:  # the residual stream is all that is left
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.get_output_embeddings().weight.copy_(embed.weight)
        states = CleanStream(model, clean, L).denoise(embed(clean)).values
        alone = model.base_model(inputs_embeds=embed(clean)).last_hidden_state
    torch.testing.assert_close(states[:, 1:], alone[:, :-1])
    torch.testing.assert_close(states[:, 0], alone[:, 0])
