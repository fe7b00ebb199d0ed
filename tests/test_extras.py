"""Optional packages: named when they are missing, never installed from a stranger."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from dmax import extras
from dmax.errors import InputError

ROOT = Path(__file__).parents[1]


def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    extras.require("json", "eval", "reading JSON")
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    with pytest.raises(InputError) as caught:
        extras.require("lm_eval", "eval", "dmax lm_eval", "use dmax eval")
    assert caught.value.message == "dmax lm_eval needs the package `lm-eval`"
    assert caught.value.hint == f"{extras.install_hint('eval')}, or use dmax eval"


@pytest.mark.parametrize("is_checkout", [True, False])
def test_nothing_is_installed_by_a_name_that_an_index_may_give_to_others(
    is_checkout: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements = ["torch", "peft; extra == 'train'", 'lm-eval>=0.4.13; extra == "eval"']
    monkeypatch.setattr(extras, "requires", lambda name: requirements)
    monkeypatch.setattr(extras, "CHECKOUT", ROOT if is_checkout else tmp_path)
    monkeypatch.chdir(ROOT)
    words = shlex.split(extras.install_hint("eval"))
    what = words.pop()
    assert words[-2:] == (["install", "-e"] if is_checkout else ["pip", "install"])
    assert what == (".[eval]" if is_checkout else "lm-eval>=0.4.13")
    monkeypatch.chdir(tmp_path)
    assert shlex.split(extras.install_hint("eval"))[-1] == (
        f"{ROOT}[eval]" if is_checkout else "lm-eval>=0.4.13"
    )


def test_without_checkout_and_installation_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "CHECKOUT", tmp_path)
    monkeypatch.setattr(extras, "DISTRIBUTION", "dmax-that-nobody-installs")
    assert "the extra `eval` in pyproject.toml" in extras.install_hint("eval")
