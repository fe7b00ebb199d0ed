"""DMax: train, decode, measure and serve self-revising diffusion language models.

Importing the package registers its model classes with transformers; everything else loads on first
use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dmax.models import register as _register

if TYPE_CHECKING:
    from dmax.decoding import strategies as strategies
    from dmax.errors import InputError as InputError
    from dmax.llm import LLM as LLM
    from dmax.outputs import GenerationOutput as GenerationOutput
    from dmax.outputs import StreamEvent as StreamEvent
    from dmax.params import DecodingParams as DecodingParams

__version__ = "0.1.0"

_PUBLIC = {
    "DecodingParams": "dmax.params",
    "GenerationOutput": "dmax.outputs",
    "InputError": "dmax.errors",
    "LLM": "dmax.llm",
    "StreamEvent": "dmax.outputs",
    "strategies": "dmax.decoding",
}
__all__ = ["__version__", *_PUBLIC]

_register()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'dmax' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
