"""Serves one page on this machine alone, under a name that nobody can guess."""

from __future__ import annotations

import secrets
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

HOST = "127.0.0.1"


class PageServer(ThreadingHTTPServer):
    """Serves one text at `url`, and nothing else.

    A page of another site can send requests here, but knows neither the name nor may it read the answer; requests by
    another host name are refused, so that no name of another site can be made to point here.
    """

    daemon_threads = True

    def __init__(self, text: str, port: int = 0) -> None:
        super().__init__((HOST, port), _Handler)
        self.body = text.encode()
        self.path = f"/{secrets.token_urlsafe(24)}/"
        self.allowed_host = f"{HOST}:{self.server_port}"
        self.url = f"http://{self.allowed_host}{self.path}"


class _Handler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        known = secrets.compare_digest(self.path.encode(), self.server.path.encode())
        if not known or self.headers.get("Host") != self.server.allowed_host:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(self.server.body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
