"""Routes for the web page at `/`, which encodes and decodes audio in a browser."""

from typing import Any

from starlette.responses import FileResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from nemo_lfr.web import EXAMPLE, EXAMPLE_PATH, FOLDER, INDEX, PAGE

# A <meta> element in the page also sets a policy: the page may load only its own files. `frame-ancestors` must be in a
# header, because browsers ignore it in a <meta> element.
HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # browsers revalidate files, so that files of two versions are not mixed
}


def page_routes() -> list[BaseRoute]:
    """Return the routes for the page and its files."""

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
    """Return whether a URL path is that of the web page at `/` or of one of its files.

    Requests for these files need no access token, because the files contain no secrets.
    """
    return path == "/" or path.startswith(f"/{FOLDER}/")


class _PageFiles(StaticFiles):
    """Static files of the page, sent with the headers in `HEADERS`."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        """Return a file with the headers in `HEADERS`. Raise HTTPException if there is no such file."""
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
