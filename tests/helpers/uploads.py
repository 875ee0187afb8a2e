"""A Hub on this machine that takes uploads from the libraries' real clients, and refuses them as the Hub does."""

import base64
import json
import threading
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
from helpers.hub import NO_REPOSITORY, ask
from huggingface_hub import constants
from huggingface_hub.repocard import RepoCard

TOKEN = "hf_" + "Secret0123456789" * 2


@dataclass
class TakingHub:
    """Repositories by kind and name, with their files; and what the Hub was asked."""

    private: dict[str, bool] = field(default_factory=dict)
    """`models/owner/name` or `datasets/owner/name` -> whether it is."""
    files: dict[str, dict[str, bytes]] = field(default_factory=lambda: defaultdict(dict))
    commits: list[str] = field(default_factory=list)
    """The repository of each."""
    asked: list[str] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    """Part of a path -> the status that it is answered with; 0: the connection is closed."""
    role: str = "write"
    address: str = ""

    def answer(self, method, path, body):
        """Return status, headers and body; a status of 0 closes the connection."""
        self.asked.append(f"{method} {path}")
        for part, status in self.faults.items():
            if part in path:
                return status, {"X-Error-Message": "no"}, {}
        if path == "/api/whoami-v2":
            return 200, {}, {"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": self.role}}}
        if path == "/api/validate-yaml":
            RepoCard(
                json.loads(body)["content"]
            ).data.to_dict()  # the library's own reading; the Hub's rules are its own
            return 200, {}, {}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('type', 'model')}s/{asked['organization']}/{asked['name']}"
            page = f"{self.address}/{name.removeprefix('models/')}"
            if name in self.private:
                return 409, {}, {"url": page}
            self.private[name] = asked["visibility"] == "private"
            return 200, {}, {"url": page}
        if not path.startswith(("/api/models/", "/api/datasets/")):  # what the client asks beside uploads
            return 404, {}, {}
        kind, owner, name, *rest = path.removeprefix("/api/").split("/")
        repository = f"{kind}/{owner}/{name}"
        if repository not in self.private:
            return 404, {"X-Error-Code": NO_REPOSITORY}, {}
        if rest[:1] == ["preupload"]:
            rows = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return 200, {}, {"files": rows}
        if rest[:1] == ["commit"]:
            lines = [json.loads(line) for line in body.splitlines()]
            for value in (line["value"] for line in lines if line["key"] == "file"):
                self.files[repository][value["path"]] = base64.b64decode(value["content"])
            self.commits.append(repository)
            return 200, {}, {"success": True, "commitOid": "0" * 40, "commitUrl": f"/{owner}/{name}/commit/{'0' * 40}"}
        return 200, {}, {"id": f"{owner}/{name}", "private": self.private[repository], "sha": "0" * 40}


@contextmanager
def taking_hub(monkeypatch, cache, **answers):
    """Start such a Hub and make it the one that the libraries ask, with a token; yield it."""
    hub = TakingHub(**answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            given = self.rfile.read(int(self.headers.get("Content-Length", 0))) if self.command == "POST" else b""
            if self.headers.get("Transfer-Encoding") == "chunked":
                given = b"".join(iter(self.chunk, b""))
            status, headers, value = hub.answer(self.command, self.path.partition("?")[0], given)
            if not status:
                self.close_connection = True
                self.connection.close()
                return
            body = json.dumps(value).encode()
            self.send_response(status)
            for name, text in (
                headers | {"Content-Type": "application/json", "Content-Length": str(len(body))}
            ).items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815 - the name that http.server calls

        def chunk(self):
            size = int(self.rfile.readline(), 16)
            content = self.rfile.read(size)
            self.rfile.readline()
            return content

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    ask(monkeypatch, hub.address, cache)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        huggingface_hub.close_session()
