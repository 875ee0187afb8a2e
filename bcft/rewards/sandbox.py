"""Call a function on texts of a policy, in processes that can be killed.

An answer is written by a policy that is optimized against this very call: it may take minutes (`9^{9^9}`) or
gigabytes, or abort the process inside GMP, and no thread or signal in this process can stop that. So there are others:

    this process --socket--> server (imports the package once) --fork--> one worker per request, confined and killed

Every request starts from the same memory image, so an answer cannot affect a later one, and their order does not
matter. The server itself never touches an answer. Left out: Windows (it cannot fork), and any evaluation of raw text:
only the function of a `Job` reads it.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import logging
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Self

from bcft.errors import FaultError

MAX_TEXT_CHARS = 4096
"""Characters of a text that are read, counted from its end: a regular expression never sees more."""

_BATCH = 64
_SERVER = "import sys; from bcft.rewards.sandbox import serve; serve(*sys.argv[1:])"
_START_SECONDS = 120.0
"""Importing sympy takes a second, and much longer from a cold network disk."""
_GRACE_SECONDS = 30.0
_KEPT_VARIABLES = ("PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""The only variables that the server inherits: an answer cannot leak a token that is not there."""
_PR_SET_PDEATHSIG = 1
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""More threads would not survive the fork, and each takes address space, which `memory` limits."""


@dataclass(frozen=True)
class Job:
    """What the workers of a sandbox do with their texts."""

    function: str
    """The dotted path of a function of texts that returns a text, none of `FAILURES`."""
    warm_up: tuple[tuple[str, ...], ...]
    """Harmless texts: the server calls the function with them, which loads lazy modules once for all workers."""
    package: str
    """What the function imports, for the message of a sandbox that does not start."""


FAILURES = ("timeout", "memory", "died", "error")
"""Why a worker has no result; it stands in the place of the result."""


class Sandbox:
    """A server process, started for the first answers and again whenever it is gone.

    Safe to share between threads; a forked copy of this process starts its own. `seconds` and `memory` (bytes) limit
    each request, `workers` is how many run at once.
    """

    _server: subprocess.Popen[bytes] | None
    _socket: socket.socket | None

    def __init__(self, job: Job, *, seconds: float, memory: int, workers: int | None = None) -> None:
        self._job, self._seconds, self._memory = job, seconds, memory
        self._workers = workers or min(8, os.cpu_count() or 1)
        self._forget()

    def call(self, texts: Sequence[tuple[str, ...]]) -> list[str]:
        """Return what the job's function returns for each tuple of texts, in order, or one of `FAILURES`.

        Raises FaultError when the server cannot be started at all.
        """
        if self._pid != os.getpid():
            self._forget()
        with self._lock:
            batches = (texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH))
            return [result for batch in batches for result in self._call_batch(batch)]

    def close(self) -> None:
        """End the server and its workers; the next call starts another."""
        if self._pid != os.getpid():
            self._forget()
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
        if self._socket is not None:
            self._socket.close()
        self._server = self._socket = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget(self) -> None:
        """Start without a server: handles that came through a fork belong to the parent."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._server = self._socket = None

    def _call_batch(self, texts: Sequence[tuple[str, ...]]) -> list[str]:
        request = json.dumps(texts)
        for _ in range(2):  # the first server may have been killed from outside, not by these answers
            with contextlib.suppress(OSError):
                return self._ask(request, self._seconds * len(texts) + _GRACE_SECONDS)
        return ["died"] * len(texts)

    def _ask(self, request: str, seconds: float) -> list[str]:
        """Send one line, read one. Any failure ends the server: a late reply must not answer a later request."""
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            connection = self._socket or self._start()
            connection.settimeout(seconds)
            connection.sendall(request.encode() + b"\n")
            results: list[str] = json.loads(_read_line(connection))
            on_failure.pop_all()
        return results

    def _start(self) -> socket.socket:
        job = (self._job.function, json.dumps(self._job.warm_up))
        limits = (str(self._seconds), str(self._memory), str(self._workers))
        try:
            self._socket, server_side = socket.socketpair()
            with server_side:
                self._server = subprocess.Popen(
                    [sys.executable, "-c", _SERVER, *job, *limits],
                    stdin=server_side.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env=_environment(),
                    start_new_session=True,  # Ctrl-C is for this process alone, and one signal ends the group
                )
            self._socket.settimeout(_START_SECONDS)
            _read_line(self._socket)
        except OSError as error:
            package = self._job.package
            command = f"{sys.executable} -c 'import {package}'"
            raise FaultError(
                f"the sandbox for {package} did not start ({error}): check that this works: {command}"
            ) from error
        return self._socket


