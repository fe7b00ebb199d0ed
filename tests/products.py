"""The matrix products that are run meanwhile, in whichever dtype they are."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAMES = ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "grouped_mm_fallback")


class Product(NamedTuple):
    """Dtypes and sizes of the factors of one product."""

    dtypes: set[torch.dtype]
    sizes: set[int]


class Products(TorchDispatchMode):
    """Records every product of a `with` block, those of backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Product] = []

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {dtype for product in self.found for dtype in product.dtypes}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.overloadpacket.__name__ in NAMES:
            factors = [each for each in args if isinstance(each, Tensor)]
            floats = [each for each in factors if each.is_floating_point()]
            dtypes = {each.dtype for each in floats}
            self.found.append(Product(dtypes, {size for each in floats for size in each.shape}))
        return function(*args, **(kwargs or {}))
