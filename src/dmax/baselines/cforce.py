"""CForce (arXiv 2608.13925): say early what the model itself will say at the next stage.

Its code was not to be had. The sources at hand are the abstract and notes on the paper. They say
what is compared with what, where there is which loss, and that the gap grows during training. They
give no numbers and no formulas. The docstrings below mark what is guessed.

Shapes: B sequences of L positions, L' of them in the noisy copies, N rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dmax.baselines.stages import (
    DRAWS,
    FollowedBatch,
    Stages,
    TrajectoryCollator,
    adjacent_stages,
)
from dmax.errors import InputError, did_you_mean, show
from dmax.params import MOST, check_number
from dmax.training.clean_stream import CleanBatch, CleanStream, noisy_positions, take
from dmax.training.objectives import SEQUENCES, Loss, Objective, mean
from dmax.training.vocabulary import CHUNK, IGNORE, States, in_chunks

JSD = "jsd"
WEIGHTS = ("confidence", "doubt", "forward", "half", JSD)
"""What the share of the reverse direction in the divergence can be (`Divergence`)."""
EDITED = ("cad", "ce", "both")
"""What edited positions can learn by."""


class Divergence(NamedTuple):
    """Confidence adaptive divergence (CAD) of an early prediction p from a later one t (12).

    **Guessed**: the sources name the motives and not the formula. The forward direction, which
    covers all modes, is for targets that are unsure, and the reverse one for those that are sure.
    The confidence c is the largest probability.

    Attributes:
        weight: the share w of the reverse direction: "confidence" c, "doubt" 1 - c, "forward" 0,
            "half" 1/2. "jsd" is the Jensen-Shannon divergence in place of both, in case the reverse
            direction collapses to one mode.
        temperature: of the confidence.
        floor: lowest probability of the target in KL(p ‖ t), which would grow beyond all bounds; 0:
            none.
    """

    weight: str = WEIGHTS[0]
    temperature: float = 1.0
    floor: float = 1e-6

    def confidence(self, log_t: Tensor) -> Tensor:
        """The confidence c = max_v t(v) (11), [N]."""
        if self.temperature != 1:
            log_t = (log_t / self.temperature).log_softmax(dim=-1)
        return log_t.amax(dim=-1).exp()

    def of(self, log_p: Tensor, log_t: Tensor) -> Tensor:
        """(1 - w) KL(t ‖ p) + w KL(p ‖ t) of log-probabilities [N, V - 1], [N] in nats."""
        if self.weight == JSD:
            log_middle = torch.logaddexp(log_p, log_t) - math.log(2)
            return (_kl(log_t, log_middle) + _kl(log_p, log_middle)) / 2
        forward = _kl(log_t, log_p)
        floored = log_t.clamp(min=math.log(self.floor)) if self.floor else log_t
        reverse = _kl(log_p, floored)
        match self.weight:
            case "confidence":
                share = self.confidence(log_t)
            case "doubt":
                share = 1 - self.confidence(log_t)
            case "half":
                share = torch.full_like(forward, 0.5)
            case _:
                return forward
        return (1 - share) * forward + share * reverse


CAD = Divergence()


def _kl(log_one: Tensor, log_other: Tensor) -> Tensor:
    """KL(one ‖ other) of each row."""
    return (log_one.exp() * (log_one - log_other)).sum(dim=-1)


def log_probs(logits: Tensor, mask_token_id: int) -> Tensor:
    """Log-probabilities [N, V - 1] of all tokens but MASK, in float32 or wider.

    The column of MASK is left out, since -inf - -inf would be no number.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    others = torch.cat((wide[:, :mask_token_id], wide[:, mask_token_id + 1 :]), dim=-1)
    return others.log_softmax(dim=-1)


class Learners(NamedTuple):
    """Which positions learn by what, [B, L'] bool each.

    Attributes:
        all: those that learn.
        agreeing: those that learn to predict what the later stage predicts.
        told: those that learn the token which the later stage shows.
    """

    all: Tensor
    agreeing: Tensor
    told: Tensor


def learners(
    stages: Stages, labels: Tensor, mask_token_id: int, edited_loss: str = EDITED[0]
) -> Learners:
    """Who learns what: U ∪ E and R without E (9, 10), or what `edited_loss` makes of E.

        U = masked in S_a and in S_b,   R = masked in S_a and shown in S_b                       (9)
        E = {i in R : the token changed after it was first shown, up to S_b}                    (10)

    **Guessed**: that edited positions learn by the divergence alone, and that a position which
    shows a token in S_a does not learn.
    """
    learns = (labels != IGNORE) & (stages.early == mask_token_id)
    still_masked = learns & (stages.late == mask_token_id)
    revealed = learns & ~still_masked
    edited = revealed & stages.edited
    agreeing = still_masked if edited_loss == "ce" else still_masked | edited
    told = revealed & ~edited if edited_loss == "cad" else revealed
    return Learners(learns, agreeing, told)


