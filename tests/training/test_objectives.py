"""Losses against the paper's plain recipe, which runs [noisy | clean] once for every stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dmax.attention import block_causal, dense_mask, noisy_clean
from dmax.baselines.objectives import certainty_loss, d2f_loss, rising_ratios
from dmax.baselines.rollouts import decoded_masks, soft_oput_loss
from dmax.blend import blend
from dmax.confidence import candidates
from dmax.models import LLaDA2MoeConfig, LLaDA2MoeModelLM
from dmax.training.clean_stream import CleanStream, NoisyBatch
from dmax.training.objectives import OPUT, ObjectiveModule, mdlm_loss, oput_loss, uniform_loss
from dmax.training.rollout import draw, pick
from dmax.training.vocabulary import IGNORE

BLOCK = 4
VOCAB = 48
MASK = 47
EOS = 46
OPTIONS: dict[str, Any] = {"block_length": BLOCK, "mask_token_id": MASK}


@pytest.fixture
def model() -> LLaDA2MoeModelLM:
    torch.manual_seed(0)
    config = LLaDA2MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        initializer_range=0.15,
        pad_token_id=EOS,
        eos_token_id=EOS,
    )
    config._experts_implementation = "eager"
    return LLaDA2MoeModelLM(config)


@pytest.fixture
def batch() -> NoisyBatch:
    """Prompts of 9 and 13 tokens; three quarters of the responses masked, all of them labelled."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(EOS, (2, 6 * BLOCK), generator=generator)
    is_response = torch.arange(clean.shape[1]) >= torch.tensor([[9], [13]])
    masked = is_response & (torch.rand(clean.shape, generator=generator) < 0.75)
    return NoisyBatch(
        clean, clean.masked_fill(masked, MASK), clean.masked_fill(~is_response, IGNORE)
    )


def concatenated_logits(model: LLaDA2MoeModelLM, batch: NoisyBatch, noisy_embeds: Tensor) -> Tensor:
    """The noisy half's logits of one forward over [noisy | clean]."""
    length = batch.clean_ids.shape[1]
    position = torch.arange(2 * length)
    mask = dense_mask(noisy_clean(BLOCK, length), position, position)[None, None]
    embeds = torch.cat((noisy_embeds, model.model.word_embeddings(batch.clean_ids)), dim=1)
    return model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=(position % length)[None]
    ).logits[:, :length]


def masked_logits(model: LLaDA2MoeModelLM, batch: NoisyBatch) -> Tensor:
    """The masked stream's logits, as the losses compute them."""
    embeds = model.model.word_embeddings(batch.noisy_ids)
    return CleanStream(model, batch.clean_ids, BLOCK).denoise(embeds).logits()


def plain_loss(logits: Tensor, batch: NoisyBatch) -> Tensor:
    """The mean over each sequence's labels, and then over the sequences."""
    rows = zip(logits, batch.labels, strict=True)
    return torch.stack([F.cross_entropy(row, labels) for row, labels in rows]).mean()


