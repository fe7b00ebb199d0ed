"""The frozen early layers: what they are a copy of, what they share, and what they give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small import small_llama, small_network
from torch import Tensor

from dmax.adapters import add_adapters
from dmax.attention import block_causal, dense_mask
from dmax.baselines.frozen import frozen_features
from dmax.errors import InputError
from dmax.models.backbone import decoder_layers
from dmax.training.clean_stream import CleanStream

CPU = torch.device("cpu")
BLOCK = 4
EOS = 46


@pytest.fixture(params=["llada2_moe", "llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return small_network(request.param, "eager", vocab_size=48, eos=EOS, head_dim=8)


def ids_of(length: int) -> Tensor:
    return torch.randint(EOS, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features(extractor: Any, noisy: Tensor, clean: Tensor) -> Tensor:
    embeds = extractor.get_input_embeddings()(noisy)
    return CleanStream(extractor, clean, BLOCK).denoise(embeds).values


@pytest.mark.parametrize("layer", [0, 1])
def test_they_are_the_residual_stream_behind_a_layer(model: Any, layer: int) -> None:
    kept: list[Tensor] = []
    model.eval()
    decoder_layers(model)[layer].register_forward_hook(
        lambda _module, _inputs, output: kept.append(output)
    )
    extractor = frozen_features(model, layer, CPU)
    clean = ids_of(3 * BLOCK)
    found = features(extractor, clean, clean)  # a copy that is clean sees what block-causal shows
    place = torch.arange(clean.shape[1])
    kept.clear()
    with torch.no_grad():
        model(clean, attention_mask=dense_mask(block_causal(BLOCK), place, place)[None, None])
    torch.testing.assert_close(found, kept[0], atol=1e-5, rtol=1e-5)
    assert len(decoder_layers(extractor)) == layer + 1
    assert len(decoder_layers(model)) == 2 and model.get_output_embeddings().weight.shape[0] == 48


def test_training_the_model_leaves_them_as_they_were(model: Any) -> None:
    extractor = frozen_features(model, 1, CPU)
    clean = ids_of(3 * BLOCK)
    before = features(extractor, clean.flip(0), clean)
    with torch.no_grad():
        for value in (*model.parameters(), *(each for each in model.buffers())):
            value += 0.1
    assert torch.equal(features(extractor, clean.flip(0), clean), before)
    assert not extractor.training
    model.train()
    assert not any(each.training for each in extractor.modules())


def test_making_them_draws_no_random_number(model: Any) -> None:
    before = torch.get_rng_state()
    frozen_features(model, 0, CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_get_the_dtype_and_buffers_keep_theirs(model: Any) -> None:
    extractor = frozen_features(model, 1, CPU, torch.bfloat16)
    assert {weight.dtype for weight in extractor.parameters()} == {torch.bfloat16}
    assert all(buffer.dtype == torch.float32 for buffer in extractor.buffers())
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    clean = ids_of(3 * BLOCK)
    rounded = features(extractor, clean, clean)
    assert rounded.dtype == torch.bfloat16
    exact = features(frozen_features(model, 1, CPU), clean, clean)
    torch.testing.assert_close(rounded.float(), exact, atol=0.1, rtol=0.1)


def test_features_stand_at_their_own_position_where_predictions_do_not(model: Any) -> None:
    """A shifted model reads a token off the position before; what a token means is not there."""
    clean = ids_of(3 * BLOCK)
    expected = features(frozen_features(model, 0, CPU), clean.flip(0), clean)
    model.config.shift = True
    assert torch.equal(features(frozen_features(model, 0, CPU), clean.flip(0), clean), expected)
    assert model.config.shift


def test_a_layer_that_is_not_there_is_named(model: Any) -> None:
    with pytest.raises(InputError, match="the model has 2 layers, counted from 0, and none is 2"):
        frozen_features(model, 2, CPU)


def test_under_adapters_the_base_is_shared_and_adapters_are_not() -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    plain = small_llama().model
    expected = frozen_features(copy.deepcopy(plain), 0, CPU)
    adapted: Any = add_adapters(plain, LoraConfig(r=2, init_lora_weights=False), "")
    base = adapted.get_base_model()
    extractor = frozen_features(adapted, 0, CPU, torch.bfloat16)
    shared = {weight.data_ptr() for weight in base.parameters()}
    learning = {name: weight for name, weight in base.named_parameters() if weight.requires_grad}
    for name, weight in extractor.named_parameters():
        assert (weight.data_ptr() in shared) == (name not in learning), name
        assert not weight.requires_grad
    assert all(weight.requires_grad for weight in learning.values())
    assert base.get_input_embeddings().weight.dtype == torch.float32

    clean = ids_of(32) % 40
    with torch.no_grad():
        before = features(extractor, clean, clean)
        for weight in learning.values():
            weight += 0.1
        assert torch.equal(features(extractor, clean, clean), before)
    assert not torch.allclose(before.float(), features(expected, clean, clean), atol=1e-3)
