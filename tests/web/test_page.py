"""Pages put together: what their policy allows, and that no data can break out of a script."""

from __future__ import annotations

import base64
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmax.web.page import (
    media_type,
    modules_of,
    script_json,
    self_contained,
    served,
    source_hash,
    static_files,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(["</script>", "<!--"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def import_map(html: str) -> str:
    (found,) = re.findall(r'<script type="importmap">(.*?)</script>', html)
    return str(found)


def test_a_served_page_names_what_its_entry_reaches() -> None:
    page = served("a <title>", "<main></main>", "trace.js", ("theme.css",), base="/files/")
    addresses = json.loads(import_map(page.html))["imports"]
    assert addresses["dmax/run.js"] == "/files/run.js"
    assert {name.removeprefix("dmax/") for name in addresses} == set(modules_of("trace.js"))
    assert '<link rel="stylesheet" href="/files/theme.css">' in page.html
    assert "<title>a &lt;title&gt;</title>" in page.html


def test_the_policy_of_a_served_page_allows_its_own_scripts_only() -> None:
    page = served("t", "", "trace.js", ())
    rules = dict(rule.split(" ", 1) for rule in page.policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["script-src"] == f"'self' {source_hash(import_map(page.html))}"
    assert rules["frame-ancestors"] == "'none'"
    assert "unsafe" not in page.policy


def test_a_self_contained_page_asks_for_nothing() -> None:
    page = self_contained("t", "", "trace.js", ("theme.css", "trace.css"), {"values": [1]})
    addresses = json.loads(import_map(page.html))["imports"]
    start = "data:text/javascript;base64,"
    for name, address in addresses.items():
        assert address.startswith(start)
        source = base64.b64decode(address.removeprefix(start))
        assert source == static_files()[name.removeprefix("dmax/")]
    assert not re.findall(r'(?:src|href)="(?!data:)', page.html)
    assert "url(" not in page.html and "@import" not in page.html
    assert "connect-src 'none'" in page.policy and "'self'" not in page.policy


def test_a_page_carries_only_the_modules_that_it_uses() -> None:
    modules = modules_of("trace.js")
    assert modules[0] == "trace.js" and len(set(modules)) == len(modules)
    assert "playground.js" not in modules
    for name in modules:
        imported = re.findall(r'from "dmax/([\w-]+\.js)"', static_files()[name].decode())
        assert set(imported) <= set(modules)


def test_every_static_file_has_a_type() -> None:
    kinds = {media_type(name) for name in static_files()}
    assert kinds <= {"text/javascript", "text/css", "image/svg+xml"}


def test_no_module_writes_markup_or_runs_text() -> None:
    unsafe = re.compile(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(")
    wrong = [name for name, source in static_files().items() if unsafe.search(source.decode())]
    assert wrong == []


@given(JSON)
def test_no_value_ends_its_script(value: object) -> None:
    text = script_json(value)
    assert not set("<\u2028\u2029") & set(text)
    assert json.loads(text) == value


def test_values_that_json_does_not_have_are_refused() -> None:
    with pytest.raises(ValueError, match="Out of range"):
        script_json(float("nan"))