def _environment() -> dict[str, str]:
    """Return the server's environment variables: this process's import path, and nothing that could be secret."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return kept | _ONE_THREAD | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0"}


def _read_line(connection: socket.socket) -> bytes:
    """Read to the newline that ends every message. Raises OSError when the other end is gone or late."""
    line = b""
    while not line.endswith(b"\n"):
        received = connection.recv(1 << 16)
        if not received:
            raise ConnectionResetError("its process ended")
        line += received
    return line


# The rest runs in the server and its workers.


def serve(function: str, warm_up: str, seconds: str, memory: str, workers: str) -> None:
    """Answer the lines that come through standard input, a socket, until its other end is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # an inherited handler must not reap the workers
    logging.disable()  # math-verify warns that its own timeouts are off
    module, _, name = function.rpartition(".")
    work = getattr(importlib.import_module(module), name)
    for texts in json.loads(warm_up):
        work(*texts)
    gc.freeze()  # a collection in a worker would touch, and so copy, every page
    connection = socket.socket(fileno=0)
    with contextlib.suppress(OSError):
        connection.sendall(b"ready\n")
        while True:
            requests = json.loads(_read_line(connection))
            results = _call_all(connection, work, requests, float(seconds), int(memory), int(workers))
            connection.sendall(json.dumps(results).encode() + b"\n")


def _call_all(
    connection: socket.socket,
    work: Callable[..., str],
    requests: Sequence[Sequence[str]],
    seconds: float,
    memory: int,
    workers: int,
) -> list[str]:
    """Work in up to `workers` processes at once. Raises ConnectionResetError when the other end is gone."""
    results = ["died"] * len(requests)
    waiting = list(range(len(requests)))
    running: dict[int, tuple[int, int, float]] = {}  # pipe: index, process id, deadline
    while waiting or running:
        while waiting and len(running) < workers:
            index = waiting.pop(0)
            pipe, pid = _fork(work, requests[index], seconds=seconds, memory=memory)
            running[pipe] = index, pid, time.monotonic() + seconds
        remaining = min(deadline for _, _, deadline in running.values()) - time.monotonic()
        ready, _, _ = select.select([connection.fileno(), *running], [], [], max(0.0, remaining))
        if connection.fileno() in ready:  # a living process sends nothing while it waits
            raise ConnectionResetError("the process that sent the request ended")
        for pipe, (index, pid, deadline) in list(running.items()):
            if pipe in ready or time.monotonic() >= deadline:
                results[index] = _collect(pipe, pid) if pipe in ready else _end(pipe, pid, "timeout")
                del running[pipe]
    return results


def _fork(work: Callable[..., str], texts: Sequence[str], *, seconds: float, memory: int) -> tuple[int, int]:
    """Start a worker; return the pipe from which to read its result, and its process id."""
    pipe, worker_side = os.pipe()
    pid = os.fork()
    if pid == 0:
        _work(work, texts, worker_side, seconds, memory)
    os.close(worker_side)
    return pipe, pid


def _collect(pipe: int, pid: int) -> str:
    """Return the result of a worker that wrote one or died; a result is the last thing that a worker writes."""
    written = b""
    while received := os.read(pipe, 1 << 16):
        written += received
    return _end(pipe, pid, written.decode(errors="replace") or "died")


def _end(pipe: int, pid: int, result: str) -> str:
    os.close(pipe)
    os.kill(pid, signal.SIGKILL)  # the id cannot belong to another process: it is free only after waitpid
    os.waitpid(pid, 0)
    return result


def _work(work: Callable[..., str], texts: Sequence[str], pipe: int, seconds: float, memory: int) -> NoReturn:
    """Work on one request, write the result, and end without returning to the server's code."""
    result = "error"
    try:
        os.close(0)  # the server's socket
        gc.disable()
        _confine(seconds, memory)
        result = work(*texts)
    except MemoryError:
        result = "memory"
    finally:  # anything else that sympy raises (it is not a closed set) is an "error"
        written = memoryview(result.encode(errors="replace"))
        while written:
            written = written[os.write(pipe, written) :]
        os._exit(0)


def _confine(seconds: float, memory: int) -> None:
    """Give this process `memory` bytes, no files and no core dump, and let it die with the server."""
    import resource  # noqa: PLC0415 - Windows lacks it, and must be able to import this module

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: math.ceil(seconds) + 1,  # for systems without a signal at the parent's death
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
    }
    for resource_kind, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS does not limit address space
            resource.setrlimit(resource_kind, (limit, limit))
