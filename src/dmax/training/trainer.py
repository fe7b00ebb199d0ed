"""`DMaxTrainer`: the objectives on transformers' Trainer. The mathematics is in `objectives`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from dmax.checkpoint_files import reading
from dmax.errors import InputError
from dmax.files import writing
from dmax.params import check_number
from dmax.special_ids import SpecialIds
from dmax.training import get_objective
from dmax.training.clean_stream import CleanBatch
from dmax.training.data import Collator, Encoded, LengthSampler, check_examples
from dmax.training.finite import check_weights, first_not_finite, weights

EvalHook = Callable[[nn.Module], dict[str, float]]
"""Measures a model in evaluation mode, for example its accuracy and tokens per forward."""


# Bounds of training arguments, transformers' own included; other numbers are at least 0.
_LOWEST = {
    "max_steps": -1,  # as many as the epochs have
    "local_rank": -1,  # of no process group
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit", "pad_to"), 1),
}
_ABOVE_ZERO = (
    *("num_train_epochs", "logging_steps", "save_steps", "eval_steps"),
    *("rollout_temperature", "certainty_temperature"),
)
_HIGHEST = {
    **dict.fromkeys(("mask_ratio_low", "mask_ratio_high"), 1),
    "pad_to": 2**20,
    "dataloader_num_workers": 64,  # processes, each a copy of this one
}
_LARGEST = 2**32 - 1  # seeds of numpy end here


@dataclass
class DMaxConfig(TrainingArguments):
    """Training arguments of transformers, plus what block diffusion needs.

    Objective, rollout, mask ratio and learning rate are the paper's by default.

    Attributes:
        objective: mdlm, uniform, oput, dparallel, d2f, or that of a plugin.
        rollout: of oput: argmax, sample, soft or spd.
        rollout_temperature: of the sampling rollout.
        mask_ratio_low: lowest share of response tokens that are masked.
        mask_ratio_high: highest share; if it equals the lowest, the share is fixed.
        certainty_weight: of dparallel's entropy of right predictions.
        certainty_temperature: of the softmax in that entropy.
        eos_labels: how many trailing EOS are labelled; None: one block of them.
        pad_to: pad every batch to this length, for static shapes.
        router_bias_speed: step of loss-free expert balancing; 0: off.
        compile_objective: compile the loss with torch.compile, which wants a C++ compiler.
        objective_class: what `objective` and `rollout` name; not an argument.
    """

    objective: str = "oput"
    rollout: str = "argmax"
    rollout_temperature: float = 1.0
    mask_ratio_low: float = 0.75
    mask_ratio_high: float = 0.75
    certainty_weight: float = 2.0
    certainty_temperature: float = 0.5
    eos_labels: int | None = None
    pad_to: int | None = None
    router_bias_speed: float = 0.0
    compile_objective: bool = False

    learning_rate: float = 2e-6
    lr_scheduler_type: Any = "cosine"
    remove_unused_columns: bool = False

    def __post_init__(self) -> None:
        """Raises `InputError` naming the field that is wrong."""
        self._check_numbers()
        with reading("these training arguments are not usable"):
            super().__post_init__()
        self.objective_class = get_objective(self.objective, self.rollout)
        if self.mask_ratio_low > self.mask_ratio_high:
            raise InputError(
                "mask ratios must satisfy 0 <= low <= high <= 1, "
                f"got {self.mask_ratio_low} and {self.mask_ratio_high}"
            )

    def _check_numbers(self) -> None:
        """All fields that are numbers, before transformers compares or converts them."""
        hints = get_type_hints(type(self))
        for entry in fields(self):
            kinds = set(get_args(hints[entry.name])) or {hints[entry.name]}
            if not kinds <= {int, float, type(None)}:
                continue
            check_number(
                entry.name,
                getattr(self, entry.name),
                low=_LOWEST.get(entry.name, 0),
                high=_HIGHEST.get(entry.name, _LARGEST),
                above_low=entry.name in _ABOVE_ZERO,
                whole=float not in kinds,
                optional=type(None) in kinds,
            )
        if self.max_steps == 0:
            raise InputError("`max_steps` must be at least 1, or -1 to train by epochs, got 0")

    @property
    def n_gpu(self) -> int:
        """How many GPUs training uses: one, or none.

        Trainer would take all GPUs it sees and wrap the model in `DataParallel`, which hides the
        methods that the objectives call.
        """
        return min(1, super().n_gpu)


class DMaxTrainer(Trainer):
    """Train a block-diffusion model with one of the objectives.

    Training stops with an `InputError` before a number that is not finite reaches the optimiser or
    a checkpoint. It names the step, the first such tensor and the last good checkpoint.

    Args:
        model: a block-diffusion model, as `oput_loss` takes it.
        args: a `DMaxConfig`.
        train_dataset: encoded prompts and responses.
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
        train_dataset: Sequence[Encoded],
        *,
        special_ids: SpecialIds,
        eval_hook: EvalHook | None = None,
        **kwargs: Any,
    ) -> None:
        check_weights(model)
        check_examples(train_dataset, model.config.vocab_size, special_ids.mask_token_id)
        longest = max(map(len, train_dataset), default=0)
        if args.pad_to is not None and longest >= args.pad_to:
            raise InputError(
                f"`pad_to` must be above {longest}, the tokens of the longest example, "
                f"got {args.pad_to}"
            )
        block_length = special_ids.block_length
        eos_labels = block_length if args.eos_labels is None else args.eos_labels
        collator = Collator(block_length, special_ids.eos_token_ids[0], eos_labels, args.pad_to)
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
        self._loss = torch.compile(objective.loss) if args.compile_objective else objective.loss
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
        loss: Tensor = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        if self.accelerator.sync_gradients:
            self._check_step()
            self._losses.clear()
        return loss

    def _check_step(self) -> None:
        """Losses and gradients, before the optimiser takes them."""
        step = self.state.global_step + 1
        loss = first_not_finite((("the loss", torch.stack(self._losses)),))
        if loss is not None:
            self.check_weights(step)  # these would be the reason
            raise self._not_finite(step, *loss)
        if self.accelerator.scaler is not None:
            return  # with float16 they overflow now and then, and the scaler leaves out the step
        gradient = first_not_finite(
            (f"the gradient of `{name}`", parameter.grad)
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        )
        if gradient is not None:
            raise self._not_finite(step, *gradient)

    def check_weights(self, step: int) -> None:
        """Raise `InputError` naming the first weight that is not finite after a step."""
        found = first_not_finite(weights(self.model))
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
        clean = CleanBatch(**inputs)
        with self.accelerator.autocast():
            loss = self._loss(model, clean, self._generator())
        self._parts.append(loss.parts)
        self._tokens += clean.clean_ids.numel()
        return loss.total

    def _generator(self) -> torch.Generator:
        """Noise depends on seed, step and micro-batch only, so that a resumed run repeats it."""
        step = self.state.global_step
        if self._step != step:
            self._step = step
            self._micro_batch = 0
        seed = (self.args.seed * 1_000_003 + step) * 1_009 + self._micro_batch
        self._micro_batch += 1
        return torch.Generator().manual_seed(seed)

    def _get_train_sampler(self, *_: Any) -> LengthSampler:
        return LengthSampler(self.train_dataset, self.args.train_batch_size, self.args.seed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.check_weights(self.state.global_step)
        with writing(f"a checkpoint to {self.args.output_dir}"):
            super()._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *_: Any) -> None:
        # Trainer would load the file's names as they are; the published layout has to be read by
        # `from_pretrained`.
        stored = type(self.model).from_pretrained(
            resume_from_checkpoint, config=self.model.config, dtype=torch.float32
        )
        check_weights(stored)
        self.model.load_state_dict(stored.state_dict())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the parts of the loss and the tokens per second since the last line."""
        if "loss" in logs:
            for name in self._parts[0]:
                logs[name] = torch.stack([parts[name] for parts in self._parts]).mean().item()
            logs["tokens_per_second"] = self._tokens / (time.perf_counter() - self._since)
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
        self.model.eval()  # every training step goes back to training mode by itself
        metrics = {f"eval_{name}": value for name, value in self.eval_hook(self.model).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        # Evaluation does not count against tokens per second.
        self._since += time.perf_counter() - began
        return metrics


class RouterBalancing(TrainerCallback):
    """Loss-free balancing: after each step, favour the experts that had too few tokens.

    It moves `expert_bias`, which enters the choice of experts only, so balance costs the loss
    nothing (DeepSeek-V3, section 2.1.2).
    """

    def __init__(self, model: nn.Module, speed: float) -> None:
        self.speed = speed
        self.loads: dict[Any, Tensor] = {}  # tokens of each expert since the last step, by router
        for module in model.modules():
            bias = getattr(module, "expert_bias", None)
            if isinstance(bias, Tensor):
                self.loads[module] = torch.zeros_like(bias)
                module.register_forward_hook(self._count_tokens)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Move every bias by one step and start counting anew."""
        for router, load in self.loads.items():
            router.expert_bias += self.speed * torch.sign(load.mean() - load)
            load.zero_()

    def _count_tokens(self, router: nn.Module, _inputs: Any, output: Any) -> None:
        chosen = output[0].flatten()
        load = self.loads[router]
        load.index_add_(0, chosen, torch.ones_like(chosen, dtype=load.dtype))
