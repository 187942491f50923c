"""The console: one page for people, plain files, no build step, nothing fetched from elsewhere.

The files hold no data; the page asks for an administrator's key and uses the same REST API as everybody.
"""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

_FILES = {
    "": ("console.html", "text/html; charset=utf-8"),
    "console.css": ("console.css", "text/css; charset=utf-8"),
    **{
        f"{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("console", "parts", "fleet", "endpoints", "details", "money")
    },
}
_HEADERS = {
    # Names of endpoints and reasons come from people: even if one slipped through as markup, it could run nothing.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def routes() -> list[Route]:
    directory = Path(__file__).parent / "static"
    contents = {name: ((directory / file).read_bytes(), kind) for name, (file, kind) in _FILES.items()}

    async def page(request: Request) -> Response:
        """The console's page and its files."""
        body, kind = contents[request.url.path.removeprefix("/console/")]
        return Response(body, media_type=kind, headers=_HEADERS)

    async def slash(_request: Request) -> Response:
        return RedirectResponse("/console/", 308)

    async def home(_request: Request) -> Response:
        """A browser pointed at the platform's address finds the page for people."""
        return RedirectResponse("/console/", 307)

    return [
        Route("/", home, methods=["GET"]),
        Route("/console", slash, methods=["GET"]),
        *(Route(f"/console/{name}", page, methods=["GET"]) for name in contents),
    ]
