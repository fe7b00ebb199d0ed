"""The tensors that operations make meanwhile."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {"slice", "expand", "transpose", "view", "select", "split", "_unsafe_view", "unsqueeze"}


class Made(TorchDispatchMode):
    """What operations make: their names with the shapes of their results."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = dict[str, set[tuple[int, ...]]]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            name = function.overloadpacket.__name__
            self.shapes.setdefault(name, set()).add(tuple(result.shape))
        return result

    @property
    def largest(self) -> int:
        """Numbers of the largest tensor that is no view of another."""
        owned = [shapes for name, shapes in self.shapes.items() if name not in VIEWS]
        return max(math.prod(shape) for shapes in owned for shape in shapes)