def cforce_loss(
    model: Any,
    clean_ids: Tensor,
    stages: Stages,
    positions: Tensor | None,
    who: Learners,
    *,
    block_length: int,
    mask_token_id: int,
    cad: Divergence = CAD,
    reveal_weight: float = 1.0,
    average: str = SEQUENCES,
    chunk: int = CHUNK,
) -> Loss:
    """Consistency with the model's own prediction at the next stage of a recorded decoding.

        p_i = p_θ(· | S_a),   t_i = sg[p_θ(· | S_b)],   c_i = max_v t_i(v)                      (11)
        CAD_i = (1 - c_i) KL(t_i ‖ p_i) + c_i KL(p_i ‖ t_i)                                     (12)
        L = mean over U ∪ E of CAD_i + λ mean over R without E of -log p_i(S_b[i])              (13)

    The sources say: the target is the same current model at the adjacent later stage, without
    gradient; masked positions learn by the divergence and newly shown ones by cross-entropy; in
    models that edit, the divergence covers edited positions too. **Guessed**: λ = 1, and that both
    terms are means over the positions of a batch (`average` "labels"). MASK is no token of either
    prediction.

    Args:
        model: as `oput_loss` takes it.
        clean_ids: [B, L] int64, the final tokens: the context of every block.
        stages: the states S_a and S_b, [B, L'].
        positions: [B, L'] int64, where the states stand, as `NoisyBatch` has them.
        who: learns what, of `learners`.
        block_length: positions that are decoded together.
        mask_token_id: MASK.
        cad: the divergence.
        reveal_weight: λ.
        average: of both means, as `dmax.training.objectives.mean` takes it.
        chunk: how many logits of a stage there may be at once.

    Returns:
        The loss; its `parts` are those of both terms, and the mean `confidence` in U ∪ E, or NaN.
    """
    embed = model.get_input_embeddings()
    context = CleanStream(model, clean_ids, block_length, positions)
    early = context.denoise(embed(stages.early))
    with torch.no_grad():  # the later prediction is a target only
        late = context.denoise(embed(stages.late))

    differing, surprise, sureness = _compare(
        early, late, stages.late, who.all, mask_token_id, cad, chunk
    )
    agreeing = who.agreeing.to(differing.dtype)
    agreement = mean(differing, stages.late, "cad", average, agreeing)
    reveal = mean(surprise, stages.late, "reveal", average, who.told.to(surprise.dtype))
    confidence = (sureness * agreeing).sum() / agreeing.sum()
    return Loss(
        agreement.total + reveal_weight * reveal.total,
        {**agreement.parts, **reveal.parts, "confidence": confidence},
        agreement.per_sequence | reveal.per_sequence,
    )


def _compare(
    early: States,
    late: States,
    tokens: Tensor,
    learns: Tensor,
    mask_token_id: int,
    cad: Divergence,
    chunk: int,
) -> tuple[Tensor, ...]:
    """Divergence, -log p of the later tokens, and confidence of the later prediction.

    All are [B, L'], 0 where nothing is learnt. Where the later token is MASK, -log p means nothing.
    """
    early_rows, late_rows = early.values[learns], late.values[learns]
    shown = tokens[learns]  # [N]
    columns = (shown - (shown > mask_token_id).long()) * (shown != mask_token_id)  # MASK has none

    def compare(part: slice) -> tuple[Tensor, ...]:
        log_p = log_probs(early.head(early_rows[part]), mask_token_id)
        with torch.no_grad():
            log_t = log_probs(late.head(late_rows[part]), mask_token_id)
        surprise = -log_p.gather(-1, columns[part, None])[:, 0]
        return cad.of(log_p, log_t), surprise, cad.confidence(log_t)

    compared = in_chunks(compare, len(early_rows), early.vocab_size, chunk)
    return tuple(row.new_zeros(learns.shape).masked_scatter(learns, row) for row in compared)


def stage_width(progress: float, first: float = 4, last: float = 16) -> int:
    """Tokens from one stage to the next, Δ(τ) = round(first + (last - first) τ), at least 1.

    **Guessed**: the sources say that the gap between the stages grows during training. Here the
    stages become wider, from 4 to 16 tokens of a block of 32, and the later one is always the next.

    Args:
        progress: τ, the share of the training that is done, from 0 to 1.
        first: width at the beginning.
        last: width at the end.
    """
    return max(1, round(first + (last - first) * progress))


