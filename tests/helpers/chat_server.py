"""A small real HTTP server that answers as an OpenAI chat server does, with the faults that such servers have.

Its answers have the fields that OpenAI documents.
"""

import json
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STATUS = {
    "429": (429, {"Retry-After": "0"}, "Rate limit reached for requests", "rate_limit_exceeded"),
    "429 later": (429, {"Retry-After": "7"}, "Rate limit reached for requests", "rate_limit_exceeded"),
    "429 date": (429, {"Retry-After": "Fri, 01 Jan 2021 00:00:00 GMT"}, "Slow down", "rate_limit_exceeded"),
    "quota": (429, {}, "You exceeded your current quota", "insufficient_quota"),
    "500": (500, {}, "The server had an error", "internal_error"),
    "503": (503, {"Retry-After": "0"}, "Service unavailable", "unavailable"),
    "401": (401, {}, "Incorrect API key provided: {key}", "invalid_api_key"),
    "404": (404, {}, "The model `other` does not exist.", "NotFoundError"),
    "400": (400, {}, "temperature must be at most 1", "invalid_request_error"),
    "long": (400, {}, "This model's maximum context length is 64 tokens. However, you requested 99", "BadRequestError"),
    "filter": (400, {}, "The prompt triggered the content management policy", "content_filter"),
    "newer": (400, {}, "Unsupported parameter: use 'max_completion_tokens' instead", "unsupported_parameter"),
}
"""Fault -> status, headers, message and code of the answer."""


class ChatServer(ThreadingHTTPServer):
    """Answers `reply(prompt)`, the last message's text: a text, or a text and its finish reason.

    fault: (number of the request from 1, prompt) -> a key of `STATUS`, `cut`, `cut in the middle`, `html`, `empty`,
    `hold` (no answer before `release`), or "" for none.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, reply, fault):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.fault = reply, fault
        self.lock = threading.Lock()
        self.requests = []
        """The bodies, in the order in which they came."""
        self.keys = Counter()
        self.answered = Counter()
        """Prompt -> how often it was answered."""
        self.held, self.release = threading.Event(), threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """Say nothing about clients that were killed."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        server, key = self.server, self.headers.get("Authorization", "")
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        with server.lock:
            server.requests.append(body)
            server.keys[key] += 1
            number = len(server.requests)
        fault = server.fault(number, prompt)
        if fault == "hold":
            server.held.set()
            server.release.wait()
        elif fault in STATUS:
            status, headers, message, code = STATUS[fault]
            error = {"message": message.format(key=key.removeprefix("Bearer ")), "type": code, "code": code}
            return self._send(status, {"error": error}, headers)
        elif fault == "html":
            return self._send(200, "<html>a page of the provider</html>", {}, kind="text/html")
        elif fault == "empty":
            return self._send(200, {"error": {"message": "no provider"}, "choices": None}, {})
        elif fault == "cut":
            return self._cut()
        answer = self._answer(body, prompt)
        if fault == "cut in the middle":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "9999")
            self.end_headers()
            self.wfile.write(json.dumps(answer)[:20].encode())
            return self._cut()
        with server.lock:
            server.answered[prompt] += 1
        return self._send(200, answer, {})

    def _answer(self, body, prompt):
        given = self.server.reply(prompt)
        text, reason = given if isinstance(given, tuple) else (given, "stop")
        refusal = text if reason == "refusal" else None
        message = {"role": "assistant", "content": None if refusal else text, "refusal": refusal, "tool_calls": []}
        reason = "stop" if refusal else reason
        made = len((text or "").split())
        return {
            "id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": body["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": reason, "logprobs": None}],
            "usage": {"prompt_tokens": 10, "completion_tokens": made, "total_tokens": 10 + made},
        }  # fmt: skip

    def _send(self, status, body, headers, kind="application/json"):
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": kind, "Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _cut(self):
        self.wfile.flush()
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_):
        """Say nothing."""


@contextmanager
def chat_server(reply=lambda prompt: f"it is {prompt}", fault=lambda number, prompt: ""):  # noqa: ARG005
    """Serve on a free port of the loopback until the end of the block."""
    server = ChatServer(reply, fault)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        server.server_close()
