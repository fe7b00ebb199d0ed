"""`DMaxTrainer`: the objectives on transformers' Trainer. Wiring only; the mathematics is in `objectives`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from dmax.baselines.objectives import certainty_loss, d2f_loss
from dmax.baselines.rollouts import soft_oput_loss
from dmax.errors import InputError, did_you_mean
from dmax.special_ids import SpecialIds
from dmax.training import noise
from dmax.training.clean_stream import Batch, CleanBatch
from dmax.training.data import Collator, LengthSampler, ResponseDataset
from dmax.training.objectives import Loss, mdlm_loss, oput_loss, uniform_loss

OBJECTIVES = ("mdlm", "uniform", "oput", "dparallel", "d2f")
ROLLOUTS = ("argmax", "sample", "soft", "spd")
EvalHook = Callable[[nn.Module], dict[str, float]]


@dataclass
class DMaxConfig(TrainingArguments):
    """Training arguments of transformers, plus what block diffusion needs; defaults are the paper's recipe."""

    objective: str = field(
        default="oput", metadata={"help": "mdlm, uniform, oput, dparallel or d2f"}
    )
    rollout: str = field(
        default="argmax",
        metadata={"help": "on-policy rollout of oput: argmax, sample, soft or spd"},
    )
    rollout_temperature: float = field(
        default=1.0, metadata={"help": "temperature of the sampling rollout"}
    )
    mask_ratio_low: float = field(
        default=0.75, metadata={"help": "lowest share of response tokens masked"}
    )
    mask_ratio_high: float = field(
        default=0.75, metadata={"help": "highest share; equal to the lowest: fixed"}
    )
    certainty_weight: float = field(
        default=2.0, metadata={"help": "of dparallel's entropy of right predictions"}
    )
    certainty_temperature: float = field(
        default=0.5, metadata={"help": "of the softmax in that entropy"}
    )
    eos_labels: int | None = field(
        default=None, metadata={"help": "labelled trailing EOS; None: one block length"}
    )
    pad_to: int | None = field(
        default=None, metadata={"help": "pad every batch to this length (static shapes)"}
    )
    router_bias_speed: float = field(
        default=0.0, metadata={"help": "step of loss-free expert balancing; 0: off"}
    )
    compile_objective: bool = field(
        default=False, metadata={"help": "torch.compile the loss; wants a C++ compiler"}
    )
    learning_rate: float = 2e-6
    lr_scheduler_type: Any = "cosine"
    remove_unused_columns: bool = False
    include_num_input_tokens_seen: Any = "no"

    def __post_init__(self) -> None:
        """Raises `InputError` naming the field that is wrong."""
        super().__post_init__()
        for name, value, choices in (
            ("objective", self.objective, OBJECTIVES),
            ("rollout", self.rollout, ROLLOUTS),
        ):
            if value not in choices:
                hint = did_you_mean(value, choices)
                raise InputError(
                    f"`{name}` must be one of {', '.join(choices)}, got {value!r}", hint
                )
        for name, is_right, rule in (
            ("learning_rate", self.learning_rate >= 0, "at least 0"),
            ("per_device_train_batch_size", self.per_device_train_batch_size >= 1, "at least 1"),
            ("rollout_temperature", self.rollout_temperature > 0, "above 0"),
            ("certainty_temperature", self.certainty_temperature > 0, "above 0"),
            ("eos_labels", self.eos_labels is None or self.eos_labels >= 0, "at least 0"),
            ("pad_to", self.pad_to is None or self.pad_to >= 1, "at least 1"),
        ):
            if not is_right:
                raise InputError(f"`{name}` must be {rule}, got {getattr(self, name)}")
        if not 0 <= self.mask_ratio_low <= self.mask_ratio_high <= 1:
            raise InputError(
                f"mask ratios must satisfy 0 <= low <= high <= 1, got {self.mask_ratio_low} and {self.mask_ratio_high}"
            )


