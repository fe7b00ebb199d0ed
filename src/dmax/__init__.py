"""DMax: train, decode, measure and serve self-revising diffusion language models.

Everything loads on first use. transformers' Auto classes know the models of the package, whichever
of the two is imported first.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from dmax import trace as trace
    from dmax.decoding import strategies as strategies
    from dmax.errors import InputError as InputError
    from dmax.llm import LLM as LLM
    from dmax.outputs import GenerationOutput as GenerationOutput
    from dmax.outputs import StreamEvent as StreamEvent
    from dmax.params import DecodingParams as DecodingParams
    from dmax.training.config import DMaxConfig as DMaxConfig
    from dmax.training.trainer import DMaxTrainer as DMaxTrainer

__version__ = "0.1.0"

_PUBLIC = {
    "DMaxConfig": "dmax.training.config",
    "DMaxTrainer": "dmax.training.trainer",
    "DecodingParams": "dmax.params",
    "GenerationOutput": "dmax.outputs",
    "InputError": "dmax.errors",
    "LLM": "dmax.llm",
    "StreamEvent": "dmax.outputs",
    "strategies": "dmax.decoding",
    "trace": "dmax",
}
__all__ = ["__version__", *_PUBLIC]

register_post_import_hook(
    "dmax.models.llada2_moe.configuration:register_configuration",
    "transformers.models.auto.configuration_auto",
)
register_post_import_hook(  # what Qwen3's own configuration needs is there only then
    "dmax.models.sdar.configuration:register_configurations",
    "transformers.models.auto.modeling_auto",
)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dmax' has no attribute {name!r}")
    if _PUBLIC[name] == __name__:
        return import_module(f"{__name__}.{name}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
