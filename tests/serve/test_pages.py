"""What is sent to browsers: the pages, their files, and what the headers forbid."""

from __future__ import annotations

import httpx
import pytest
from running import Running

from dmax.web.page import media_type, static_files


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_a_page_allows_nothing_but_its_own(server: Running, path: str) -> None:
    response = httpx.get(server.url + path)
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    rules = [rule.split() for rule in response.headers["Content-Security-Policy"].split(";")]
    policy = {name: sources for name, *sources in rules}
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == ["'none'"]
    assert policy["frame-ancestors"] == ["'none'"]
    own, import_map = policy["script-src"]
    assert own == "'self'" and import_map.startswith("'sha256-")
    assert policy["connect-src"] == policy["style-src"] == ["'self'"]
    assert "//" not in response.text.replace(server.url, "")  # nothing is loaded from elsewhere


@pytest.mark.parametrize("name", sorted(static_files()))
def test_a_file_is_sent_as_what_it_is(server: Running, name: str) -> None:
    response = httpx.get(f"{server.url}/static/{name}")
    assert response.content == static_files()[name]
    assert response.headers["Content-Type"].split(";")[0] == media_type(name)
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("name", ["nothing.js", "..%2Fpage.py", "%2e%2e/page.py", "", "a/b.js"])
def test_there_are_no_other_files(server: Running, name: str) -> None:
    response = httpx.get(f"{server.url}/static/{name}")
    assert response.status_code == 404
    assert response.json()["error"]["message"]