class DMaxTrainer(Trainer):
    """Train a block-diffusion model with one of the objectives.

    Args:
        model: a model with `base_model`, `get_input_embeddings` and logits for given
            `inputs_embeds`.
        args: a `DMaxConfig`.
        train_dataset: encoded prompts and responses.
        special_ids: those of the checkpoint.
        eval_hook: called at every evaluation with the model in eval mode; returns metrics such as
            accuracy and TPF.
        kwargs: passed to `transformers.Trainer` (`processing_class`, `callbacks`, …).
    """

    args: DMaxConfig
    control: TrainerControl

    def __init__(
        self,
        model: nn.Module,
        args: DMaxConfig,
        train_dataset: ResponseDataset,
        *,
        special_ids: SpecialIds,
        eval_hook: EvalHook | None = None,
        **kwargs: Any,
    ) -> None:
        block_length = special_ids.block_length
        eos_labels = block_length if args.eos_labels is None else args.eos_labels
        collator = Collator(block_length, special_ids.eos_token_ids[0], eos_labels, args.pad_to)
        if eval_hook is not None:
            kwargs["eval_dataset"] = (
                train_dataset  # never read: Trainer only insists that there is one
            )
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, data_collator=collator, **kwargs
        )
        # Our losses are means over a micro-batch; models take **kwargs, from which Trainer would
        # conclude that they are scaled by the caller, and add up the micro-batches of a step
        # instead of averaging them.
        self.model_accepts_loss_kwargs = False
        self.mask_token_id = special_ids.mask_token_id
        self.block_length = block_length
        self.eval_hook = eval_hook
        objective: Callable[..., Loss] = self._objective
        self._loss = torch.compile(objective) if args.compile_objective else objective
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        self._tokens = 0
        self._since = time.perf_counter()
        self._micro = (-1, 0)
        if args.router_bias_speed:
            self.add_callback(RouterBalancing(model, args.router_bias_speed))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Corrupt the batch and apply the objective; noise depends on (seed, step) alone, so a resume repeats it."""
        args = self.args
        generator = self._generator()
        start = int(inputs["start"])
        examples = CleanBatch(inputs["clean_ids"], inputs["labels"], inputs["corruptible"], start)
        clean = examples.clean_ids
        corruptible = examples.corruptible
        low = args.mask_ratio_low
        high = args.mask_ratio_high
        if args.objective == "d2f":
            ratios = noise.rising_ratios(corruptible, self.block_length, low, high)
        else:
            ratios = noise.mask_ratios(len(clean), low, high, generator)
        noisy = noise.mask_tokens(clean, corruptible, ratios, self.mask_token_id, generator)
        batch = examples.with_noise(noisy)
        extra: Tensor | None = None
        if args.objective == "d2f":
            batch = Batch(clean, noisy, examples.labels)
            extra = ratios
        if args.objective == "uniform":
            vocab_size = self.accelerator.unwrap_model(model).config.vocab_size
            random_ids = noise.random_tokens(
                clean, corruptible, ratios, vocab_size, self.mask_token_id, generator
            )
            extra = examples.noisy_part(random_ids)
        with torch.autocast(clean.device.type, torch.bfloat16, enabled=args.bf16):
            loss = self._loss(model, batch, extra, generator)
        for name, value in loss.parts.items():
            self._parts[name].append(value)
        self._tokens += clean.numel()
        return (loss.total, loss) if return_outputs else loss.total

    def _objective(
        self, model: nn.Module, batch: Batch, extra: Tensor | None, generator: torch.Generator
    ) -> Loss:
        """`extra`: the random ids of `uniform`, the ratios of `d2f`."""
        length = self.block_length
        ids = {"block_length": length, "mask_token_id": self.mask_token_id}
        args = self.args
        if args.objective == "uniform" and extra is not None:
            return uniform_loss(model, batch, extra, block_length=length)
        if extra is not None:
            return d2f_loss(model, batch, extra, **ids)
        if args.objective == "mdlm":
            return mdlm_loss(model, batch, block_length=length)
        if args.objective == "dparallel":
            weight = args.certainty_weight
            temperature = args.certainty_temperature
            return certainty_loss(model, batch, **ids, weight=weight, temperature=temperature)
        if args.rollout in ("soft", "spd"):
            thresholds = torch.zeros(len(batch.noisy_ids), 1)
            if args.rollout == "spd":
                thresholds = torch.rand(len(batch.noisy_ids), 1, generator=generator)
            return soft_oput_loss(model, batch, thresholds.to(batch.noisy_ids.device), **ids)
        temperature = args.rollout_temperature if args.rollout == "sample" else 0.0
        return oput_loss(model, batch, **ids, temperature=temperature, generator=generator)

    def _generator(self) -> torch.Generator:
        step, count = self._micro
        self._micro = (self.state.global_step, count + 1 if step == self.state.global_step else 0)
        return torch.Generator().manual_seed(
            (self.args.seed * 1_000_003 + self._micro[0]) * 1_009 + self._micro[1]
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthSampler:
        dataset: Any = train_dataset or self.train_dataset
        return LengthSampler(dataset, self.args.train_batch_size, self.args.seed)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Trainer would load the file's names as they are; the published layout has to be read by
        # `from_pretrained`.
        model = self.model if model is None else model
        stored = type(model).from_pretrained(
            resume_from_checkpoint, config=model.config, dtype=torch.float32
        )
        model.load_state_dict(stored.state_dict())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the loss components, the rollout error rate and tokens per second since the last line."""
        if "loss" in logs:
            logs |= {
                name: torch.stack(values).mean().item() for name, values in self._parts.items()
            }
            logs["tokens_per_second"] = self._tokens / (time.perf_counter() - self._since)
            self._parts.clear()
            self._tokens = 0
            self._since = time.perf_counter()
        super().log(logs, start_time)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Run the hook (decoding on held-out problems) in place of a loss on a second dataset."""
        if self.eval_hook is None:
            return {}
        began = time.perf_counter()
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        metrics = {f"eval_{name}": value for name, value in self.eval_hook(model).items()}
        model.train(was_training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._since += (
            time.perf_counter() - began
        )  # evaluation does not count against tokens per second
        return metrics


class RouterBalancing(TrainerCallback):
    """Loss-free expert balancing: after each step, nudge `expert_bias` towards the experts that had too few tokens.

    The bias enters the choice of experts only, so balance costs the loss nothing (DeepSeek-V3,
    section 2.1.2).
    """

    def __init__(self, model: nn.Module, speed: float) -> None:
        self.speed = speed
        routers = [
            m for m in model.modules() if isinstance(getattr(m, "expert_bias", None), Tensor)
        ]
        self.biases: list[Any] = [router.expert_bias for router in routers]
        self.loads = [torch.zeros_like(bias) for bias in self.biases]
        for router, load in zip(routers, self.loads, strict=True):
            router.register_forward_hook(self._counter(load))

    @staticmethod
    def _counter(load: Tensor) -> Callable[..., None]:
        def count(_module: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            index = output[0].flatten()
            load.index_add_(0, index, torch.ones(index.shape, dtype=load.dtype, device=load.device))

        return count

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Move every bias by one step and start counting anew."""
        for bias, load in zip(self.biases, self.loads, strict=True):
            bias += self.speed * torch.sign(load.mean() - load)
            load.zero_()
