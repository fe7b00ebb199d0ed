"""Optional packages: named when they are missing, never installed from a stranger."""

from __future__ import annotations

import re
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
    *pip, install, what = shlex.split(extras.install_hint("eval"))
    assert (install, pip[-1]) == ("install", "pip")
    assert what == (".[eval]" if is_checkout else "lm-eval>=0.4.13")
    monkeypatch.chdir(tmp_path)
    assert shlex.split(extras.install_hint("eval"))[-1] == (
        f"{ROOT}[eval]" if is_checkout else "lm-eval>=0.4.13"
    )


def test_no_hint_names_our_package_to_pip() -> None:
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")]
    assert not [text for text in texts if re.search(r"pip install [\"']?dmax", text)]
