"""The half of a backend that would compile."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget


class InterpretedBackend(BaseBackend):
    """Refuses to compile, since kernels run in the interpreter."""

    @staticmethod
    def supports_target(target: GPUTarget) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "interpreted"

    def parse_options(self, options: dict[str, Any]) -> object:
        raise NotImplementedError("interpreted only: set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict[str, Any], options: object, language: object) -> None:
        raise NotImplementedError("interpreted only: set TRITON_INTERPRET=1")

    def load_dialects(self, context: object) -> None:
        return

    def get_module_map(self) -> dict[str, ModuleType]:
        return {}
