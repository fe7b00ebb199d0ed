"""Scripts of bench/ that end with a plot ask for matplotlib before they measure anything."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

import pytest


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("beyond", ["--toy"]),
        ("methods", []),
        ("noise", ["--toy"]),
        ("paper", []),
        ("pretrained", ["measure"]),
        ("tiny", ["--plot", "curves.svg"]),
    ],
)
def test_a_missing_matplotlib_is_told_at_once(
    script: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    refusal: Callable[..., str],
) -> None:
    monkeypatch.setattr("dmax.extras.has", lambda name: name != "matplotlib")
    said = refusal(script, *arguments)
    assert "error: drawing a plot needs the package `matplotlib`" in said


def test_the_study_of_noise_loads_where_matplotlib_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    for name in ("noise_tables", "noise_page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        import_module(name)