def gradients(model: LLaDA2MoeModelLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


@contextmanager
def recorded_streams(model: LLaDA2MoeModelLM) -> Iterator[list[Tensor]]:
    """Inputs [B, L', D] of every noisy stream run meanwhile, in order."""
    inputs: list[Tensor] = []

    def record(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        embeds = kwargs["inputs_embeds"].detach()
        cache = kwargs["past_key_values"]
        end = embeds.shape[1] - (cache.length if cache.records else 0)
        inputs.append(embeds[:, :end])

    handle = model.model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield inputs
    finally:
        handle.remove()


# --- one clean stream serves all noisy ones ------------------------------------------------------


@torch.no_grad()
def test_shared_clean_stream_gives_the_concatenated_logits(
    model: LLaDA2MoeModelLM, batch: NoisyBatch
) -> None:
    embed = model.model.word_embeddings
    stream = CleanStream(model, batch.clean_ids, BLOCK)
    # A second stream is not disturbed by the first.
    for ids in (batch.noisy_ids, batch.clean_ids.flip(1)):
        expected = concatenated_logits(model, batch, embed(ids))
        torch.testing.assert_close(
            stream.denoise(embed(ids)).logits(), expected, atol=1e-5, rtol=1e-4
        )


def test_mdlm_gradients_are_those_of_the_concatenated_forward(
    model: LLaDA2MoeModelLM, batch: NoisyBatch
) -> None:
    ours = mdlm_loss(model, batch, block_length=BLOCK)
    found = gradients(model, ours.total)
    embeds = model.model.word_embeddings(batch.noisy_ids)
    expected = plain_loss(concatenated_logits(model, batch, embeds), batch)
    torch.testing.assert_close(ours.total, expected)
    assert_same_gradients(found, gradients(model, expected))


@pytest.mark.parametrize("rollout", ["argmax", "soft"])
def test_a2_oput_gradients_are_the_mean_of_those_of_separate_passes(
    model: LLaDA2MoeModelLM, batch: NoisyBatch, rollout: Any
) -> None:
    """Two concatenated forwards after a separate rollout give the same loss and gradients."""
    if rollout == "soft":
        ours = soft_oput_loss(model, batch, torch.zeros(2, 1), **OPTIONS)
    else:
        ours = oput_loss(model, batch, **OPTIONS)
    found = gradients(model, ours.total)

    embed = model.model.word_embeddings
    masked = batch.noisy_ids == MASK
    with torch.no_grad():
        logits = concatenated_logits(model, batch, embed(batch.noisy_ids))
        shares = logits.softmax(-1)  # MASK's own counts against the others (A9)
        shares[..., MASK] = 0.0
        confidence, predicted = shares.max(-1)
    inputs = embed(torch.where(masked, predicted, batch.noisy_ids))
    if rollout == "soft":
        soft = blend(embed(predicted[..., None]), embed(torch.tensor(MASK)), confidence[..., None])
        inputs = torch.where(masked[..., None], soft, inputs)
    loss_masked = plain_loss(concatenated_logits(model, batch, embed(batch.noisy_ids)), batch)
    loss_predicted = plain_loss(concatenated_logits(model, batch, inputs), batch)
    torch.testing.assert_close(ours.parts["loss_masked"], loss_masked.detach())
    torch.testing.assert_close(ours.parts["loss_predicted"], loss_predicted.detach())
    assert_same_gradients(found, gradients(model, (loss_masked + loss_predicted) / 2))


@torch.no_grad()
def test_a_noisy_block_sees_itself_and_earlier_clean_blocks_only(
    model: LLaDA2MoeModelLM, batch: NoisyBatch
) -> None:
    block = slice(3 * BLOCK, 4 * BLOCK)

    def logits(changed: NoisyBatch) -> Tensor:
        return masked_logits(model, changed)[:, block]

    expected = logits(batch)
    clean = batch.clean_ids.clone()
    noisy = batch.noisy_ids.clone()
    clean[:, block.start :] = 0
    noisy[:, : block.start] = 0
    noisy[:, block.stop :] = 0
    torch.testing.assert_close(logits(replace(batch, clean_ids=clean, noisy_ids=noisy)), expected)
    clean[:, block.start - 1] = 0
    assert not torch.allclose(logits(replace(batch, clean_ids=clean)), expected, atol=1e-3)


@pytest.mark.parametrize("objective", ["mdlm", "oput", "soft", "uniform"])
def test_a_later_start_drops_work_but_not_loss(
    model: LLaDA2MoeModelLM, batch: NoisyBatch, objective: str
) -> None:
    def loss(chosen: NoisyBatch) -> Any:
        if objective == "mdlm":
            return mdlm_loss(model, chosen, block_length=BLOCK)
        if objective == "uniform":
            return uniform_loss(model, chosen, chosen.noisy_ids.clamp(max=EOS), block_length=BLOCK)
        if objective == "soft":
            return soft_oput_loss(model, chosen, torch.zeros(2, 1), **OPTIONS)
        return oput_loss(model, chosen, **OPTIONS)

    start = 2 * BLOCK  # both prompts are at least that long
    late = NoisyBatch(batch.clean_ids, batch.noisy_ids[:, start:], batch.labels[:, start:])
    with recorded_streams(model) as inputs:
        ours = loss(late)
    assert {stream.shape[1] for stream in inputs} == {batch.clean_ids.shape[1] - start}
    whole = loss(batch)
    torch.testing.assert_close(ours.total, whole.total)
    for name, each in whole.per_sequence.items():
        torch.testing.assert_close(ours.per_sequence[name], each)
    assert_same_gradients(gradients(model, ours.total), gradients(model, whole.total))


def test_a_sequence_of_one_block_has_no_context(model: LLaDA2MoeModelLM, batch: NoisyBatch) -> None:
    first = NoisyBatch(
        *(ids[:, :BLOCK] for ids in (batch.clean_ids, batch.noisy_ids, batch.clean_ids))
    )
    ours = mdlm_loss(model, first, block_length=BLOCK)
    logits = model(input_ids=first.noisy_ids).logits
    torch.testing.assert_close(ours.total, plain_loss(logits, first))


def test_the_clean_stream_receives_gradient(model: LLaDA2MoeModelLM, batch: NoisyBatch) -> None:
    """Context is trained too: a token of the clean half only gets an embedding gradient."""
    only_clean = int(batch.clean_ids[0, 0])
    clean = torch.where(batch.clean_ids == only_clean, 0, batch.clean_ids)
    noisy = torch.where(batch.noisy_ids == only_clean, 0, batch.noisy_ids)
    clean[:, 0] = only_clean
    loss = mdlm_loss(model, NoisyBatch(clean, noisy, batch.labels), block_length=BLOCK)
    gradient = gradients(model, loss.total)
    assert gradient["model.word_embeddings.weight"][only_clean].any()


# --- the rollout ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rollout_replaces_exactly_the_masks_and_never_by_mask(
    model: LLaDA2MoeModelLM, batch: NoisyBatch, temperature: float
) -> None:
    embed = model.model.word_embeddings
    with torch.no_grad():  # tokens can be read off the inputs, and MASK is the likeliest token
        embed.weight.copy_(F.normalize(embed.weight, dim=-1))
        model.lm_head.weight.data[MASK] *= 100
    with recorded_streams(model) as inputs:
        oput_loss(model, batch, **OPTIONS, temperature=temperature)
    first, second = ((stream @ embed.weight.T).argmax(-1) for stream in inputs)
    assert torch.equal(first, batch.noisy_ids)
    masked = batch.noisy_ids == MASK
    assert torch.equal(second[~masked], batch.noisy_ids[~masked])
    assert (second != MASK).all()


@torch.no_grad()
def test_soft_rollout_feeds_the_blend_that_decoding_feeds(
    model: LLaDA2MoeModelLM, batch: NoisyBatch
) -> None:
    embed = model.model.word_embeddings
    masked = batch.noisy_ids == MASK
    model.lm_head.weight.data[MASK] *= 100  # the model would often rather leave a mask
    with recorded_streams(model) as inputs:
        soft_oput_loss(model, batch, torch.zeros(2, 1), **OPTIONS)
    logits = masked_logits(model, batch)
    assert logits.softmax(-1)[masked][:, MASK].max() > 0.5
    best = candidates(logits, 1, MASK)
    soft = blend(embed(best.ids), embed.weight[MASK], best.probs)
    torch.testing.assert_close(inputs[1][masked], soft[masked])
    assert torch.equal(inputs[1][~masked], embed(batch.noisy_ids)[~masked])


def test_rollout_carries_no_gradient() -> None:
    logits = torch.randn(2, 5, VOCAB, requires_grad=True)
    for temperature in (0.0, 1.0):
        draws = draw(logits.shape[:-1], None, logits.device) if temperature else None
        tokens, probs = pick(logits, MASK, temperature, draws)
        assert not tokens.requires_grad and not probs.requires_grad
        assert (tokens != MASK).all()


def test_rollout_uses_current_weights(model: LLaDA2MoeModelLM, batch: NoisyBatch) -> None:
    """After an optimiser step the predictions of the second stream are the updated model's."""

    def second_stream() -> Tensor:
        with torch.no_grad(), recorded_streams(model) as inputs:
            oput_loss(model, batch, **OPTIONS)
        return (inputs[1][:, :, None] - model.model.word_embeddings.weight).norm(dim=-1).argmin(-1)

    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    for _ in range(2):
        before = second_stream()
        oput_loss(model, batch, **OPTIONS).total.backward()
        optimizer.step()
        with torch.no_grad():
            logits = masked_logits(model, batch)
        expected, _ = pick(logits, MASK)
        after = second_stream()
        assert torch.equal(after, torch.where(batch.noisy_ids == MASK, expected, batch.noisy_ids))
        assert not torch.equal(after, before)


def test_sampling_rollout_is_reproducible_and_follows_temperature() -> None:
    logits = torch.randn(4, 200, VOCAB, generator=torch.Generator().manual_seed(0))

    def sampled(seed: int, temperature: float = 1.0) -> Tensor:
        draws = draw(logits.shape[:-1], torch.Generator().manual_seed(seed), logits.device)
        return pick(logits, MASK, temperature, draws)[0]

    assert torch.equal(sampled(1), sampled(1))
    assert not torch.equal(sampled(1), sampled(2))
    assert torch.equal(sampled(1, 1e-4), pick(logits, MASK)[0])


def test_sampling_frequencies_are_the_models_probabilities() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 5.0]).expand(1, 40_000, 4)
    draws = draw(logits.shape[:-1], torch.Generator().manual_seed(0), logits.device)
    tokens, _ = pick(logits, 3, 1.0, draws)
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(0)  # among the others, as MASK is never drawn
    torch.testing.assert_close(tokens[0].bincount() / 40_000, expected, atol=0.01, rtol=0)


