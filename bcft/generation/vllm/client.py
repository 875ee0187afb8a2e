"""Questions to a vLLM server over HTTP: JSON in, JSON out, and what went wrong in one of two kinds.

A connection for each question: one that is kept may be closed by the server just when the next question is sent.
"""

import json
import threading
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from socket import SHUT_RDWR
from typing import Any
from urllib.parse import urlsplit

from bcft.errors import UsageError

SECRET = "VLLM_API_KEY"
"""The variable that holds a server's key, for vLLM as well."""
ANSWER_SECONDS = 3600.0
"""Nobody knows how long a server takes for a long answer among many others; one that died breaks the connection."""
LOOK_SECONDS = 10.0
"""For a question about the server itself."""
_AGAIN = frozenset({408, 409, 425, 429})
"""Statuses of a server that can be asked again; so can one with any status from 500."""
_GATEWAY = frozenset({502, 503, 504})
"""Statuses of a proxy whose server is not there."""
_DENIED = frozenset({401, 403})
_LONGEST = 300
"""Characters of what a server says that a person gets to read."""


class Broken(Exception):  # noqa: N818 - not an error yet: the question is asked again
    """The server gave no answer, or said that it cannot now. `str(broken)`: how.

    connection: whether it broke with the connection, so that another process may be there since.
    """

    def __init__(self, how: str, *, connection: bool = False) -> None:
        super().__init__(how)
        self.connection = connection


class Refused(Exception):  # noqa: N818 - as above: what it means depends on the question
    """The server does not answer such a question. `str(refused)`: its reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Client:
    """A server's address, and the connections to it.

    url: with or without `/v1`; key: sent as a bearer token unless empty. Safe to share between threads. All questions
    raise UsageError when the server wants another key.
    """

    def __init__(self, url: str, *, key: str = "") -> None:
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self._parts = urlsplit(self.url)
        self.key = key
        self._open: set[HTTPConnection] = set()
        self._lock = threading.Lock()
        self._closed = False

    def get(self, path: str) -> Any:
        """Return what the server says at a path. Raises Broken and Refused."""
        return self._ask("GET", path, None, LOOK_SECONDS)

    def post(self, path: str, body: Mapping[str, Any], *, seconds: float = ANSWER_SECONDS) -> Any:
        """Return the server's answer. Raises Broken and Refused."""
        return self._ask("POST", path, json.dumps(body).encode(), seconds)

    def healthy(self) -> bool:
        """Return whether the server answers and its engine lives."""
        try:
            self.get("/health")
        except (Broken, Refused):
            return False
        return True

    def fresh(self) -> "Client":
        """Return a client of the same server with connections of its own, which can be closed apart."""
        return Client(self.url, key=self.key)

    def close(self) -> None:
        """Break all connections, whose questions fail at once: a server samples nothing for a connection that broke."""
        with self._lock:
            self._closed = True
            for connection in self._open:
                if connection.sock is not None:
                    _shut(connection)

    def _ask(self, method: str, path: str, body: bytes | None, seconds: float) -> Any:
        kind = HTTPSConnection if self._parts.scheme == "https" else HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=seconds)
        try:
            connection.connect()
            with self._lock:
                if self._closed:
                    raise Broken("no more questions")
                self._open.add(connection)
            headers = {"Content-Type": "application/json"}
            if self.key:
                headers["Authorization"] = f"Bearer {self.key}"
            connection.request(method, f"{self._parts.path}{path}", body, headers)
            response = connection.getresponse()
            content = response.read()
        except (OSError, HTTPException) as error:
            raise Broken(f"{type(error).__name__}: {error}"[:_LONGEST], connection=True) from error
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        try:
            return _read(response.status, content)
        except Refused as refused:
            if refused.status in _DENIED:
                raise UsageError(self._denied(refused)) from None  # its reason may hold the key
            raise

    def _denied(self, refused: Refused) -> str:
        what = "refuses the key" if self.key else "wants a key"
        reason = str(refused).replace(self.key, "***") if self.key else str(refused)
        return (
            f"{SECRET}: the vLLM server at {self.url} {what} (status {refused.status}: {reason}): set it to that one's"
        )


def _shut(connection: HTTPConnection) -> None:
    try:
        connection.sock.shutdown(SHUT_RDWR)
    except OSError:  # it has broken by itself
        return


def _read(status: int, content: bytes) -> Any:
    """Return an answer's JSON, or its text where it is none. Raises Broken and Refused by its status."""
    text = content.decode(errors="replace")
    try:
        value: Any = json.loads(text)
    except ValueError:
        value = text
    if status == 200:
        return value
    reason = " ".join(_reason(value).split())[:_LONGEST] or "no reason given"
    if status >= 500 or status in _AGAIN:
        raise Broken(f"status {status}: {reason}", connection=status in _GATEWAY)
    raise Refused(status, reason)


def _reason(value: Any) -> str:
    """Return the words of an error: vLLM gives `{error: {message}}`, others `{message}`, `{detail}` or a text."""
    if isinstance(value, Mapping):
        inner = value.get("error", value)
        if isinstance(inner, Mapping):
            inner = inner.get("message") or inner.get("detail") or ""
        return str(inner)
    return str(value)
