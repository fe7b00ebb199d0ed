"""The pages: the playground at `/`, the interface at `/docs`, their files below `/static/`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import APIRouter, HTTPException, Request, Response

from dmax.web import page

FILES = "/static/"
HEADERS = {
    "Cache-Control": "no-cache",  # another version may be served here tomorrow
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def router() -> APIRouter:
    """Routes of the pages. They need no key: the playground asks its visitor for it."""
    static = page.static_files()

    async def send_file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in static:
            raise HTTPException(404, f"there is no file `{FILES}{name}`")
        return Response(static[name], media_type=page.media_type(name), headers=HEADERS)

    routes = APIRouter()
    routes.add_route("/", _shown("playground", "dmax playground"), include_in_schema=False)
    routes.add_route("/docs", _shown("reference", "dmax serve"), include_in_schema=False)
    routes.add_route(FILES + "{name}", send_file, include_in_schema=False)
    return routes


def document(name: str, title: str) -> page.Page:
    """A page whose body, module and style sheet have this name."""
    return page.served(
        title=title,
        body=files("dmax.web").joinpath(f"{name}.html").read_text(encoding="utf-8"),
        entry=f"{name}.js",
        styles=("theme.css", f"{name}.css"),
        base=FILES,
    )


def _shown(name: str, title: str) -> Callable[[Request], Awaitable[Response]]:
    """What shows a page."""
    built = document(name, title)
    headers = HEADERS | {"Content-Security-Policy": built.policy}

    async def show(request: Request) -> Response:
        return Response(built.html, media_type="text/html", headers=headers)

    return show