def test_rollout_error_is_the_share_of_wrong_predictions(
    model: LLaDA2MoeModelLM, batch: NoisyBatch
) -> None:
    masked = batch.noisy_ids == MASK
    with torch.no_grad():
        logits = masked_logits(model, batch)
    predicted, _ = pick(logits, MASK)
    expected = (predicted != batch.clean_ids)[masked].float().mean()
    torch.testing.assert_close(oput_loss(model, batch, **OPTIONS).parts["rollout_error"], expected)


# --- what is counted -----------------------------------------------------------------------------


@pytest.mark.parametrize("average", ["sequences", "labels"])
def test_a3_a4_the_loss_is_a_mean_over_labelled_positions_masked_or_not(
    model: LLaDA2MoeModelLM, batch: NoisyBatch, average: str
) -> None:
    """Both streams share their labels; unmasked response positions are among them."""
    with torch.no_grad():
        logits = masked_logits(model, batch)
    each = F.cross_entropy(logits.transpose(1, 2), batch.clean_ids, reduction="none")
    labelled = batch.labels != IGNORE
    assert (labelled & (batch.noisy_ids != MASK)).any()
    loss = oput_loss(model, batch, **OPTIONS, average=average)
    expected = torch.stack(
        [row[counted].mean() for row, counted in zip(each, labelled, strict=True)]
    )
    over_labels = each[labelled].mean()
    assert not torch.isclose(expected.mean(), over_labels, rtol=1e-3)
    mean = expected.mean() if average == "sequences" else over_labels
    torch.testing.assert_close(loss.parts["loss_masked"], mean)
    torch.testing.assert_close(loss.per_sequence["masked"], expected)
    torch.testing.assert_close(
        loss.total.detach(), (loss.parts["loss_masked"] + loss.parts["loss_predicted"]) / 2
    )


