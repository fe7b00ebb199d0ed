"""Where the bundled checkpoints live: small mixture-of-experts models that show the effect on a CPU."""

from __future__ import annotations

from pathlib import Path

BUNDLED = ("tiny-base", "tiny-dmax")


def bundled(name: str) -> Path | None:
    """Folder of the bundled checkpoint `name`; None for any other name. The folder exists in an installed wheel."""
    return Path(__file__).parent / name if name in BUNDLED else None


def bundled_head(model: str, kind: str) -> Path:
    """File of the head of a decoding strategy that was trained on a bundled checkpoint; not every one has one."""
    return Path(__file__).parent / "heads" / model / f"{kind}.safetensors"
