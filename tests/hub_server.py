"""A loopback server that speaks as much of the hub's API as a download needs, and misbehaves on request."""

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs

COMMIT = "c" * 40


class HubServer(ThreadingHTTPServer):
    """Serves `files` of one dataset repository.

    `faults[name]` is a list of what shall go wrong with the next requests for a file, one after the other:
        ("drop", n)      send n bytes of what was announced, then close the connection
        ("short", n)     announce n bytes less than there are, and send no more
        ("corrupt",)     flip a bit
        ("status", code) answer with this status
        ("whole",)       ignore the range that was asked for
    A fault stays if it is the last one and `sticky` has the name. `redirect` makes files come from another path.
    """

    daemon_threads = True

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repo, self.files = repo, files
        self.faults: dict[str, list[tuple[Any, ...]]] = {}
        self.sticky: set[str] = set()
        self.announced: dict[str, str] = {}  # sha256 that the API shall claim instead of the true one
        self.redirect = False
        self.token: str | None = None
        self.requests: list[tuple[str, str, str | None]] = []  # (method, path, range)
        self.bytes_sent: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def next_fault(self, name: str) -> tuple[Any, ...]:
        with self.lock:
            faults = self.faults.get(name, [])
            if not faults:
                return ("none",)
            return faults[0] if name in self.sticky and len(faults) == 1 else faults.pop(0)


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _authorized(self) -> bool:
        token = self.server.token
        if token is None or self.headers.get("Authorization") == f"Bearer {token}":
            return True
        self._answer(401, {"error": "Invalid username or password."})
        return False

    def _note(self) -> None:
        with self.server.lock:
            self.server.requests.append((self.command, self.path, self.headers.get("Range")))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._note()
        if not self._authorized():
            return
        if self.path != f"/api/datasets/{self.server.repo}/paths-info/{COMMIT}":
            self._answer(404, {"error": "not found"})
            return
        infos = []
        for name in parse_qs(body.decode())["paths"]:
            if name in self.server.files:
                content = self.server.files[name]
                sha256 = self.server.announced.get(name, hashlib.sha256(content).hexdigest())
                lfs = {"oid": sha256, "size": len(content), "pointerSize": 134}
                infos.append({"type": "file", "path": name, "size": len(content), "oid": "0" * 40, "lfs": lfs})
        self._answer(200, infos)

    def do_GET(self) -> None:
        self._note()
        if not self._authorized():
            return
        if self.path.startswith(f"/api/datasets/{self.server.repo}"):
            status = self.server.next_fault("api")
            if status[0] == "status":
                self._answer(status[1], {"error": "later"})
            else:
                self._answer(200, {"id": self.server.repo, "sha": COMMIT, "siblings": []})
            return
        name = self.path.rsplit("/", 1)[1]
        resolve = f"/datasets/{self.server.repo}/resolve/{COMMIT}/{name}"
        if name not in self.server.files or self.path not in (resolve, f"/cdn/{name}"):
            self._answer(404, {"error": "not found"})
        elif self.server.redirect and self.path == resolve:
            self.send_response(302)
            self.send_header("Location", f"/cdn/{name}")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self._send_file(name)

    def _send_file(self, name: str) -> None:
        content = self.server.files[name]
        fault = self.server.next_fault(name)
        if fault[0] == "status":
            self._answer(fault[1], {"error": "no"})
            return
        begin = 0
        if (wanted := self.headers.get("Range")) and fault[0] != "whole":
            begin = int(wanted.removeprefix("bytes=").split("-")[0])
        part = bytearray(content[begin:])
        if fault[0] == "corrupt":
            part[len(part) // 2] ^= 1
        if fault[0] == "short":
            del part[-fault[1] :]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(part)))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if fault[0] == "drop":
            del part[fault[1] :]
            self.close_connection = True
        self.wfile.write(part)
        self.wfile.flush()
        with self.server.lock:
            self.server.bytes_sent[name] += len(part)