def test_unlabelled_sequences_give_zero_not_nan(model: LLaDA2MoeModelLM, batch: NoisyBatch) -> None:
    empty = replace(batch, labels=torch.full_like(batch.labels, IGNORE))
    loss = oput_loss(model, empty, **OPTIONS)
    assert loss.total == 0 and loss.per_sequence["masked"].tolist() == [0, 0]
    assert all(gradient.isfinite().all() for gradient in gradients(model, loss.total).values())


def test_a19_uniform_loss_is_the_mean_of_masked_and_random_streams(
    model: LLaDA2MoeModelLM, batch: NoisyBatch
) -> None:
    random_ids = batch.noisy_ids.clamp(max=EOS)
    ours = uniform_loss(model, batch, random_ids, block_length=BLOCK)
    embed = model.model.word_embeddings
    expected = [
        plain_loss(concatenated_logits(model, batch, embed(ids)), batch)
        for ids in (batch.noisy_ids, random_ids)
    ]
    torch.testing.assert_close(ours.total, sum(expected) / 2)
    torch.testing.assert_close(ours.parts["loss_random"], expected[1].detach())


def test_the_batch_is_left_alone(model: LLaDA2MoeModelLM, batch: NoisyBatch) -> None:
    before = [tensor.clone() for tensor in (batch.clean_ids, batch.noisy_ids, batch.labels)]
    oput_loss(model, batch, **OPTIONS).total.backward()
    for tensor, expected in zip(
        (batch.clean_ids, batch.noisy_ids, batch.labels), before, strict=True
    ):
        assert torch.equal(tensor, expected)


