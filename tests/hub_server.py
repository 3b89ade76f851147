"""Local HTTP server with the part of the Hugging Face Hub's protocol that downloads need.

    with HubServer({"nvidia/name": {"name.nemo": path}}) as hub:
        subprocess.run(..., env=hub.environment(home))

huggingface_hub reads `HF_ENDPOINT` when it is imported, so a client must run in its own process.
"""

import hashlib
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Server of repositories, {id: {file name: path}}.

    Attributes:
        repositories: files by repository id and file name.
        requests: requests so far, such as "GET /nvidia/...".
    """

    def __init__(self, repositories: dict[str, dict[str, Path]]) -> None:
        self.repositories = repositories
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.01], daemon=True)

    @property
    def endpoint(self) -> str:
        """URL of the server."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Return the environment of a client with its own cache, without proxies and tokens."""
        drop = ("HF_", "HUGGING", "http_proxy", "https_proxy", "all_proxy")
        kept = {
            key: value for key, value in os.environ.items() if not key.lower().startswith(tuple(map(str.lower, drop)))
        }
        return (
            kept
            | {
                "HF_ENDPOINT": self.endpoint,
                "HF_HOME": str(home),
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_XET": "1",
                "NO_PROXY": "127.0.0.1",
                "no_proxy": "127.0.0.1",
            }
            | more
        )

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).strip("/")
            hub.requests.append(f"{self.command} /{path}")
            owner, name, *rest = [*path.removeprefix("api/models/").split("/"), "", ""]
            rest = [part for part in rest if part]
            files = hub.repositories.get(f"{owner}/{name}")
            if files is None:
                return self._send(404, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"})
            if path.startswith("api/models/"):
                return self._send(200, self._listing(f"{owner}/{name}", files, rest), {}, body)
            if rest[:1] != ["resolve"] or "/".join(rest[2:]) not in files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "no such file"})
            data = files["/".join(rest[2:])].read_bytes()
            etag = hashlib.sha256(data).hexdigest()
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
            headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self._send(206 if start else 200, data[start:], headers, body)

        def _listing(self, repository: str, files: dict[str, Path], rest: list[str]) -> bytes:
            if rest[:1] == ["tree"]:
                return json.dumps(
                    [
                        {"type": "file", "path": name, "size": path.stat().st_size, "oid": COMMIT}
                        for name, path in files.items()
                    ]
                ).encode()
            siblings = [{"rfilename": name} for name in files]
            info = {"id": repository, "modelId": repository, "sha": COMMIT, "private": False, "gated": False}
            return json.dumps(info | {"disabled": False, "tags": [], "downloads": 0, "siblings": siblings}).encode()

        def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool = True) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body and self.command != "HEAD":
                self.wfile.write(data)

    return Handler
