"""Where the bundled checkpoints live: small mixture-of-experts models that show the effect on a CPU."""

from __future__ import annotations

from pathlib import Path

BUNDLED = ("tiny-base", "tiny-dmax")


def bundled(name: str) -> Path | None:
    """Folder of the bundled checkpoint `name`; None for any other name. The folder exists in an installed wheel."""
    return Path(__file__).parent / name if name in BUNDLED else None
