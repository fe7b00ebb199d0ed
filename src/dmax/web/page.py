"""Pages of HTML from ES modules and style sheets: served from a folder, or whole in one file.

Modules import each other by names that only an import map knows (`import … from "dmax/run.js"`). A
served page maps them to its own server, a self-contained one to `data:` URLs, so the same files
make both. Either page allows no script but these, by its Content-Security-Policy.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

PREFIX = "dmax/"
MEDIA_TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
_IMPORT = re.compile(r'^(?:import|export|\})[^;"]*\bfrom "dmax/([\w-]+\.js)";$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Page:
    """A document.

    Attributes:
        html: the whole of it.
        policy: its Content-Security-Policy, a header for a page that is served. A self-contained
            page says it itself.
    """

    html: str
    policy: str


@cache
def static_files() -> Mapping[str, bytes]:
    """Every module and style sheet by its name."""
    folder = files("dmax.web").joinpath("static")
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}


def media_type(name: str) -> str:
    """What a static file is, by the end of its name."""
    return MEDIA_TYPES[name.rpartition(".")[2]]


def served(
    title: str, body: str, entry: str, styles: Sequence[str], base: str = "/static/"
) -> Page:
    """A page whose modules and style sheets its server gives.

    Args:
        title: of the document; a plain text.
        body: its content, HTML.
        entry: the module that runs it.
        styles: its style sheets.
        base: path under which `static_files` are served.
    """
    imports = _import_map(entry, lambda name: base + name)
    policy = _policy(
        script=f"'self' {source_hash(imports)}",
        style="'self'",
        connect="'self'",
        img="'self' data:",
        extra="frame-ancestors 'none'",
    )
    links = [f'<link rel="stylesheet" href="{base}{name}">' for name in styles]
    head = [*links, f'<script type="importmap">{imports}</script>']
    script = f'<script type="module" src="{base}{entry}"></script>'
    return Page(_document(title, head, body, script), policy)


def self_contained(
    title: str, body: str, entry: str, styles: Sequence[str], data: Mapping[str, Any]
) -> Page:
    """A page in one file that needs nothing else, also without a network.

    Args:
        title: of the document; a plain text.
        body: its content, HTML.
        entry: the module that runs it.
        styles: its style sheets.
        data: JSON values, each for the module to find in the element of that id.
    """
    imports = _import_map(entry, _data_url)
    start = f'import "{PREFIX}{entry}";'
    style = "\n".join(_text(name) for name in styles)
    policy = _policy(
        script=f"{source_hash(imports)} {source_hash(start)} data:",
        style=source_hash(style),
        connect="'none'",
        img="data:",
    )
    head = [
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
        f"<style>{style}</style>",
        f'<script type="importmap">{imports}</script>',
    ]
    values = [
        f'<script type="application/json" id="{escape(name)}">{script_json(value)}</script>'
        for name, value in data.items()
    ]
    script = "\n".join([*values, f'<script type="module">{start}</script>'])
    return Page(_document(title, head, body, script), policy)


def script_json(value: Any) -> str:
    """A value as JSON that may stand inside `<script>`.

    Nothing in it can end the element or begin a comment, and no line separator stands in it.
    """
    return json.dumps(value, allow_nan=False).replace("<", "\\u003c").replace("&", "\\u0026")


def source_hash(text: str) -> str:
    """A script or style that a policy allows, as `'sha256-…'`."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def modules_of(entry: str) -> list[str]:
    """The modules that one imports, directly or not, itself first."""
    found = [entry]
    for name in found:
        found += [each for each in _IMPORT.findall(_text(name)) if each not in found]
    return found


def _import_map(entry: str, address: Callable[[str], str]) -> str:
    return script_json(
        {"imports": {f"{PREFIX}{name}": address(name) for name in modules_of(entry)}}
    )


def _policy(*, script: str, style: str, connect: str, img: str, extra: str = "") -> str:
    parts = [
        "default-src 'none'",
        f"script-src {script}",
        f"style-src {style}",
        f"connect-src {connect}",
        f"img-src {img}",
        "base-uri 'none'",
        "form-action 'none'",
        extra,
    ]
    return "; ".join(filter(None, parts))


def _document(title: str, head: Sequence[str], body: str, script: str) -> str:
    lines = [
        "<!doctype html>",
        '<html lang="en">',
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="generator" content="dmax">',
        f"<title>{escape(title)}</title>",
        '<link rel="icon" href="data:,">',
        *head,
        "<body>",
        body,
        "<noscript><p>This page needs JavaScript.</p></noscript>",
        script,
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def _data_url(name: str) -> str:
    content = base64.b64encode(static_files()[name]).decode()
    return f"data:{media_type(name)};base64,{content}"


def _text(name: str) -> str:
    return static_files()[name].decode()
