"""Where the bundled checkpoints are: small models that show the effect of DMax on a CPU."""

from __future__ import annotations

from pathlib import Path

BUNDLED = ("tiny-base", "tiny-dmax")


def bundled(name: str) -> Path | None:
    """Folder of the bundled checkpoint `name`; None for any other name."""
    return Path(__file__).parent / name if name in BUNDLED else None


def bundled_head(model: str, kind: str) -> Path:
    """File of a strategy's head that was trained on a bundled checkpoint; it may not exist."""
    return Path(__file__).parent / "heads" / model / f"{kind}.safetensors"
