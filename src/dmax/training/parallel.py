"""`ParallelTrainer`: transformers' Trainer around an objective, in one process or in many.

Several processes hold the model in one of two ways: each one whole (`DistributedDataParallel`), or
each one a part (`sharding`). What is logged, decided and saved is the same for both.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from dmax.adapters import has_adapters, load_adapters, without_adapters
from dmax.attention import without_flex
from dmax.training.config import DMaxConfig
from dmax.training.finite import check_weights
from dmax.training.objectives import ObjectiveModule
from dmax.training.ranks import from_rank_zero, rank
from dmax.training.sharding import (
    SHARDS,
    Sharding,
    fill,
    fill_buffers,
    is_sharded,
    layer_classes,
    load_sharded,
    load_weights,
    save_sharded,
    shard,
    whole_copy,
)

SCHEDULER = "scheduler.pt"  # as Trainer calls it


class ParallelTrainer(Trainer):
    """Wraps, saves and loads the module of an objective; `model` stays the network in it.

    With a sharded model, rank 0 begins with the weights and the others with none: their model may
    be on the meta device.

    Attributes:
        objective_module: its forward is the loss, and it is what wrappers hold.
    """

    args: DMaxConfig
    model: Any  # the network
    objective_module: ObjectiveModule

    def whole_model(self) -> PreTrainedModel | None:
        """The model with all its weights, on rank 0; None on others. All ranks have to call it."""
        if is_sharded(self.model):
            return whole_copy(self.model)
        model: PreTrainedModel = self.model
        return model if rank() == 0 else None

    def measured(self, hook: Callable[[nn.Module], dict[str, float]]) -> dict[str, float]:
        """What a hook says of the whole model: rank 0 asks it, and the others wait."""
        model = self.whole_model()
        metrics = None
        if model is not None:
            if model is not self.model:  # a copy, as small as what training computes with
                for weight in model.parameters():  # buffers keep their precision
                    weight.data = weight.to(self.args.compute_dtype or weight.dtype)
                model.to(self.args.device)
            model.eval()  # every training step goes back to training mode by itself
            plain = without_adapters(model)
            with without_flex(plain):
                metrics = hook(plain)
        agreed: dict[str, float] = from_rank_zero(metrics)
        return agreed

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Frees what a forward of a sharded model has gathered; after training, backward does."""
        output = super().evaluation_loop(*args, **kwargs)
        for module in self.objective_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return output

    def load_weights(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint into a model that does not train any more."""
        if self.args.sharding is None:
            self._load_from_checkpoint(str(checkpoint))
        elif rank() == 0:
            load_weights(checkpoint / SHARDS, self.model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the whole model to a folder; a checkpoint has its weights in `SHARDS` instead."""
        if self.args.sharding is None:
            super().save_model(output_dir, _internal_call)
            return
        folder = output_dir or self.args.output_dir
        written: Any = self.model.config if _internal_call else self.whole_model()
        if self.args.should_save:
            written.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if has_adapters(self.model) and self.args.should_save:  # they stand with their own ids
            self.model.config.save_pretrained(output_dir or self.args.output_dir)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.args.is_sharded:  # else it goes there in parts
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> Any:
        """The objective's module around the model, in what makes it run in several processes."""
        if not training or model is not self.model:
            return model
        if self.args.is_sharded:
            return self.objective_module  # sharded here or by what Trainer calls next
        return self.accelerator.prepare_model(self.objective_module)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        if not self.args.is_sharded or is_sharded(self.model):
            return super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint
            )
        network = self.model
        is_new = resume_from_checkpoint is None
        whole = dict(network.state_dict()) if is_new and rank() == 0 else {}
        if any(weight.is_meta for weight in network.parameters()):
            network.to_empty(device="cpu")
            network.tie_weights()
        classes = layer_classes(network)
        if self.is_fsdp_enabled:  # accelerate shards what Trainer takes for the model
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = classes
            self.model = self.model_wrapped = self.objective_module
        else:
            sharding = self.args.sharding or Sharding()
            shard(self.objective_module, classes, sharding, self.args.compute_dtype)
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        self.model = self.callback_handler.model = network
        if is_new:
            fill(network, whole)
        fill_buffers(network)
        return prepared

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.args.sharding is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_sharded(Path(output_dir) / SHARDS, self.model, self._plain_optimizer())
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.args.sharding is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_sharded(Path(checkpoint) / SHARDS, self.model, self._plain_optimizer())
        state = torch.load(os.path.join(checkpoint, SCHEDULER), weights_only=True)
        self.lr_scheduler.load_state_dict(state)

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """Without what accelerate puts around it."""
        wrapped: Any = self.optimizer
        plain: torch.optim.Optimizer = getattr(wrapped, "optimizer", wrapped)
        return plain

    def _load_best_model(self) -> None:
        best = str(self.state.best_model_checkpoint)
        if self.args.sharding is None:
            self._load_from_checkpoint(best)
        else:
            load_sharded(Path(best) / SHARDS, self.model, self._plain_optimizer())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *_: Any) -> None:
        if self.args.sharding is not None:
            return  # they are loaded with the optimiser states, once the model is sharded
        if has_adapters(self.model):
            load_adapters(self.model, Path(resume_from_checkpoint))
            return
        # Trainer would load the file's names as they are; the published layout has to be read by
        # `from_pretrained`.
        stored = type(self.model).from_pretrained(
            resume_from_checkpoint, config=self.model.config, dtype=torch.float32
        )
        check_weights(stored)
        self.model.load_state_dict(stored.state_dict())
