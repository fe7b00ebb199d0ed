"""DMax's strategies inside vLLM."""

from __future__ import annotations


def register() -> None:
    """Entry point of vLLM's plugins; called in every process of it, maybe more than once."""