@dataclass(frozen=True, slots=True)
class CForce(Objective):
    """CForce, `cforce_loss`, on trajectories that `dmax distill --trajectories` has recorded.

    There is no noise but the recorded states: the mask ratios mean nothing here. A trajectory is
    cut by how many tokens have been shown, and not by steps, as the sources say.

    **Guessed**, each with an argument to change it:

    - the strategy and the threshold of the trajectories, those of `dmax distill`;
    - `stage_width_first`, `stage_width_last`: how the gap grows;
    - `stage_draw`: which pair of stages a block shows, evenly drawn;
    - `cad_weight`, `cad_temperature`, `cad_floor`: the divergence;
    - `edited_loss`: what edited tokens teach;
    - `reveal_weight`, and `loss_average`: the guess is `labels`, as the recipes have it;
    - learning rate, schedule and steps, which are the training's: OPUT's by default.

    Guessed without one: trajectories hold hard tokens only and are not recorded anew during
    training, cuts are made within a block, whose context are the clean blocks before it, no other
    loss stands beside this one, nothing is frozen, and a block whose pair of stages leaves no mask
    learns by cross-entropy alone.

    Attributes:
        cad_weight: of the reverse direction: confidence, doubt, forward, half or jsd.
        cad_temperature: of the confidence.
        cad_floor: lowest probability of a target in the reverse direction; 0: none.
        reveal_weight: λ, of the cross-entropy of newly shown tokens.
        edited_loss: cad, ce or both.
        stage_width_first: tokens from one stage to the next when training begins; None: an eighth
            of a block.
        stage_width_last: the same when it ends; None: half a block.
        stage_draw: states or cuts.

    Raises:
        InputError: a setting that there is not, or a width below 1.
    """

    decoding = None  # the recorded one: that of the model before
    collator: ClassVar[type[TrajectoryCollator]] = TrajectoryCollator
    batch: ClassVar[type[FollowedBatch]] = FollowedBatch

    cad_weight: str
    cad_temperature: float
    cad_floor: float
    reveal_weight: float
    edited_loss: str
    stage_width_first: int | None
    stage_width_last: int | None
    stage_draw: str

    def __post_init__(self) -> None:
        """Raises `InputError` naming the setting that is wrong."""
        choices = {"cad_weight": WEIGHTS, "edited_loss": EDITED, "stage_draw": DRAWS}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(
                    f"`{name}` must be one of {', '.join(allowed)}, got {show(value)}",
                    hint=did_you_mean(value, allowed),
                )
        check_number("cad_temperature", self.cad_temperature, low=0, high=100, above_low=True)
        check_number("cad_floor", self.cad_floor, low=0, high=1)
        check_number("reveal_weight", self.reveal_weight, low=0, high=1e6)
        for name in ("stage_width_first", "stage_width_last"):
            check_number(name, getattr(self, name), low=1, high=MOST, whole=True, optional=True)

    def loss(self, model: Any, clean: CleanBatch, generator: torch.Generator) -> Loss:
        """Draw two adjacent stages of every block."""
        assert isinstance(clean, FollowedBatch)
        self._check_tokens(clean.write_tokens, model.config.vocab_size)
        first = self.stage_width_first or self.block_length / 8
        last = self.stage_width_last or self.block_length / 2
        width = stage_width(clean.progress, first, last)
        stages = adjacent_stages(
            clean,
            width,
            block_length=self.block_length,
            mask_token_id=self.mask_token_id,
            generator=generator,
            draws=self.stage_draw,
        )
        positions = noisy_positions(clean, self.block_length)
        stages = Stages(*(take(each, positions) for each in stages))
        labels = take(clean.labels, positions, beyond=IGNORE)
        loss = cforce_loss(
            model,
            clean.clean_ids,
            stages,
            positions,
            learners(stages, labels, self.mask_token_id, self.edited_loss),
            block_length=self.block_length,
            mask_token_id=self.mask_token_id,
            cad=Divergence(self.cad_weight, self.cad_temperature, self.cad_floor),
            reveal_weight=self.reveal_weight,
            average=self.loss_average,
        )
        parts = {**loss.parts, "stage_width": loss.total.new_tensor(float(width))}
        return Loss(loss.total, parts, loss.per_sequence)

    def _check_tokens(self, tokens: Tensor, vocab_size: int) -> None:
        """Raise `InputError` for tokens that cannot be learnt; those of a stream come unchecked."""
        hint = "record trajectories with the model that is trained"
        if (tokens == self.mask_token_id).any():
            raise InputError("a trajectory holds the mask token", hint=hint)
        highest = int(tokens.max())
        if highest >= vocab_size:
            raise InputError(
                f"a trajectory holds the token {highest}, and the model has tokens below "
                f"{vocab_size}",
                hint=hint,
            )
