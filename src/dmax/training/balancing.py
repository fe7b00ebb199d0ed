"""Loss-free balancing of experts, as a callback of the trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from dmax.training.ranks import sum_over_ranks


class RouterBalancing(TrainerCallback):
    """Loss-free balancing: after each step, favour the experts that had too few tokens.

    It moves `expert_bias`, which enters the choice of experts only, so balance costs the loss
    nothing (DeepSeek-V3, section 2.1.2).
    """

    def __init__(self, model: nn.Module, speed: float) -> None:
        self.speed = speed
        self.loads: dict[Any, Tensor] = {}  # tokens of each expert since the last step, by router
        for module in model.modules():
            if isinstance(getattr(module, "expert_bias", None), Tensor):
                module.register_forward_hook(self._count_tokens)

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Move every bias by one step and start counting anew, alike on all ranks."""
        for router, load in self.loads.items():
            sum_over_ranks(load)
            router.expert_bias += self.speed * torch.sign(load.mean() - load)
            load.zero_()

    def _count_tokens(self, router: nn.Module, _inputs: Any, output: Any) -> None:
        if not router.training:  # what is only looked at must not move a bias
            return
        chosen = output[0].flatten()
        bias: Any = router.expert_bias
        load = self.loads.setdefault(router, torch.zeros_like(bias))
        load.index_add_(0, chosen, torch.ones_like(chosen, dtype=load.dtype))