def test_gradient_checkpointing_changes_nothing(model: LLaDA2MoeModelLM, batch: NoisyBatch) -> None:
    """Recomputation runs after the clean cache is complete; it must see what the first run saw."""
    expected = gradients(model, oput_loss(model, batch, **OPTIONS).total)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_gradients(gradients(model, oput_loss(model, batch, **OPTIONS).total), expected)


def module(model: LLaDA2MoeModelLM, average: str = "sequences") -> ObjectiveModule:
    ratios = {"mask_ratio_low": 0.75, "mask_ratio_high": 0.75}
    return ObjectiveModule(
        model,
        OPUT(
            BLOCK, MASK, **ratios, loss_average=average, rollout="argmax", rollout_temperature=1.0
        ),
    )


def clean_rows(rows: slice) -> dict[str, Tensor]:
    """Some of four sequences with prompts and responses of different lengths."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(EOS, (4, 6 * BLOCK), generator=generator)
    position = torch.arange(6 * BLOCK)
    is_response = position >= torch.tensor([[9], [13], [2], [17]])
    is_labelled = is_response & (position < torch.tensor([[24], [20], [7], [19]]))
    labels = ids.masked_fill(~is_labelled, IGNORE)
    return {"clean_ids": ids[rows], "labels": labels[rows], "corruptible": is_response[rows]}


def test_a_module_whose_forward_is_the_loss(model: LLaDA2MoeModelLM) -> None:
    outputs = module(model)(torch.Generator().manual_seed(0), **clean_rows(slice(4)))
    assert list(outputs) == ["loss", "loss_masked", "loss_predicted", "rollout_error"]
    assert [value.requires_grad for value in outputs.values()] == [True, False, False, False]
    half = (outputs["loss_masked"] + outputs["loss_predicted"]) / 2
    torch.testing.assert_close(outputs["loss"].detach(), half)


def test_sequences_count_alike_whichever_share_a_batch(
    model: LLaDA2MoeModelLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch has the mean of the gradients of its parts, as micro-batches and ranks do."""
    always = torch.rand(4, 6 * BLOCK, generator=torch.Generator().manual_seed(5)) < 0.75

    def gradient(rows: slice, average: str = "sequences") -> dict[str, Tensor]:
        def drawn(corruptible: Tensor, *_: Any) -> Tensor:
            return corruptible & always[rows]

        monkeypatch.setattr("dmax.training.noise._drawn", drawn)
        loss = module(model, average)(torch.Generator(), **clean_rows(rows))["loss"]
        return gradients(model, loss)

    model.double()
    whole = gradient(slice(4))
    parts = [gradient(slice(0, 2)), gradient(slice(2, 4))]
    means = {name: (parts[0][name] + parts[1][name]) / 2 for name in whole}
    torch.testing.assert_close(whole, means, rtol=0, atol=1e-12)
    over_labels = gradient(slice(4), "labels")
    assert any(not torch.allclose(over_labels[name], whole[name], rtol=0.05) for name in whole)


# --- the annex -----------------------------------------------------------------------------------


def test_certainty_loss_forces_what_is_right_only(
    model: LLaDA2MoeModelLM, batch: NoisyBatch
) -> None:
    logits = concatenated_logits(model, batch, model.model.word_embeddings(batch.noisy_ids))
    masked = batch.noisy_ids == MASK
    # One prediction in two is made right, so that there is something to be sure of.
    labels = torch.where(torch.arange(masked.shape[1]) % 2 == 0, logits.argmax(-1), batch.labels)
    labels = torch.where(batch.labels == IGNORE, IGNORE, labels)
    batch = replace(batch, labels=labels)
    total = torch.zeros(())
    entropies = []
    for row, position in masked.nonzero().tolist():
        total = total - logits[row, position].log_softmax(-1)[labels[row, position]]
        if logits[row, position].argmax() == labels[row, position]:
            probs = (logits[row, position] / 0.5).softmax(-1)
            entropies.append(-(probs * probs.log()).sum())
    assert 0 < len(entropies) < masked.sum()
    expected = total / masked.sum() + 3.0 * torch.stack(entropies).mean()
    settings: dict[str, Any] = {"weight": 3.0, "temperature": 0.5, "average": "labels"}
    loss = certainty_loss(model, batch, **settings, **OPTIONS)
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.parts["entropy_right"], torch.stack(entropies).mean())
    assert_same_gradients(gradients(model, loss.total), gradients(model, expected))


