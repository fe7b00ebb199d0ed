"""Model architectures, known to transformers' Auto classes: no remote code is needed.

A configuration is registered when transformers' Auto classes are imported, before or after dmax.
Its model follows with the first configuration that is made: until then, nothing loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dmax.models.auto import NATIVE as NATIVE
    from dmax.models.auto import register as register
    from dmax.models.llada2_moe.configuration import LLaDA2MoeConfig as LLaDA2MoeConfig
    from dmax.models.llada2_moe.modeling import LLaDA2MoeModel as LLaDA2MoeModel
    from dmax.models.llada2_moe.modeling import LLaDA2MoeModelLM as LLaDA2MoeModelLM

_PUBLIC = {
    "NATIVE": "dmax.models.auto",
    "LLaDA2MoeConfig": "dmax.models.llada2_moe.configuration",
    "LLaDA2MoeModel": "dmax.models.llada2_moe.modeling",
    "LLaDA2MoeModelLM": "dmax.models.llada2_moe.modeling",
    "register": "dmax.models.auto",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dmax.models' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
