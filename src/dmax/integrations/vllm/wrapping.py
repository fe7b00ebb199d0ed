"""Methods of vLLM that its hooks do not reach, and whose models they are changed for."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from wrapt import register_post_import_hook

from dmax.models.llada2_moe.configuration import LLaDA2MoeConfig

Method = Callable[..., Any]


def is_served(model_config: Any) -> bool:
    """Whether a model is decoded by dmax; vLLM's own rules stay with all others."""
    return isinstance(model_config.hf_config, LLaDA2MoeConfig)


def wrap(place: str, name: str, around: Callable[[Method], Method]) -> None:
    """Replace a method by one around it, as soon as its module is imported.

    Plugins are loaded in every process of vLLM, and most of them import none of these modules.

    Args:
        place: of the class, as in entry points: `module:Class`.
        name: of the method.
        around: from the method to the one that takes its place.
    """
    module_name, _, class_name = place.partition(":")

    def replace(module: Any) -> None:
        owner = getattr(module, class_name)
        original = getattr(owner, name)
        if not getattr(original, "is_of_dmax", False):  # plugins may be loaded again
            method = wraps(original)(around(original))
            method.is_of_dmax = True  # type: ignore[attr-defined]
            setattr(owner, name, method)

    register_post_import_hook(replace, module_name)
