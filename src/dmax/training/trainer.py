"""`DMaxTrainer`: the objectives on transformers' Trainer. The mathematics is in `objectives`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerControl
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

from dmax.errors import InputError
from dmax.files import writing
from dmax.special_ids import SpecialIds
from dmax.training.balancing import RouterBalancing
from dmax.training.block_warmup import block_length_at, check_stages
from dmax.training.config import DMaxConfig
from dmax.training.data import LengthSampler, num_ids
from dmax.training.embedding import without_gradient
from dmax.training.finite import first_not_finite, weights
from dmax.training.objectives import ObjectiveModule
from dmax.training.parallel import ParallelTrainer
from dmax.training.ranks import first_found, sum_over_ranks
from dmax.training.start import check_call, make_collator, start

HELD_OUT = -1  # the number of no step: noise of evaluations
EvalHook = Callable[[nn.Module], dict[str, float]]
"""Measures a model in evaluation mode, for example its accuracy and tokens per forward."""


class DMaxTrainer(ParallelTrainer):
    """Train a block-diffusion model with one of the objectives.

    Training stops with an `InputError` before a number that is not finite reaches the optimiser or
    a checkpoint. It names the step, the first such tensor and the last good checkpoint.

    Args:
        model: a bundled name, a folder or a hub id; or a model, which may be a `peft.PeftModel`.
        args: a `DMaxConfig`; None: the paper's.
        train_dataset: prompts and responses; None for a trainer that only evaluates.
        eval_dataset: held-out prompts and responses, for the loss of an evaluation.
        processing_class: the tokenizer; None takes the model's own.
        special_ids: None takes those that the model's files name.
        eval_hook: called at every evaluation with the model in evaluation mode; returns metrics,
            such as accuracy and tokens per forward.
        peft_config: of adapters to train in place of the model, such as a `peft.LoraConfig`.
        kwargs: passed to `transformers.Trainer` (`callbacks`, `optimizers`, …).

    Attributes:
        special_ids: MASK, EOS, pad and the block length.

    Raises:
        InputError: an example that no model can learn from, or a weight that is not finite.
    """

    args: DMaxConfig
    control: TrainerControl

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel,
        args: DMaxConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        processing_class: PreTrainedTokenizerBase | None = None,
        special_ids: SpecialIds | None = None,
        eval_hook: EvalHook | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ) -> None:
        args = check_call(args, kwargs)
        begun = start(
            model,
            args,
            tokenizer=processing_class,
            special_ids=special_ids,
            peft_config=peft_config,
        )
        check_stages(args.block_warmup or [], begun.special_ids.block_length)
        if train_dataset is not None:
            train_dataset = begun.examples(train_dataset, args)
        self._has_held_out = eval_dataset is not None
        if eval_dataset is not None:
            eval_dataset = begun.examples(eval_dataset, args, "eval_dataset")
        elif eval_hook is not None:
            eval_dataset = train_dataset  # never read, but Trainer insists on one
        self.special_ids = begun.special_ids
        super().__init__(
            model=begun.model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=make_collator(self.special_ids, args),
            processing_class=begun.tokenizer,
            **kwargs,
        )
        # Our losses are means over a micro-batch. Models take **kwargs, from which Trainer would
        # conclude that the caller scales them, and add up those of a step instead of averaging.
        self.model_accepts_loss_kwargs = False
        self.eval_hook = eval_hook
        self._begun = begun
        objective = args.objective_class.from_settings(vars(args) | asdict(begun.special_ids))
        self.objective_module = ObjectiveModule(
            self.model, objective.start(self.model, args.device), compiled=args.compile_objective
        )
        # The row of the input table that gets no gradient.
        self._still_row = None if args.train_eos_embedding else begun.special_ids.eos_token_ids[0]
        self._losses: list[Tensor] = []  # of the micro-batches of this step
        self._parts: list[dict[str, Tensor]] = []  # of the losses since the last line of the log
        self._tokens = 0
        self._since = time.perf_counter()
        self._held_out: list[dict[str, Tensor]] = []  # parts of the losses of one evaluation
        if args.router_bias_speed:
            self.add_callback(RouterBalancing(self.model, args.router_bias_speed))

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
        step = self.state.global_step
        progress = step / max(1, self.state.max_steps)
        stages = self.args.block_warmup or []
        own = self.special_ids.block_length
        block_length = block_length_at(step, stages, own)
        # Noise depends on seed, step and micro-batch only, so that a resumed run repeats it.
        generator = self._noise(step, len(self._losses))
        parts: dict[str, Tensor] = model(generator, block_length, progress=progress, **inputs)
        loss = parts.pop("loss")
        self._parts.append(parts)
        self._tokens += inputs["clean_ids"].numel()
        return loss

    def _noise(self, step: int, micro_batch: int) -> torch.Generator:
        """The source of the noise of a micro-batch.

        The micro-batches of all processes are numbered in turn. So two processes draw what one
        draws that accumulates twice as often.
        """
        number = micro_batch * self.args.world_size + self.args.process_index
        seed = (self.args.seed * 1_000_003 + step) * 1_009 + number
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
        """Adds the parts of the loss and the tokens per second since the last line.

        A micro-batch in which a part is NaN does not count in the mean of that part.
        """
        if "loss" in logs:
            values = torch.stack([torch.stack([*parts.values()]) for parts in self._parts]).float()
            both = torch.stack((values.nansum(dim=0), (~values.isnan()).sum(dim=0)))  # [2, N]
            total, count = sum_over_ranks(both)
            logs |= dict(zip(self._parts[0], (total / count).tolist(), strict=True))
            tokens = self._tokens * self.args.world_size  # about as many on every rank
            logs["tokens_per_second"] = tokens / (time.perf_counter() - self._since)
            self._parts.clear()
            self._tokens = 0
            self._since = time.perf_counter()
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The loss on held-out data by the same objective, and what the hook measures.

        The noise is the same at every evaluation, so that its losses can be compared.

        Args:
            eval_dataset: in place of that of the trainer.
            ignore_keys: there is nothing to ignore.
            metric_key_prefix: what names of metrics begin with.
        """
        self.check_weights(self.state.global_step)
        began = time.perf_counter()
        if eval_dataset is not None:
            eval_dataset = self._begun.examples(eval_dataset, self.args, "eval_dataset")
        with torch.random.fork_rng(devices=()):  # what training draws is the same without it
            if eval_dataset is not None or self._has_held_out:
                metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
            else:
                metrics = self._hook_metrics(metric_key_prefix)
                self.log(metrics)
                self.control = self.callback_handler.on_evaluate(
                    self.args, self.state, self.control, metrics
                )
        # Evaluation does not count against tokens per second.
        self._since += time.perf_counter() - began
        return metrics

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Adds the parts of the loss to its mean, and what the hook measures."""
        self._held_out.clear()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        for name in self._held_out[0]:
            values = torch.cat([parts[name] for parts in self._held_out])
            output.metrics[f"{metric_key_prefix}_{name}"] = values.nanmean().item()
        output.metrics.update(self._hook_metrics(metric_key_prefix))
        return output

    @torch.no_grad()
    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any
    ) -> tuple[Tensor, None, None]:
        """The loss of one held-out batch; there are no logits to hand on."""
        generator = self._noise(HELD_OUT, len(self._held_out))
        with self.accelerator.autocast():
            parts = self.objective_module(generator, progress=1.0, **self._prepare_inputs(inputs))
        loss = parts.pop("loss")
        # One value for each sequence, as Trainer does with the loss: the last batch has fewer.
        repeated = {name: part.repeat(self.args.eval_batch_size) for name, part in parts.items()}
        self._held_out.append(self.accelerator.gather_for_metrics(repeated))
        return loss, None, None

    def _hook_metrics(self, prefix: str) -> dict[str, float]:
        if self.eval_hook is None:
            return {}
        measured = self.measured(self.eval_hook)
        return {f"{prefix}_{name}": value for name, value in measured.items()}
