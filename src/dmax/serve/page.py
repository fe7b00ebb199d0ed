"""The playground: one page at `/`, and the files that it loads from `/static/`."""

from __future__ import annotations

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
    """Routes of the playground. They need no key: the page asks its visitor for it."""
    body = files("dmax.web").joinpath("playground.html").read_text(encoding="utf-8")
    built = page.served(
        title="dmax playground",
        body=body,
        entry="playground.js",
        styles=("theme.css", "playground.css"),
        base=FILES,
    )
    static = page.static_files()
    html_headers = HEADERS | {"Content-Security-Policy": built.policy}

    async def show_page(request: Request) -> Response:
        return Response(built.html, media_type="text/html", headers=html_headers)

    async def send_file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in static:
            raise HTTPException(404, f"there is no file `{FILES}{name}`")
        return Response(static[name], media_type=page.media_type(name), headers=HEADERS)

    routes = APIRouter()
    routes.add_route("/", show_page, include_in_schema=False)
    routes.add_route(FILES + "{name}", send_file, include_in_schema=False)
    return routes
