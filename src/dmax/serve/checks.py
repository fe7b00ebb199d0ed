"""What a request must be before anybody looks at what it asks for; pure functions.

`guard` applies them.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import Any

from dmax.errors import InputError, show
from dmax.serve.errors import ApiError

AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:/@?#\s]+)(?::\d{1,5})?")
ORIGIN = re.compile(rf"[a-z][a-z0-9+.-]*://{AUTHORITY.pattern}")
HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # in a whole pair, too
MOST_DIGITS = sys.int_info.default_max_str_digits  # 4300
OPEN_PATHS = frozenset({"/", "/health", "/docs", "/openapi.json"})
OPEN_FOLDERS = ("/static/", "/docs/")
"""What browsers and probes read before they can have a key. Nothing there is secret."""


# --- where a request comes from -------------------------------------------------------------------


def is_loopback(host: str) -> bool:
    """Whether a name or an address, without a port, leads to this machine and no other."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def host_of(authority: str) -> str:
    """The name or address in `name:port`, in small letters; "" if there is none."""
    found = AUTHORITY.fullmatch(authority.lower())
    return found[1] if found else ""


class Origins:
    """Which hosts a request may address, and which web pages may send one.

    A browser sends requests to this machine for any page that asks it to. The page's origin gives
    it away. Where the page has led the name of its own host here (DNS rebinding), the host does.

    Args:
        address: that the server listens on.
        allowed_hosts: as in `ServerOptions`.
        cors_origins: as in `ServerOptions`.

    Raises:
        InputError: something that no header `Host` or `Origin` says, and that would never match.
    """

    def __init__(
        self, address: str, allowed_hosts: Sequence[str] = (), cors_origins: Sequence[str] = ()
    ) -> None:
        self._checks_host = bool(allowed_hosts) or is_loopback(address)
        self._allowed = frozenset(name.lower() for name in allowed_hosts)
        self._cors = frozenset(origin.lower() for origin in cors_origins)
        for name in self._allowed:
            if not name or host_of(name) != name:
                raise InputError(f"`--allowed-host` must be a name alone, got {show(name)}")
        for origin in self._cors - {"*", "null"}:
            if not ORIGIN.fullmatch(origin):
                raise InputError(
                    f"`--cors-origin` must be like https://a.example, or *, got {show(origin)}"
                )

    def check(self, hosts: Sequence[str], origins: Sequence[str]) -> None:
        """Raise `ApiError` 403 unless a request may pass.

        Args:
            hosts: its headers `Host`.
            origins: its headers `Origin`, which browsers send for pages.
        """
        host = hosts[0].lower() if len(hosts) == 1 else ""
        name = host_of(host)
        if self._checks_host and not (is_loopback(name) or name in self._allowed):
            raise ApiError(
                403,
                f"this server does not answer to the host {show(', '.join(hosts))}; "
                "its operator can permit it with --allowed-host",
                code="host_not_allowed",
            )
        for origin in origins:
            if not self._admits(origin.lower(), host):
                raise ApiError(
                    403,
                    f"web pages of {show(origin)} may not call this server; "
                    "its operator can permit them with --cors-origin",
                    code="origin_not_allowed",
                )

    def _admits(self, origin: str, host: str) -> bool:
        if "*" in self._cors or origin in self._cors:
            return True
        scheme, _, authority = origin.partition("://")
        # The page may be ours under another name, if a proxy stands in front of the server.
        is_ours = authority == host or host_of(authority) in self._allowed
        return scheme in ("http", "https") and is_ours


# --- keys -----------------------------------------------------------------------------------------


def needs_key(method: str, path: str) -> bool:
    """Whether a path is closed to those without a key."""
    is_open = path in OPEN_PATHS or path.startswith(OPEN_FOLDERS)
    return not (is_open and method in ("GET", "HEAD"))


def bearer(authorizations: Sequence[bytes]) -> bytes | None:
    """The key in the headers `Authorization` of a request; None if they do not hold just one."""
    if len(authorizations) != 1:
        return None
    scheme, _, key = authorizations[0].partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else None


# --- bodies ---------------------------------------------------------------------------------------


def check_json(body: bytes, max_depth: int) -> None:
    """Raise `ApiError` 400 unless a body is JSON that nobody will stumble over.

    What comes after this may rely on UTF-8 without halves of surrogate pairs, on finite numbers of
    at most `MOST_DIGITS` digits, and on the depth.

    Args:
        body: all of it.
        max_depth: lists and objects within each other.
    """
    try:
        value = json.loads(body.decode(), parse_float=_finite, parse_constant=_finite)
        if HALF_A_PAIR.search(body):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise _wrong("is not UTF-8 text") from None
    except UnicodeEncodeError:
        raise _wrong("holds half of a surrogate pair, which no text does") from None
    except json.JSONDecodeError as error:
        raise _wrong(f"is not JSON: {error.msg.lower()} at character {error.pos}") from None
    except ValueError:  # Python reads no longer whole number: it would take minutes
        raise _too_long() from None
    except RecursionError:
        raise _too_deep(max_depth) from None
    _check_depth(value, max_depth)


def _check_depth(value: Any, max_depth: int) -> None:
    level: list[Any] = [value]
    for _ in range(max_depth):
        level = [child for node in level for child in _children(node)]
    if any(isinstance(node, list | dict) for node in level):
        raise _too_deep(max_depth)


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def _finite(text: str) -> float:
    """A number as JSON has it; `json` also takes NaN, Infinity and what is too large for one."""
    if len(text) > MOST_DIGITS:
        raise _too_long()
    value = float(text)
    if not math.isfinite(value):
        raise _wrong(f"holds {show(text)}, which is no finite number")
    return value


def _too_long() -> ApiError:
    return _wrong(f"holds a number of more than {MOST_DIGITS} digits")


def _too_deep(max_depth: int) -> ApiError:
    return _wrong(f"is nested deeper than {max_depth} levels")


def _wrong(what: str) -> ApiError:
    return ApiError(400, f"the body {what}", code="invalid_json")
