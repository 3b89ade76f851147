"""Routes of the page at `/`, which uses the server from a browser."""

from typing import Any

from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from nemo_lfr.web import EXAMPLE, EXAMPLE_PATH, FOLDER, INDEX, PAGE

# The page's own policy, a <meta> element, lets it load only its own files. Browsers read this directive only here.
HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # revalidate, so that modules of two versions never meet
}


def page_routes() -> list[BaseRoute]:
    """Return the routes of the page."""

    async def index(_: Any) -> Response:
        return FileResponse(PAGE / INDEX, headers=HEADERS)

    async def example(_: Any) -> Response:
        return FileResponse(EXAMPLE_PATH, headers=HEADERS)

    return [
        Route("/", index),
        Route(f"/{FOLDER}/{EXAMPLE}", example),
        Mount(f"/{FOLDER}", _PageFiles(directory=PAGE)),
    ]


def is_page(path: str) -> bool:
    """Return whether a path is part of the page, which is public: it holds no secret and asks for the token itself."""
    return path == "/" or path.startswith(f"/{FOLDER}/")


class _PageFiles(StaticFiles):
    """Files of the page with `HEADERS`."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return a file, or status 404."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
