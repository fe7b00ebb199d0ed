"""What the stubs beside this file are made of: modules in which every name exists and none works.

SGLang imports kernels, audio and images long before it knows that a text model on a CPU needs none
of them. A test that does call one fails with its name.
"""

from collections.abc import Callable
from typing import Any, NoReturn


def names_of(module: str) -> Callable[[str], Callable[..., NoReturn]]:
    """A `__getattr__` for a module in which every name is a function that refuses to run."""

    def find(name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> NoReturn:
            raise NotImplementedError(f"{module}.{name} is a stub for tests on a CPU")

        missing.__name__ = name
        return missing

    return find
