"""OpenAPI description of the HTTP endpoints. OpenAPI cannot describe WebSockets; see docs/reference/protocol.md."""

from typing import Any

from nemo_lfr._version import __version__


def _binary(*media_types: str) -> dict[str, Any]:
    return {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in media_types}


def _json(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": {"type": "object", "properties": properties}}}


def _format(*names: str) -> list[dict[str, Any]]:
    return [{"name": "format", "in": "query", "schema": {"type": "string", "enum": list(names), "default": names[0]}}]


_TOKENS = {
    "type": "array",
    "description": "List of frames. Each frame is a list with one token per codebook.",
    "items": {"type": "array", "items": {"type": "integer"}},
}
_INTEGER = {"type": "integer"}
_TOKENS_JSON = _json(tokens=_TOKENS, num_samples=_INTEGER, sample_rate=_INTEGER, samples_per_frame=_INTEGER)
_ERRORS = {
    status: {"description": text, "content": _json(error={"type": "string"}, type={"type": "string"})}
    for status, text in {
        "400": "The body or a parameter is not valid.",
        "401": "The access token is missing or wrong.",
        "408": "The client stopped sending the body.",
        "413": "The body is too large, or the recording is too long.",
        "415": "The body is a form or compressed, or its content type does not match its content.",
        "503": "The server has too many streams or files, or is shutting down.",
        "507": "The server cannot write a temporary file, for example because its disk is full.",
    }.items()
}

OPENAPI: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "nemo_lfr", "version": __version__, "description": "Speech tokens at 21.5 frames per second."},
    "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
    "paths": {
        "/v1/encode": {
            "post": {
                "summary": "Encode an audio file to a token file or to JSON.",
                "parameters": _format("lfr", "json"),
                "requestBody": {"required": True, "content": _binary("audio/*", "application/octet-stream")},
                "responses": {
                    "200": {
                        "description": "The tokens.",
                        "content": _binary("application/octet-stream") | _TOKENS_JSON,
                    }
                }
                | _ERRORS,
            }
        },
        "/v1/decode": {
            "post": {
                "summary": "Decode a token file or JSON to an audio file.",
                "parameters": _format("wav", "flac", "opus"),
                "requestBody": {
                    "required": True,
                    "content": _binary("application/octet-stream") | _TOKENS_JSON,
                },
                "responses": {
                    "200": {"description": "The audio.", "content": _binary("audio/wav", "audio/flac", "audio/ogg")}
                }
                | _ERRORS,
            }
        },
        "/v1/info": {
            "get": {
                "summary": "Describe the codec and the limits of the server.",
                "responses": {"200": {"description": "A JSON object."}},
            }
        },
        "/health": {
            "get": {
                "summary": "Return whether the server works and is not shutting down.",
                "responses": {
                    "200": {"description": "The server works."},
                    "503": {"description": "The server is shutting down, or cannot process streams."},
                },
            }
        },
        "/metrics": {
            "get": {
                "summary": "Return metrics for Prometheus.",
                "responses": {"200": {"description": "Metrics in Prometheus's text format 0.0.4."}},
            }
        },
    },
}
