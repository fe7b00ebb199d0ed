"""`DMaxTrainer`: the objectives on transformers' Trainer. The mathematics is in `objectives`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerControl
from transformers.trainer_utils import get_last_checkpoint

from dmax.errors import InputError
from dmax.files import writing
from dmax.records.encoding import encode_dataset
from dmax.special_ids import SpecialIds
from dmax.training.balancing import RouterBalancing
from dmax.training.config import DMaxConfig
from dmax.training.data import Collator, LengthSampler, check_examples, num_ids
from dmax.training.embedding import without_gradient
from dmax.training.finite import check_weights, first_not_finite, weights
from dmax.training.objectives import ObjectiveModule
from dmax.training.parallel import ParallelTrainer
from dmax.training.ranks import first_found, mean_over_ranks

EvalHook = Callable[[nn.Module], dict[str, float]]
"""Measures a model in evaluation mode, for example its accuracy and tokens per forward."""


class DMaxTrainer(ParallelTrainer):
    """Train a block-diffusion model with one of the objectives.

    Training stops with an `InputError` before a number that is not finite reaches the optimiser or
    a checkpoint. It names the step, the first such tensor and the last good checkpoint.

    Args:
        model: a block-diffusion model, as `oput_loss` takes it.
        args: a `DMaxConfig`.
        train_dataset: prompts and responses, as `encode_dataset` takes them.
        special_ids: those of the checkpoint.
        eval_hook: called at every evaluation with the model in evaluation mode; returns metrics.
        kwargs: passed to `transformers.Trainer` (`processing_class`, `callbacks`, …).

    Raises:
        InputError: an example that no model can learn from, or a weight that is not finite.
    """

    args: DMaxConfig
    control: TrainerControl

    def __init__(
        self,
        model: PreTrainedModel,
        args: DMaxConfig,
        train_dataset: Any,
        *,
        special_ids: SpecialIds,
        eval_hook: EvalHook | None = None,
        **kwargs: Any,
    ) -> None:
        check_weights(model)
        context = model.config.max_position_embeddings
        encoded = encode_dataset(
            train_dataset,
            kwargs.get("processing_class"),
            special_ids,
            max_length=min(args.max_length or context, context),
            eos_labels=args.eos_labels,
            too_long=args.too_long,
            num_proc=args.dataset_num_proc,
        )
        train_dataset = check_examples(encoded, model.config.vocab_size, special_ids.mask_token_id)
        block_length = special_ids.block_length
        eos_labels = block_length if args.eos_labels is None else args.eos_labels
        collator = Collator(block_length, special_ids.eos_token_ids[0], eos_labels, args.pad_to)
        collator.check(train_dataset)
        if eval_hook is not None:
            kwargs["eval_dataset"] = train_dataset  # never read, but Trainer insists on one
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, data_collator=collator, **kwargs
        )
        # Our losses are means over a micro-batch. Models take **kwargs, from which Trainer would
        # conclude that they are scaled by the caller, and add up the micro-batches of a step
        # instead of averaging them.
        self.model_accepts_loss_kwargs = False
        self.eval_hook = eval_hook
        objective = args.objective_class.from_settings(vars(args) | asdict(special_ids))
        self.objective_module = ObjectiveModule(
            self.model, objective, compiled=args.compile_objective
        )
        # The row of the input table that gets no gradient.
        self._still_row = None if args.train_eos_embedding else special_ids.eos_token_ids[0]
        self._losses: list[Tensor] = []  # of the micro-batches of this step
        self._parts: list[dict[str, Tensor]] = []  # of the losses since the last line of the log
        self._tokens = 0
        self._since = time.perf_counter()
        self._step = -1
        self._micro_batch = 0
        if args.router_bias_speed:
            self.add_callback(RouterBalancing(model, args.router_bias_speed))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward of one micro-batch; the last one of a step looks at all of them."""
        with without_gradient(self.model.get_input_embeddings(), self._still_row):
            loss: Tensor = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        if self.accelerator.sync_gradients:
            self._check_step()
            self._losses.clear()
        return loss

    def _check_step(self) -> None:
        """Losses and gradients, before the optimiser takes them."""
        step = self.state.global_step + 1
        looked_at = [("the loss", torch.stack(self._losses))]
        if self.accelerator.scaler is None:  # it leaves out steps whose float16 gradients overflow
            looked_at += [
                (f"the gradient of `{name}`", parameter.grad)
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None
            ]
        found = first_found(first_not_finite(looked_at), self.args.device)
        if found is None:
            return
        if found[0] == "the loss":
            self.check_weights(step)  # these would be the reason
        raise self._not_finite(step, *found)

    def check_weights(self, step: int) -> None:
        """Raise `InputError` naming the first weight that is not finite after a step."""
        found = first_found(first_not_finite(weights(self.model)), self.args.device)
        if found is not None:
            name, value = found
            raise self._not_finite(step, f"the weight `{name}`", value)

    def _not_finite(self, step: int, what: str, value: float) -> InputError:
        folder = self.args.output_dir
        last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
        good = f"the last good checkpoint is {last}" if last else "there is no checkpoint yet"
        return InputError(
            f"step {step}: {what} is not finite but {value}; {good}",
            hint="lower `learning_rate` or `max_grad_norm`, or warm up longer (`warmup_steps`)",
        )

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        """The objective's loss on one micro-batch of the collator's."""
        parts: dict[str, Tensor] = model(self._generator(), **inputs)
        loss = parts.pop("loss")
        self._parts.append(parts)
        self._tokens += inputs["clean_ids"].numel()
        return loss

    def _generator(self) -> torch.Generator:
        """Noise depends on seed, step and micro-batch only, so that a resumed run repeats it.

        The micro-batches of all processes are numbered in turn. So two processes draw what one
        draws that accumulates twice as often.
        """
        step = self.state.global_step
        if self._step != step:
            self._step = step
            self._micro_batch = 0
        number = self._micro_batch * self.args.world_size + self.args.process_index
        seed = (self.args.seed * 1_000_003 + step) * 1_009 + number
        self._micro_batch += 1
        return torch.Generator(self.args.device).manual_seed(seed)

    def _get_train_sampler(self, *_: Any) -> LengthSampler:
        return LengthSampler(
            num_ids(self.train_dataset), self.args.train_batch_size, self.args.seed
        )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_weights(self.state.global_step)
        with writing(f"a checkpoint to {self.args.output_dir}"):
            super()._save_checkpoint(model, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss and the tokens per second since the last line."""
        if "loss" in logs:
            means = {
                name: torch.stack([parts[name] for parts in self._parts]).mean()
                for name in self._parts[0]
            }
            logs |= mean_over_ranks(means)
            tokens = self._tokens * self.args.world_size  # about as many on every rank
            logs["tokens_per_second"] = tokens / (time.perf_counter() - self._since)
            self._parts.clear()
            self._tokens = 0
            self._since = time.perf_counter()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Run the hook (decoding on held-out problems) in place of a loss on a second dataset."""
        if self.eval_hook is None:
            return {}
        self.check_weights(self.state.global_step)
        began = time.perf_counter()
        metrics = {f"eval_{name}": value for name, value in self.measured(self.eval_hook).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        # Evaluation does not count against tokens per second.
        self._since += time.perf_counter() - began
        return metrics
