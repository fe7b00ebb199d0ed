"""DMax-MMD: its gradient by enumeration, its rewards by hand, and what is sampled where."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import small_network
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dmax.attention import dense_mask, noisy_clean
from dmax.baselines import mmd
from dmax.baselines.frozen import frozen_features
from dmax.baselines.mmd import MMD, View, mmd_loss, view_loss
from dmax.errors import InputError
from dmax.training.clean_stream import CleanBatch, CleanStream, NoisyBatch
from dmax.training.objectives import Loss
from dmax.training.vocabulary import IGNORE, States

BLOCK = 4
VOCAB = 48
MASK = 47
EOS = 46
CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {
    "block_length": BLOCK,
    "mask_token_id": MASK,
    "num_groups": 3,
    "num_samples": 2,
    "bandwidth": 0.5,
}


@pytest.fixture(params=["llada2_moe", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    return small_network(request.param, "eager", vocab_size=VOCAB, eos=EOS, head_dim=8)


@pytest.fixture
def batch() -> NoisyBatch:
    """Prompts of 9 and 13 tokens; the first response has labels up to 20, and a tail without."""
    generator = torch.Generator().manual_seed(1)
    clean = torch.randint(EOS, (2, 6 * BLOCK), generator=generator)
    place = torch.arange(clean.shape[1])
    is_response = place >= torch.tensor([[9], [13]])
    masked = is_response & (torch.rand(clean.shape, generator=generator) < 0.6)
    masked[:, -1] = True
    is_labelled = is_response & (place < torch.tensor([[20], [24]]))
    return NoisyBatch(
        clean, clean.masked_fill(masked, MASK), clean.masked_fill(~is_labelled, IGNORE)
    )


def extractor_of(model: Any, layer: int = 0) -> Any:
    return frozen_features(model, layer, CPU)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits_as_states(logits: Tensor) -> States:
    return States(logits, lambda rows: rows, logits.shape[-1])


# --- the gradient, by enumeration -----------------------------------------------------------------

TOKENS = 2  # of a vocabulary of three, the third is MASK
CLEAN = [0, 1, 1, 0, 1, 0]
SCORED = [2, 3, 4]  # two positions of the second block, one of the third
OF_BLOCK = {1: [2, 3], 2: [4]}
WIDTH = 2


def residual_stream(network: Any, layer: int, noisy: Tensor, clean: Tensor) -> Tensor:
    """[R, L, D], what a layer of a whole model leaves of the noisy half in [noisy | clean]."""
    kept: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        kept.append(output if isinstance(output, Tensor) else output[0])

    handle = network.base_model.layers[layer].register_forward_hook(keep)
    length = clean.shape[1]
    place = torch.arange(2 * length)
    visible = dense_mask(noisy_clean(WIDTH, length), place, place)[None, None]
    network(
        inputs_embeds=network.get_input_embeddings()(torch.cat((noisy, clean), dim=1)),
        attention_mask=visible,
        position_ids=(place % length)[None],
    )
    handle.remove()
    return kept[0][:, :length].detach()


def plain_kernel(one: Tensor, other: Tensor, sigma: float) -> float:
    """The mean over all pairs of rows of [S, D] and [S, D], in Python."""
    values = [
        math.exp(-sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) / (2 * len(u) * sigma**2))
        for u in one.tolist()
        for v in other.tolist()
    ]
    return sum(values) / len(values)


def exact_objective(q: Tensor, ids: Tensor, initial: Any, layer: int, sigma: float) -> Tensor:
    """Mean over blocks of 2 E[κ(z, ref)] - E[κ(z, z')], summed over all that can be sampled.

    `q` [scored positions, TOKENS] has gradient; `ids` [L] is the view.
    """
    clean = torch.tensor([CLEAN])
    found = []
    for places in OF_BLOCK.values():
        outcomes = list(itertools.product(range(TOKENS), repeat=len(places)))
        rows = ids.repeat(len(outcomes) + 1, 1)
        for row, outcome in zip(rows, (*outcomes, [CLEAN[at] for at in places]), strict=True):
            row[places] = torch.tensor(outcome)
        stream = residual_stream(initial, layer, rows, clean.expand(len(rows), -1))[:, places]
        *samples, reference = stream
        probability = [
            math.prod(q[SCORED.index(at), token] for at, token in zip(places, outcome, strict=True))
            for outcome in outcomes
        ]
        near = sum(
            p * plain_kernel(z, reference, sigma) for p, z in zip(probability, samples, strict=True)
        )
        alike = sum(
            p * other * plain_kernel(z, another, sigma)
            for p, z in zip(probability, samples, strict=True)
            for other, another in zip(probability, samples, strict=True)
        )
        found.append(2 * near - alike)
    return torch.stack(found).mean()


@pytest.fixture
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers takes norms in float32, whatever dtype a model has."""

    def norm(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)


@pytest.mark.usefixtures("norms_in_float64")
def test_the_expected_gradient_is_that_of_the_squared_mmd(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 8^4 joint samples of two groups of two, each weighted with its probability."""
    num_groups, num_samples, sigma, layer = 2, 2, 0.4, 0
    mask = TOKENS
    initial = small_network("llama", "sdpa", vocab_size=TOKENS + 1, eos=1, head_dim=8).double()
    extractor = frozen_features(initial, layer, CPU)
    network = copy.deepcopy(initial)
    with torch.no_grad():  # the model has learnt since, and the extractor has not
        for weight in network.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=seeded(2), dtype=weight.dtype)

    each = list(itertools.product(range(TOKENS), repeat=len(SCORED)))
    joint = torch.tensor(list(itertools.product(each, repeat=num_groups * num_samples)))
    tokens = joint.transpose(1, 2)  # [R, scored, S]
    rows = len(tokens)
    assert rows == 8**4
    clean = torch.tensor([CLEAN])
    noisy = clean.clone()
    noisy[:, SCORED] = mask
    labels = torch.full_like(clean, IGNORE)
    labels[:, SCORED] = clean[:, SCORED]

    # What the model says of both views, and by it which uniform numbers give which tokens.
    stream = CleanStream(network, clean, WIDTH)
    embed = network.get_input_embeddings()
    masked_logits = stream.denoise(embed(noisy)).logits()
    filled = torch.where(noisy == mask, masked_logits.argmax(dim=-1), noisy)
    predicted_logits = stream.denoise(embed(filled)).logits()
    q = {
        name: logits[0, SCORED, :TOKENS].softmax(dim=-1)
        for name, logits in (("masked", masked_logits), ("predicted", predicted_logits))
    }
    weights = {}
    levels = []
    for name, shares in q.items():
        first, second = shares.detach().T[:, :, None]  # [scored, 1] each
        weights[name] = torch.where(tokens == 0, first, second).prod(dim=2).prod(dim=1)
        levels.append(torch.where(tokens == 0, first / 2, first + second / 2).flatten(0, 1))
    torch.testing.assert_close(weights["masked"].sum(), torch.tensor(1.0, dtype=torch.float64))

    def weighted(losses: Tensor, _: Any, name: str, __: Any, weights_of: Tensor) -> Loss:
        per_row = (losses * weights_of).sum(dim=1) / weights_of.sum(dim=1)
        return Loss((per_row * weights[name]).sum(), {}, {})

    given = iter(levels)
    monkeypatch.setattr(mmd, "draw", lambda *_: next(given))
    monkeypatch.setattr(mmd, "mean", lambda *args, weights: weighted(*args, weights))
    batch = NoisyBatch(*(ids.repeat(rows, 1) for ids in (clean, noisy, labels)))
    ours = mmd_loss(
        network,
        extractor,
        batch,
        block_length=WIDTH,
        mask_token_id=mask,
        num_groups=num_groups,
        num_samples=num_samples,
        bandwidth=sigma,
    )
    names, parameters = zip(*network.named_parameters(), strict=True)
    found = torch.autograd.grad(ours.total, parameters, retain_graph=True)

    exact = [
        exact_objective(q[name], ids[0], initial, layer, sigma)
        for name, ids in (("masked", noisy), ("predicted", filled))
    ]
    expected = torch.autograd.grad(-sum(exact) / 2, parameters)
    assert max(gradient.abs().max() for gradient in expected) > 1e-4
    by_name = (dict(zip(names, gradients, strict=True)) for gradients in (found, expected))
    torch.testing.assert_close(*by_name, atol=1e-9, rtol=0)


# --- rewards and advantages -----------------------------------------------------------------------


def test_advantages_compare_with_the_other_groups_and_sum_to_zero() -> None:
    rewards = torch.tensor([[1.0, 0.0], [4.0, 0.0], [7.0, 3.0]])
    expected = torch.tensor([[1 - 5.5, -1.5], [0.0, -1.5], [7 - 2.5, 3.0]])
    torch.testing.assert_close(mmd.advantages(rewards), expected)
    many = mmd.advantages(torch.rand(8, 50, generator=seeded()))
    torch.testing.assert_close(many.sum(dim=0), torch.zeros(50), atol=1e-5, rtol=0)
    assert torch.equal(mmd.advantages(rewards[:1]), rewards[:1])  # nothing to compare with


def test_rewards_are_those_of_plain_loops() -> None:
    features = torch.randn(2, 3, 2, 4, 5, generator=seeded(), dtype=torch.float64)
    reference = torch.randn(2, 4, 5, generator=seeded(1), dtype=torch.float64)
    weights = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]], dtype=torch.float64)
    found = mmd.rewards(features, reference, weights, 0.7)
    for group, block in itertools.product(range(2), range(2)):
        chosen = weights[block].bool()
        samples = [features[group, b, block][chosen] for b in range(3)]
        near = [plain_kernel(each, reference[block][chosen], 0.7) for each in samples]
        alike = [plain_kernel(a, b, 0.7) for a, b in itertools.permutations(samples, 2)]
        expected = 2 / 3 * sum(near) - sum(alike) / 6
        assert found[group, block] == pytest.approx(expected, abs=1e-12)
    single = mmd.rewards(features[:, :1], reference, weights, 0.7)  # M = 1 repels nobody
    alone = features[1, 0, 0][weights[0].bool()]
    expected = 2 * plain_kernel(alone, reference[0][weights[0].bool()], 0.7)
    assert single[1, 0] == pytest.approx(expected, abs=1e-12)


def test_samples_like_the_reference_give_its_kernel_with_itself() -> None:
    reference = torch.randn(2, 4, 5, generator=seeded(), dtype=torch.float64)
    weights = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.float64)
    features = reference.expand(3, 2, -1, -1, -1)
    itself = mmd.similarity(reference, reference, weights=weights, bandwidth=0.7)
    found = mmd.rewards(features, reference, weights, 0.7)
    torch.testing.assert_close(found, itself.expand(3, -1), atol=1e-12, rtol=0)
    assert itself[0] == pytest.approx(plain_kernel(reference[0, 1:3], reference[0, 1:3], 0.7))


def test_the_squared_mmd_of_samples_like_the_reference_is_zero(batch: NoisyBatch) -> None:
    """Where the model is sure of the clean tokens; and it is not where it is sure of others."""
    model = small_network("llama", "eager", vocab_size=VOCAB, eos=EOS, head_dim=8)
    features = mmd.block_features(extractor_of(model, 1), batch, BLOCK)
    scored = batch.labels != IGNORE

    def parts_for(tokens: Tensor) -> dict[str, Tensor]:
        logits = 100.0 * F.one_hot(tokens, VOCAB)
        view = View(batch.noisy_ids, logits_as_states(logits), scored)
        return view_loss("any", view, labels=batch.labels, features=features, **OPTIONS).parts

    right = parts_for(batch.clean_ids)
    assert right["mmd_any"] == pytest.approx(0.0, abs=1e-6)
    wrong = parts_for((batch.clean_ids + 1) % EOS)
    assert wrong["mmd_any"] > 0.01
    assert right["reward_any"] + right["mmd_any"] == pytest.approx(
        float(wrong["reward_any"] + wrong["mmd_any"]), abs=1e-6
    )  # of the reference with itself


def test_no_other_kernel_reaches_a_reward_as_high_as_the_reference() -> None:
    """2 κ(z, ref) - κ(z, z) is largest for z = ref: it is κ(ref, ref) minus a squared distance."""
    reference = torch.randn(1, 4, 5, generator=seeded())
    weights = torch.ones(1, 4)
    best = mmd.similarity(reference, reference, weights=weights, bandwidth=0.7)
    others = reference + 0.3 * torch.randn(50, 1, 1, 4, 5, generator=seeded(1))
    same = others.expand(-1, 2, -1, -1, -1)  # two samples of a group that are alike
    assert (mmd.rewards(same, reference, weights, 0.7) < best).all()


def test_autocast_does_not_round_the_kernel() -> None:
    one = 100 + torch.randn(2, 1, 3, 4, 16, generator=seeded())
    reference = 100 + torch.randn(3, 4, 16, generator=seeded(1))
    pairs = one.expand(2, 2, -1, -1, -1), reference, torch.ones(3, 4), 1.0
    expected = mmd.rewards(*pairs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mmd.rewards(*pairs), expected)
    exact = mmd.rewards(pairs[0].double(), pairs[1].double(), pairs[2].double(), 1.0)
    torch.testing.assert_close(expected.double(), exact, atol=1e-3, rtol=0)


def test_the_median_bandwidth_looks_at_pairs_that_count() -> None:
    samples = torch.tensor([[[0.0, 0.0], [3.0, 1.0]], [[9.0, 9.0], [9.0, 9.0]]])
    reference = torch.tensor([[[0.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [5.0, 5.0]]])
    weights = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    # ‖u - v‖² / D of the first block's pairs is 2, 0, 5 and 5; torch's median is the lower one.
    found = mmd.median_bandwidth(samples, reference, weights)
    assert found == pytest.approx(math.sqrt(2 / 2))
    assert mmd.median_bandwidth(samples, reference, 0 * weights).isnan()


@torch.no_grad()
def test_samples_in_other_blocks_leave_a_reward_as_it_is(model: Any, batch: NoisyBatch) -> None:
    features = mmd.block_features(extractor_of(model, 1), batch, BLOCK)
    weights = (batch.labels != IGNORE).view(-1, BLOCK).float()

    def reward(tokens: Tensor) -> Tensor:
        sampled = [torch.where(batch.labels != IGNORE, each, batch.noisy_ids) for each in tokens]
        groups = torch.stack([features(ids) for ids in sampled])[None]
        reference = torch.where(batch.labels != IGNORE, batch.labels, batch.noisy_ids)
        return mmd.rewards(groups, features(reference), weights, 0.5).view(2, -1)

    tokens = torch.randint(EOS, (2, *batch.labels.shape), generator=seeded(3))
    other = tokens.clone()
    other[:, :, 3 * BLOCK : 4 * BLOCK] = (other[:, :, 3 * BLOCK : 4 * BLOCK] + 1) % EOS
    before = reward(tokens)
    after = reward(other)
    unchanged = [0, 1, 2, 4, 5]
    torch.testing.assert_close(after[:, unchanged], before[:, unchanged], atol=1e-6, rtol=0)
    assert (after[:, 3] - before[:, 3]).abs().min() > 1e-5
    assert (before[:, :2] == 0).all()  # blocks of the prompt


# --- what is sampled ------------------------------------------------------------------------------


def test_mask_is_never_sampled_and_other_tokens_as_often_as_they_are_probable() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 50.0]).expand(1, 500, 4)
    scored = torch.ones(1, 500, dtype=torch.bool)
    tokens = mmd.sample(logits_as_states(logits), scored, 80, 3, seeded())
    assert tokens.shape == (1, 500, 80)
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    counts = tokens.flatten().bincount()
    torch.testing.assert_close(counts / 40_000, expected, atol=0.01, rtol=0)
    # Samples of a position are independent of each other: so often two are the same.
    same = (tokens[..., 0::2] == tokens[..., 1::2]).float().mean()
    assert same == pytest.approx(expected.square().sum().item(), abs=0.02)


def test_logits_stay_as_they_are() -> None:
    logits = torch.randn(2, 5, VOCAB, generator=seeded())
    before = logits.clone()
    scored = torch.ones(2, 5, dtype=torch.bool)
    tokens = mmd.sample(logits_as_states(logits), scored, 3, MASK, seeded())
    found = mmd.log_likelihoods(logits_as_states(logits), tokens, scored, MASK)
    assert torch.equal(logits, before)
    expected = logits[..., :MASK].log_softmax(dim=-1).gather(-1, tokens)
    torch.testing.assert_close(found, expected)


def test_chunks_of_rows_change_nothing(model: Any, batch: NoisyBatch) -> None:
    scored = batch.labels != IGNORE
    results = []
    for chunk in (2**26, 3 * VOCAB):
        model.zero_grad()
        stream = CleanStream(model, batch.clean_ids, BLOCK)
        states = stream.denoise(model.get_input_embeddings()(batch.noisy_ids))
        filled = mmd.fill_masks(states, batch.noisy_ids, batch.noisy_ids == MASK, chunk=chunk)
        tokens = mmd.sample(states, scored, 5, MASK, seeded(), chunk=chunk)
        log_probs = mmd.log_likelihoods(states, tokens, scored, MASK, chunk=chunk)
        (log_probs * torch.randn(log_probs.shape, generator=seeded(1))).sum().backward()
        assert (log_probs[~scored] == 0).all() and (log_probs[scored] < 0).all()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        results.append((filled, tokens, log_probs.detach(), gradients))
    torch.testing.assert_close(results[0], results[1])


def test_the_first_forward_of_the_output_layer_keeps_its_gradient(
    model: Any, batch: NoisyBatch
) -> None:
    """The autocast of older torch keeps the copy of a weight that it makes there, for the step."""
    with_gradient = []
    model.get_output_embeddings().register_forward_hook(
        lambda *_: with_gradient.append(torch.is_grad_enabled())
    )
    mmd_loss(model, extractor_of(model), batch, generator=seeded(), **OPTIONS)
    assert with_gradient[0]


def test_the_views_sample_at_labelled_masks_and_at_all_labels(
    model: Any, batch: NoisyBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the extractor sees elsewhere is the view: the masks of an ignored tail, too."""
    views: list[View] = []
    seen: list[Tensor] = []
    blocks_of: Callable[..., Any] = mmd.block_features

    def recorded(name: str, view: View, **options: Any) -> Loss:
        views.append(view)
        return view_loss(name, view, **options)

    def watched(*args: Any) -> Any:
        features = blocks_of(*args)

        def keep(ids: Tensor) -> Tensor:
            seen.append(ids)
            return features(ids)

        return keep

    monkeypatch.setattr(mmd, "view_loss", recorded)
    monkeypatch.setattr(mmd, "block_features", watched)
    mmd_loss(model, extractor_of(model), batch, **OPTIONS, generator=seeded())
    masked, predicted = views
    is_masked = batch.noisy_ids == MASK
    is_labelled = batch.labels != IGNORE
    assert (is_masked & ~is_labelled).any() and (~is_masked & is_labelled).any()
    assert torch.equal(masked.ids, batch.noisy_ids)
    assert torch.equal(masked.scored, is_masked & is_labelled)
    assert torch.equal(predicted.scored, is_labelled)
    assert torch.equal(predicted.ids, torch.where(is_masked, predicted.ids, batch.noisy_ids))
    assert (predicted.ids != MASK).all()

    shown = OPTIONS["num_groups"] * OPTIONS["num_samples"] + 1
    assert len(seen) == 2 * shown
    for view, copies in zip(views, (seen[:shown], seen[shown:]), strict=True):
        reference, *samples = copies
        assert torch.equal(reference[view.scored], batch.clean_ids[view.scored])
        for ids in copies:
            assert torch.equal(ids[~view.scored], view.ids[~view.scored])
            assert (ids[view.scored] != MASK).all()
        assert not torch.equal(samples[0], samples[1])


def test_masks_are_filled_with_the_models_best_tokens_mask_included() -> None:
    logits = torch.zeros(1, 3, VOCAB)
    logits[0, range(3), [5, MASK, 9]] = 1.0
    ids = torch.tensor([[MASK, MASK, 2]])
    filled = mmd.fill_masks(logits_as_states(logits), ids, ids == MASK)
    assert filled.tolist() == [[5, MASK, 2]]


# --- the loss -------------------------------------------------------------------------------------


def test_a_seed_decides_all_that_is_sampled(model: Any, batch: NoisyBatch) -> None:
    extractor = extractor_of(model)

    def loss(seed: int) -> Loss:
        return mmd_loss(model, extractor, batch, **OPTIONS, generator=seeded(seed))

    first, again, other = loss(0), loss(0), loss(1)
    assert torch.equal(first.total, again.total)
    assert first.parts.keys() == again.parts.keys()
    assert all(torch.equal(first.parts[name], again.parts[name]) for name in first.parts)
    assert not torch.equal(first.total, other.total)
    assert set(first.parts) >= {"reward_masked", "reward_predicted", "median_bandwidth"}


def test_blocks_without_samples_carry_no_weight(model: Any, batch: NoisyBatch) -> None:
    """The prompt's blocks and a last block of tail, in the noisy copies or not, are the same."""
    extractor = extractor_of(model)
    labels = batch.labels.clone()
    labels[:, -BLOCK:] = IGNORE
    whole = NoisyBatch(batch.clean_ids, batch.noisy_ids, labels)
    part = slice(2 * BLOCK, 5 * BLOCK)
    places = torch.arange(part.start, part.stop).expand(2, -1)
    short = NoisyBatch(batch.clean_ids, batch.noisy_ids[:, part], labels[:, part], places)
    losses = []
    for each in (whole, short):
        model.zero_grad()
        loss = mmd_loss(model, extractor, each, **OPTIONS, generator=seeded())
        loss.total.backward()
        gradients = {name: weight.grad for name, weight in model.named_parameters()}
        parts = {name: part for name, part in loss.parts.items() if name != "rollout_error"}
        losses.append((loss.total.detach(), parts, loss.per_sequence, gradients))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-4)


def test_a_view_without_a_mask_has_no_loss_and_no_wrong_number(
    model: Any, batch: NoisyBatch
) -> None:
    plain = NoisyBatch(batch.clean_ids, batch.clean_ids, batch.labels)
    loss = mmd_loss(model, extractor_of(model), plain, **OPTIONS, generator=seeded())
    loss.total.backward()
    assert loss.parts["loss_masked"] == loss.parts["reward_masked"] == 0
    assert loss.parts["reward_predicted"] > 0
    assert all(weight.grad.isfinite().all() for weight in model.parameters())


@pytest.mark.parametrize("average", ["sequences", "labels"])
def test_the_mean_is_over_blocks_of_a_sequence_or_of_all(
    model: Any, batch: NoisyBatch, average: str
) -> None:
    extractor = extractor_of(model)
    loss = mmd_loss(model, extractor, batch, **OPTIONS, generator=seeded(), average=average)
    blocks = (batch.labels != IGNORE).view(2, -1, BLOCK).any(dim=2).sum(dim=1)
    assert blocks.tolist() == [3, 3]  # so both are the same here, ...
    per_sequence = loss.per_sequence["predicted"]
    torch.testing.assert_close(loss.parts["loss_predicted"], per_sequence.mean())
    labels = batch.labels.clone()
    labels[0, 4 * BLOCK :] = IGNORE  # ... and differ with two blocks beside three
    uneven = NoisyBatch(batch.clean_ids, batch.noisy_ids, labels)
    loss = mmd_loss(model, extractor, uneven, **OPTIONS, generator=seeded(), average=average)
    weights = torch.tensor([2.0, 3.0]) if average == "labels" else torch.ones(2)
    expected = (loss.per_sequence["predicted"] * weights).sum() / weights.sum()
    torch.testing.assert_close(loss.parts["loss_predicted"], expected)


def test_gradient_reaches_the_model_and_never_the_extractor(model: Any, batch: NoisyBatch) -> None:
    extractor = extractor_of(model)
    before = copy.deepcopy(extractor.state_dict())
    loss = mmd_loss(model, extractor, batch, **OPTIONS, generator=seeded())
    loss.total.backward()
    assert all(weight.grad is None for weight in extractor.parameters())
    assert not any(weight.requires_grad for weight in extractor.parameters())
    for layer in model.base_model.layers:
        assert any(weight.grad.abs().max() > 0 for weight in layer.parameters())
    torch.testing.assert_close(extractor.state_dict(), before, atol=0, rtol=0)


def test_the_extractor_sees_one_copy_of_a_batch_at_a_time(model: Any, batch: NoisyBatch) -> None:
    extractor = extractor_of(model)
    shapes: list[tuple[int, ...]] = []
    extractor.base_model.layers[0].register_forward_pre_hook(
        lambda _, inputs: shapes.append(tuple(inputs[0].shape[:2]))
    )
    mmd_loss(model, extractor, batch, **OPTIONS, generator=seeded())
    length = batch.clean_ids.shape[1]
    first, *others = shapes
    assert first == (2, 2 * length - BLOCK)  # with the clean half, which nobody runs again
    assert set(others) == {(2, length)}
    assert len(shapes) == 2 * (OPTIONS["num_groups"] * OPTIONS["num_samples"] + 1)


def test_a_model_learns_to_be_rewarded(model: Any, batch: NoisyBatch) -> None:
    options = OPTIONS | {"num_groups": 8}
    extractor = extractor_of(model)

    @torch.no_grad()
    def reward() -> float:
        """Of samples that training does not see."""
        losses = [mmd_loss(model, extractor, batch, **options, generator=seeded(s)) for s in (8, 9)]
        rewards = [each.parts["reward_masked"] + each.parts["reward_predicted"] for each in losses]
        return float(torch.stack(rewards).mean()) / 2

    before = reward()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for step in range(25):
        optimizer.zero_grad()
        mmd_loss(model, extractor, batch, **options, generator=seeded(100 + step)).total.backward()
        optimizer.step()
    assert reward() > before + 0.05


# --- the objective --------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "block_length": BLOCK,
    "mask_token_id": MASK,
    "mask_ratio_low": 0.75,
    "mask_ratio_high": 0.75,
    "loss_average": "sequences",
    "mmd_groups": 2,
    "mmd_samples": 2,
    "mmd_bandwidth": 0.5,
    "mmd_layer": None,
    "compute_dtype": None,
}


def test_an_objective_keeps_the_model_as_it_was(model: Any, batch: NoisyBatch) -> None:
    objective = MMD.from_settings(SETTINGS).start(model, CPU)
    assert len(objective.extractor.base_model.layers) == 2  # 2 // 2 is the second of two
    clean = CleanBatch(batch.clean_ids, batch.labels, batch.labels != IGNORE)
    before = objective.loss(model, clean, seeded())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.5
    after = objective.loss(other, clean, seeded())
    assert torch.equal(after.total, before.total)
    restarted = MMD.from_settings(SETTINGS).start(model, CPU)
    assert not torch.equal(restarted.loss(other, clean, seeded()).total, before.total)


def test_without_a_start_one_sentence_says_what_is_missing(model: Any, batch: NoisyBatch) -> None:
    clean = CleanBatch(batch.clean_ids, batch.labels, batch.labels != IGNORE)
    with pytest.raises(InputError, match="a copy of the model that training begins with") as error:
        MMD.from_settings(SETTINGS).loss(model, clean, seeded())
    assert "objective.start" in str(error.value.hint)
