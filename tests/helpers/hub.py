"""A Hub on this machine: repositories with files, statuses and error codes, for the libraries' real clients."""

import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
from huggingface_hub import constants

GATED = "GatedRepo"
NO_REPOSITORY = "RepoNotFound"
NO_REVISION = "RevisionNotFound"
NO_FILE = "EntryNotFound"
COMMIT = "0" * 40


@dataclass
class Hub:
    """What the Hub answers for each repository: a status with an error code, or its files."""

    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def answer(self, path):
        """Return status, headers and body for a path such as /owner/name/resolve/main/config.json."""
        self.asked.append(path)
        for repository, (status, code) in self.refused.items():
            if f"/{repository}/" in f"{path}/":
                return status, {"X-Error-Code": code} if code else {}, b""
        for repository, files in self.files.items():
            if path.startswith(f"/api/models/{repository}/tree/"):
                return 200, {"Content-Type": "application/json"}, b"[]"
            if path == f"/api/models/{repository}/revision/main":
                return 200, {"Content-Type": "application/json"}, json.dumps({"id": repository, "sha": COMMIT}).encode()
            if path.startswith(f"/api/models/{repository}/revision/"):
                return 404, {"X-Error-Code": NO_REVISION}, b""
            if path.startswith(f"/{repository}/resolve/"):
                revision, _, file = path.removeprefix(f"/{repository}/resolve/").partition("/")
                if revision not in ("main", COMMIT):
                    return 404, {"X-Error-Code": NO_REVISION}, b""
                if file not in files:
                    return 404, {"X-Error-Code": NO_FILE, "X-Repo-Commit": COMMIT}, b""
                return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{abs(hash(file))}"'}, files[file]
        return 404, {"X-Error-Code": NO_REPOSITORY}, b""


@contextmanager
def local_hub(monkeypatch, cache, **answers):
    """Start a Hub and make it the one that the libraries ask, with an empty cache; yield it."""
    hub = Hub(**answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = hub.answer(self.path.partition("?")[0])
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815 - the name that http.server calls

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    ask(monkeypatch, hub.address, cache)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        huggingface_hub.close_session()


def ask(monkeypatch, address, cache, *, offline=False):
    """Make the libraries ask this address, with this cache and without a token."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client waits between its retries
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.close_session()
