"""A web server for a few clients: the exporter's page, the demo's runbooks, the receivers of the tests."""

from __future__ import annotations

import sys
from http.server import ThreadingHTTPServer
from typing import Any


class WebServer(ThreadingHTTPServer):
    """A server with a thread for each connection, which is silent about clients that leave."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print the traceback of a request, unless its client has closed the connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
