"""The page of one or more traces, side by side on one timeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dmax.web.page import self_contained

DATA = "dmax-traces"
"""Id of the element that holds the traces, by which a page of ours is known."""


def page(records: Sequence[Mapping[str, Any]]) -> str:
    """A self-contained page that plays traces."""
    return self_contained(
        title="dmax trace",
        body='<main id="app"></main>',
        entry="trace.js",
        styles=("theme.css", "trace.css"),
        data={DATA: list(records)},
    ).html
