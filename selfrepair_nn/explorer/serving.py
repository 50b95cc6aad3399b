"""A page on this machine's own loopback: nobody else's machine, and no other site's page, can read it."""

import sys
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from selfrepair_nn.errors import UsageError

LOOPBACK, LAST = "127.0.0.1", 65535
HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}


class Server:
    """A server of one file, which takes its port at once and answers when it runs.

    Raises:
        UsageError: the port is no port, or is taken, or not for this user.
    """

    def __init__(self, port: int = 0) -> None:
        if not 0 <= port <= LAST:
            raise UsageError(f"port {port} is none: give one from 1 to {LAST}, or 0 for one that is free")
        try:
            self._server = _Listening((LOOPBACK, port), _Handler)
        except OSError as error:
            raise UsageError(
                f"port {port} cannot be had ({error.strerror}): give another, or 0 for one that is free"
            ) from error
        self._server.daemon_threads = True

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self._server.server_port}/"

    def run(self, page: Path, ready: Callable[[str], None]) -> None:
        """Serve `page`, which is read each time, until interrupted; `ready` is told the address."""
        vars(self._server)["page"] = page
        with self._server:
            ready(self.address)
            with suppress(KeyboardInterrupt):
                self._server.serve_forever()

    def close(self) -> None:
        """Give the port back."""
        self._server.server_close()


class _Listening(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves before it has the whole page is no news; whatever else fails is."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        status, page = self._found()
        self.send_response(status)
        for name, value in (HEADERS | {"Content-Length": str(len(page))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(page)

    do_HEAD = do_GET

    def _found(self) -> tuple[HTTPStatus, bytes]:
        """The page, for whoever asks this very address: another name of it is another site's trick."""
        port = vars(self.server)["server_port"]
        if self.headers.get("Host") not in (f"{LOOPBACK}:{port}", f"localhost:{port}"):
            return HTTPStatus.MISDIRECTED_REQUEST, b"not served under this name"
        if self.path.partition("?")[0] != "/":
            return HTTPStatus.NOT_FOUND, b"there is one page, /"
        try:
            return HTTPStatus.OK, vars(self.server)["page"].read_bytes()
        except OSError:
            return HTTPStatus.NOT_FOUND, b"the page's file is gone: write it again, and reload"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: who looks is nobody's business."""
