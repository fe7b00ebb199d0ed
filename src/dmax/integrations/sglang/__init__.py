"""DMax's strategies inside SGLang."""

from __future__ import annotations


def register() -> None:
    """Entry point of SGLang's plugins; called in every process of it, maybe more than once."""