def test_certainty_loss_has_a_gradient_where_a_model_is_quite_sure(
    model: LLaDA2MoeModelLM, batch: NoisyBatch
) -> None:
    """Probabilities that round to 0, as those of `tiny-base` do at a temperature of 0.5."""
    settings = {"weight": 1.0, "temperature": 0.5}
    with torch.no_grad():
        model.lm_head.weight *= 1000
        probs = (masked_logits(model, batch) / 0.5).softmax(dim=-1)
        assert (probs == 0).any()
    loss = certainty_loss(model, batch, **settings, **OPTIONS)
    found = gradients(model, loss.total)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert loss.parts["entropy_right"].isfinite()


def test_d2f_loss_sees_unfinished_blocks_and_weighs_by_the_ratio(
    model: LLaDA2MoeModelLM, batch: NoisyBatch
) -> None:
    corruptible = batch.labels != IGNORE
    ratios = rising_ratios(corruptible, batch.labels, BLOCK, 0.3, 0.7)
    position = torch.arange(batch.noisy_ids.shape[1])
    mask = dense_mask(block_causal(BLOCK), position, position)[None, None]
    logits = model(
        input_ids=batch.noisy_ids, attention_mask=mask, position_ids=position[None]
    ).logits
    loss_sum = torch.zeros(())
    weight_sum = torch.zeros(())
    for row, place in ((batch.noisy_ids == MASK) & corruptible).nonzero().tolist():
        weight = 1 / ratios[row, place]
        loss_sum = loss_sum - weight * logits[row, place].log_softmax(-1)[batch.labels[row, place]]
        weight_sum = weight_sum + weight
    loss = d2f_loss(model, batch, ratios, **OPTIONS, average="labels")
    torch.testing.assert_close(loss.total, loss_sum / weight_sum)
    assert_same_gradients(gradients(model, loss.total), gradients(model, loss_sum / weight_sum))


def test_rollouts_decode_the_confident_prefix_of_each_block_or_its_leftmost_mask() -> None:
    masked = torch.tensor([[True, True, False, True, False, True, True, True]] * 3)
    confidence = torch.tensor([[0.9, 0.6, 0.1, 0.8, 0.9, 0.4, 0.9, 0.9]] * 3)
    thresholds = torch.tensor([[0.7], [0.5], [0.0]])
    found = decoded_masks(masked, confidence, thresholds, 4)
    assert found.tolist() == [
        [True, False, False, False, False, True, False, False],
        [True, True, False, True, False, True, False, False],
        [True, True, False, True, False, True, True, True],
    ]


def test_spd_rollouts_feed_blends_for_the_prefix_and_masks_after_it(
    model: LLaDA2MoeModelLM, batch: NoisyBatch
) -> None:
    model.get_output_embeddings().weight.data.mul_(20.0)  # an untrained model is sure of nothing
    thresholds = torch.rand(2, 1, generator=torch.Generator().manual_seed(8))
    with recorded_streams(model) as streams:
        soft_oput_loss(model, batch, thresholds, **OPTIONS)
    logits = concatenated_logits(
        model, batch, model.model.word_embeddings(batch.noisy_ids)
    ).detach()
    best = candidates(logits, 1, MASK)
    masked = batch.noisy_ids == MASK
    promoted = decoded_masks(masked, best.probs[..., 0], thresholds, BLOCK)
    assert 0 < promoted.sum() < masked.sum()
    embed = model.model.word_embeddings
    expected = embed(batch.noisy_ids)  # clean tokens, and masks where nothing was promoted
    for row, position in promoted.nonzero().tolist():
        here = (slice(row, row + 1), slice(position, position + 1))
        blended = blend(embed(best.ids[here]), embed.weight[MASK], best.probs[here])
        expected[row, position] = blended[0, 0]
    torch.testing.assert_close(streams[-1], expected)
