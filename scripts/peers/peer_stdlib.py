"""Peer: ThreadingHTTPServer as it is commonly written. python peer_stdlib.py PORT DATABASE"""
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from contract import API_KEY, Jobs, port_and_database

PORT, DATABASE = port_and_database()
JOBS = Jobs(DATABASE)


class Handler(BaseHTTPRequestHandler):
    """The endpoints of the contract."""

    def answer(self, status, value):
        """Answer with a value as JSON."""
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):      # pylint: disable=invalid-name # BaseHTTPRequestHandler calls it so
        """POST /jobs/add/"""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("api_key") != API_KEY:
            self.answer(401, {"error": "api_key"})
        elif self.path == "/jobs/add/":
            self.answer(*JOBS.add(body))
        else:
            self.answer(404, {"error": "no such endpoint"})

    def do_GET(self):       # pylint: disable=invalid-name # BaseHTTPRequestHandler calls it so
        """GET /jobs/list/ and GET /jobs/{id}/"""
        if self.headers.get("api_key") != API_KEY:
            self.answer(401, {"error": "api_key"})
        elif self.path == "/jobs/list/":
            self.answer(*JOBS.list())
        elif self.path.startswith("/jobs/") and self.path[6:].strip("/").isdigit():
            self.answer(*JOBS.get(int(self.path[6:].strip("/"))))
        else:
            self.answer(404, {"error": "no such endpoint"})

    def log_message(self, *_):  # pylint: disable=arguments-differ # whatever it is, it is not logged
        """Log nothing."""


ThreadingHTTPServer(("127.0.0.1", PORT), Handler).serve_forever()
