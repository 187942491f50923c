"""The OpenAPI 3.1 document of the admin API, from the table of operations and the msgspec shapes. Pure."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from starlette.routing import Route

from tidegate import __version__
from tidegate.control.operations import Operation
from tidegate.wire.admin import ErrorBody

REF = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"{(\w+)(?::\w+)?}")
_WORD = re.compile(r"\w+")
_OPEN_ROUTES = ("/healthz", "/readyz", "/metrics", "/api/openapi.json")


def document(operations: Sequence[Operation], others: Iterable[Route]) -> dict[str, Any]:
    """`others` are routes that are not in the table; they are listed with the first line of their docstring."""
    answers = [operation.answer for operation in operations]
    requests = [operation.request for operation in operations if operation.request is not None]
    kinds = list(dict.fromkeys([*answers, *requests, ErrorBody]))
    schemas, components = msgspec.json.schema_components(kinds, ref_template=REF)
    schema = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, schema)
    for route in others:
        path = _PARAMETER.sub(r"{\1}", route.path)
        for method in sorted((route.methods or set()) - {"HEAD", "OPTIONS"}):
            paths.setdefault(path, {})[method.lower()] = _other(route, method, path)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tidegate admin API",
            "version": __version__,
            "description": "Memory in bytes, instants in epoch milliseconds, money in integer nano-USD.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer", "description": "An API key: tg-…"}},
        },
        "security": [{"key": []}],
    }


def _operation(operation: Operation, schema: dict[Any, Any]) -> dict[str, Any]:
    who = "An administrator's key." if operation.admin else "Any key; a tenant's key sees its own."
    described: dict[str, Any] = {
        "operationId": operation.handler.__name__,
        "summary": operation.summary,
        "description": who,
        "parameters": [
            *_path_parameters(operation.path),
            *(
                {"name": q.name, "in": "query", "required": False, "description": q.what, "schema": {"type": q.kind}}
                for q in operation.query
            ),
        ],
        "responses": {
            str(operation.status): _content("Done.", schema[operation.answer]),
            "default": _content("Refused: `error.code` says why, `error.param` names the field.", schema[ErrorBody]),
        },
    }
    if operation.request is not None:
        described["requestBody"] = {"required": True, **_content("", schema[operation.request], described=False)}
    return described


def _other(route: Route, method: str, path: str) -> dict[str, Any]:
    summary = (route.endpoint.__doc__ or f"{method} {path}").strip().splitlines()[0].rstrip(".")
    described: dict[str, Any] = {
        "operationId": "_".join([method.lower(), *_WORD.findall(path)]),
        "summary": summary,
        "parameters": _path_parameters(path),
        "responses": {
            "200": {"description": "Done."},
            "default": _content("Refused.", {"$ref": REF.format(name="ErrorBody")}),
        },
    }
    if path in _OPEN_ROUTES or not path.startswith("/api/"):
        described["security"] = []
    return described


def _path_parameters(path: str) -> list[dict[str, Any]]:
    names = _PARAMETER.findall(path)
    return [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]


def _content(description: str, schema: Any, *, described: bool = True) -> dict[str, Any]:
    content = {"content": {"application/json": {"schema": schema}}}
    return {"description": description, **content} if described else content
