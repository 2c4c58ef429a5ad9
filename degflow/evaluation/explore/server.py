"""The page's server: Python's own HTTP server on the loopback address.

It answers only requests that the page itself or the address bar makes: another site that is open in the same browser
can neither send it a photograph nor read its answers. The page's content policy keeps the browser from asking any other
host.
"""

import json
import socket
import sys
import traceback
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any, cast
from urllib.parse import parse_qs, quote, urlsplit

from degflow import images
from degflow.evaluation.explore.comparison import Ask, Explorer

ADDRESS = "127.0.0.1"
_PAGE = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Server(ThreadingHTTPServer):
    """Listens from the moment it is made.

    Args:
        explorer: answers.
        port: of 127.0.0.1; 0 picks a free one.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, explorer: Explorer, port: int):
        self.explorer = explorer
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OSError as error:
            raise OSError(f"port={port}: cannot be used ({error.strerror}); port=0 picks a free one") from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{ADDRESS}:{self.server_port}/"

    def handle_error(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
        """Say what failed, unless the browser has just gone away."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class _Refused(Exception):
    def __init__(self, status: HTTPStatus, message: str):
        super().__init__(message)
        self.status = status


class _Handler(BaseHTTPRequestHandler):
    protocol_version, server_version, sys_version, timeout = "HTTP/1.1", "degflow", "", 60

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of each request."""

    def _answer(self, make: Any) -> None:
        try:
            self._check_origin()
            make(urlsplit(self.path))
        except _Refused as refusal:
            self._send_json({"error": str(refusal)}, refusal.status)
        except ValueError as error:
            self._send_json({"error": str(error)}, HTTPStatus.BAD_REQUEST)
        except ConnectionError:
            raise
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}; the terminal of degflow explore says more"
            self._send_json({"error": said}, HTTPStatus.INTERNAL_SERVER_ERROR)

    def _check_origin(self) -> None:
        """Refuse other names for this machine (DNS rebinding), and requests that other sites make."""
        host = self.headers.get("Host", "")
        ours = urlsplit(f"//{host}").hostname in (ADDRESS, "localhost")
        same = self.headers.get("Origin", f"http://{host}") == f"http://{host}"
        asked_by = self.headers.get("Sec-Fetch-Site", "none")
        if not ours or not same or asked_by not in ("none", "same-origin"):
            self.close_connection = True
            raise _Refused(HTTPStatus.FORBIDDEN, "only the page on this machine may ask")

    def _get(self, url: Any) -> None:
        explorer = self._explorer
        if url.path in _PAGE:
            name, kind = _PAGE[url.path]
            self._send(files("degflow.evaluation.explore").joinpath(name).read_bytes(), kind)
        elif url.path == "/about":
            self._send_json(explorer.about())
        elif url.path == "/pictures":
            self._send_json(explorer.compare(_ask(url.query)))
        elif url.path == "/pair":
            name, data = explorer.pair(_ask(url.query))
            attachment = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(name)}"}
            self._send(data, "application/zip", attachment)
        else:
            raise _Refused(HTTPStatus.NOT_FOUND, f"{url.path}: no such page")

    def _post(self, url: Any) -> None:
        self.close_connection = True  # what a refused request still sends is not read as another one
        if url.path != "/photographs":
            raise _Refused(HTTPStatus.NOT_FOUND, f"{url.path}: no such page")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "Content-Length: must be given")
        images.check_bytes(int(length), self._explorer.max_pixels)
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise ConnectionError("the browser went away")
        name = parse_qs(url.query).get("name", [""])[0]
        self._send_json(self._explorer.open(data, name))

    @property
    def _explorer(self) -> Explorer:
        return cast(Server, self.server).explorer

    def _send_json(self, value: dict[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value, allow_nan=False).encode(), "application/json", status=status)

    def _send(
        self, data: bytes, kind: str, more: dict[str, str] | None = None, status: HTTPStatus = HTTPStatus.OK
    ) -> None:
        self.send_response(status)
        about = {"Content-Type": kind, "Content-Length": str(len(data)), **_HEADERS, **(more or {})}
        if self.close_connection:
            about["Connection"] = "close"
        for name, value in about.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _ask(query: str) -> Ask:
    """The question in a query.

    Raises:
        ValueError: a value is missing or not of its kind.
    """
    values, found = parse_qs(query), []
    for name, kind in Ask.__annotations__.items():
        text = values.get(name, [""])[0]
        try:
            found.append(kind(text))
        except ValueError:
            whole = "a whole number" if kind is int else "a number"
            raise ValueError(f"{name}={text}: must be {whole}") from None
    return Ask(*found)
