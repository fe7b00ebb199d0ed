"""Losses and predictions in chunks, against all logits at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dmax.confidence import candidates
from dmax.training.rollout import draw, pick
from dmax.training.vocabulary import IGNORE, Scores, States, score

VOCAB = 31
MASK = 30
HIDDEN = 3  # less than the rows of a chunk, so that no weight is larger


class Largest(TorchDispatchMode):
    """The most elements that a floating-point tensor had while the mode was on."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.fixture
def states() -> States:
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=torch.float64)
    hidden = torch.randn(3, 8, HIDDEN, dtype=torch.float64, requires_grad=True)
    return States(hidden, head, VOCAB)


@pytest.fixture
def labels() -> Tensor:
    labels = torch.randint(MASK, (3, 8), generator=torch.Generator().manual_seed(1))
    labels[0, :5] = IGNORE
    labels[2] = IGNORE
    return labels


@pytest.fixture
def predicts() -> Tensor:
    return torch.rand(3, 8, generator=torch.Generator().manual_seed(2)) < 0.5


def plain_losses(states: States, labels: Tensor) -> Tensor:
    logits = states.logits()
    return F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")


def gradients(states: States, losses: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1, 2, losses.numel(), dtype=losses.dtype).view_as(losses)
    inputs = [states.values, *states.head.parameters()]  # type: ignore[attr-defined]
    return list(torch.autograd.grad((losses * weights).sum(), inputs))


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_chunks_give_the_losses_and_gradients_of_all_logits(
    states: States, labels: Tensor, predicts: Tensor, rows_at_once: int
) -> None:
    chunk = rows_at_once * VOCAB
    scores = score(states, labels, predicts, mask_token_id=MASK, chunk=chunk)
    expected = plain_losses(states, labels)
    torch.testing.assert_close(scores.losses, expected, rtol=0, atol=1e-12)
    found = gradients(states, scores.losses)
    torch.testing.assert_close(found, gradients(states, expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("rows_at_once", [1, 5, 100])
def test_chunks_predict_what_all_logits_predict(
    states: States, labels: Tensor, predicts: Tensor, rows_at_once: int, temperature: float
) -> None:
    """A sample is decided by one number for its position, whatever shares a chunk with it."""

    def predicted(chunk: int) -> Scores:
        generator = torch.Generator().manual_seed(3)
        options = {"mask_token_id": MASK, "temperature": temperature, "generator": generator}
        return score(states, labels, predicts, chunk=chunk, **options)

    scores = predicted(rows_at_once * VOCAB)
    whole = predicted(100 * VOCAB)
    assert torch.equal(scores.tokens[predicts], whole.tokens[predicts])
    assert (scores.tokens[predicts] != MASK).all()
    logits = states.logits().detach()
    if temperature == 0:
        best = candidates(logits, 1, MASK)
        assert torch.equal(scores.tokens[predicts], best.tokens[predicts])
    probs = logits.softmax(-1).gather(-1, scores.tokens.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(scores.confidence[predicts], probs[predicts])


def test_a_sample_is_that_of_a_rollout_with_the_same_numbers(states: States) -> None:
    everywhere = torch.ones(3, 8, dtype=torch.bool)
    nothing = torch.full((3, 8), IGNORE)
    options: dict[str, Any] = {"mask_token_id": MASK, "temperature": 1.0}
    scores = score(
        states, nothing, everywhere, generator=torch.Generator().manual_seed(4), **options
    )
    logits = states.logits().detach()
    draws = draw(logits.shape[:-1], torch.Generator().manual_seed(4), logits.device)
    expected, _ = pick(logits, draws=draws, **options)
    assert torch.equal(scores.tokens, expected)
    assert not scores.losses.any()


def test_no_tensor_holds_the_logits_of_more_than_a_chunk(
    states: States, labels: Tensor, predicts: Tensor
) -> None:
    with Largest() as forward:
        scores = score(states, labels, predicts, mask_token_id=MASK, chunk=4 * VOCAB)
    with Largest() as backward:
        gradients(states, scores.losses)
    with Largest() as plain:
        plain_losses(states, labels)
    assert (forward.elements, backward.elements) == (4 * VOCAB, 4 * VOCAB)
    assert plain.elements == 24 * VOCAB


def test_logits_of_a_head_that_is_not_linear_are_taken_as_they_are(labels: Tensor) -> None:
    class Capped(nn.Module):
        """A model whose logits are more than a product."""

        config = type("Config", (), {"vocab_size": VOCAB})

        def forward(self, values: Tensor, logits_to_keep: slice) -> Any:
            return type("Outputs", (), {"logits": values[:, logits_to_keep].tanh()})

    values = torch.randn(3, 11, VOCAB, generator=torch.Generator().manual_seed(5))
    states = States.of(Capped(), 8, values=values)
    logits = values[:, :8].tanh()
    assert torch.equal(states.logits(), logits)
    expected = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(score(states, labels, chunk=3 * VOCAB).losses, expected)


def test_bfloat16_states_have_float32_losses(labels: Tensor) -> None:
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=torch.bfloat16)
    states = States(torch.randn(3, 8, HIDDEN, dtype=torch.bfloat16), head, VOCAB)
    losses = score(states, labels).losses
    assert losses.dtype == torch.float32
    expected = F.cross_entropy(states.logits().float().transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(losses, expected)
