"""Compare an answer with a reference by math-verify, in processes that can be killed.

An answer is written by a policy that is optimised against this very judge: it may take minutes (`9^{9^9}`), gigabytes,
or abort the process inside GMP, and no thread or signal in this process can stop that. So there are two more:

    this process --socket--> server (imports math_verify once) --fork--> one worker per answer, confined and killed

Every answer starts from the same memory image: what one leaves behind, no other sees, the order does not matter, and
nothing has to be respawned. The server itself never touches an answer. Left out: Windows (there is no fork), and any
evaluation of raw text: math-verify alone reads it.
"""

import atexit
import contextlib
import ctypes
import gc
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
from collections.abc import Sequence
from functools import cache
from typing import Literal, NoReturn, get_args

from bcft.errors import FaultError

Verdict = Literal["right", "wrong", "unparsable", "timeout", "memory", "died", "error"]
"""`unparsable` is the reference; the last four say that this answer could not be judged."""

LONGEST = 4096
"""Characters of a text, from its end, that are looked at: a regular expression never sees more."""

_BATCH = 64
_SERVER = "import sys; from bcft.rewards.sandbox import serve; serve(float(sys.argv[1]), *map(int, sys.argv[2:]))"
_START_SECONDS = 120.0
"""Importing sympy takes a second, and from a cold network disk much longer."""
_GRACE_SECONDS = 30.0
_KEPT_VARIABLES = ("PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""All that the server inherits of the environment: an answer can leak no token that is not there."""
_PR_SET_PDEATHSIG = 1


class Judge:
    """A server process, started at the first question and again whenever it is gone.

    Safe to share between threads; a forked copy of this process starts its own. `seconds` and `memory` (bytes) bound
    each answer, `workers` is how many are judged at once.
    """

    _server: subprocess.Popen[bytes] | None
    _socket: socket.socket | None

    def __init__(self, *, seconds: float = 2.0, memory: int = 1 << 30, workers: int | None = None) -> None:
        self._seconds, self._memory = seconds, memory
        self._workers = workers or min(8, os.cpu_count() or 1)
        self._forget()

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """Judge (reference, answer) pairs, each read as math-verify's `parse` reads it; one verdict each, in order.

        Raises FaultError when the server cannot be started at all.
        """
        if self._pid != os.getpid():
            self._forget()
        with self._lock:
            batches = (pairs[start : start + _BATCH] for start in range(0, len(pairs), _BATCH))
            return [verdict for batch in batches for verdict in self._verify_batch(batch)]

    def close(self) -> None:
        """End the server and whatever it runs; the next question starts another."""
        if self._pid != os.getpid():
            self._forget()
        if self._server is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
        if self._socket is not None:
            self._socket.close()
        self._server = self._socket = None

    def __enter__(self) -> "Judge":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget(self) -> None:
        """Start from nothing: handles that came through a fork belong to the parent."""
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._server = self._socket = None

    def _verify_batch(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        question = json.dumps([(reference[-LONGEST:], answer[-LONGEST:]) for reference, answer in pairs])
        for _ in range(2):  # the server may have been killed from outside, and not because of these answers
            with contextlib.suppress(OSError):
                return self._ask(question, self._seconds * len(pairs) + _GRACE_SECONDS)
        return ["died"] * len(pairs)

    def _ask(self, question: str, seconds: float) -> list[Verdict]:
        """Send one line, read one. Whatever goes wrong ends the server: a late reply must not meet a later question."""
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            connection = self._socket or self._start()
            connection.settimeout(seconds)
            connection.sendall(question.encode() + b"\n")
            verdicts: list[Verdict] = json.loads(_read_line(connection))
            on_failure.pop_all()
        return verdicts

    def _start(self) -> socket.socket:
        try:
            self._socket, theirs = socket.socketpair()
            with theirs:
                self._server = subprocess.Popen(
                    [sys.executable, "-c", _SERVER, str(self._seconds), str(self._memory), str(self._workers)],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env=_environment(),
                    start_new_session=True,  # Ctrl-C is for this process to handle; and one signal ends the group
                )
            self._socket.settimeout(_START_SECONDS)
            _read_line(self._socket)
        except OSError as error:
            works = f"{sys.executable} -c 'import math_verify'"
            raise FaultError(f"the judge of answers did not start ({error}): see that this works: {works}") from error
        return self._socket


@cache
def default_judge() -> Judge:
    """Return the judge that the whole process shares; it ends with the process."""
    judge = Judge()
    atexit.register(judge.close)
    return judge


def _environment() -> dict[str, str]:
    """Return the server's environment: this process's import path, and nothing that could be secret."""
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return kept | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0"}


def _read_line(connection: socket.socket) -> bytes:
    """Read until the newline that ends every message. Raises OSError when the other end is gone or late."""
    line = b""
    while not line.endswith(b"\n"):
        received = connection.recv(1 << 16)
        if not received:
            raise ConnectionResetError("its process ended")
        line += received
    return line


# From here on: the server and its workers.

_WARM_UP = (
    (r"\boxed{\frac{1}{2}}", r"\boxed{0.3}"),
    (r"\boxed{x^2+1}", r"\boxed{1+x}"),
    (r"\boxed{(1,2)}", r"\boxed{(1,3)}"),
    (r"\boxed{\text{even}}", r"\boxed{\text{odd}}"),
    (r"\boxed{2\sqrt{3}}", r"$\sqrt{13}\pi$"),
    (r"\boxed{[2,5)}", r"$[2,6) \cup \{7\}$"),
    (r"\boxed{x \le 5}", r"\boxed{x = 5}"),
    (r"\boxed{\log_2 3}", r"\boxed{\sin(30^\circ)}"),
    (r"\boxed{\begin{pmatrix}1\\2\end{pmatrix}}", r"\boxed{\begin{pmatrix}1\\3\end{pmatrix}}"),
    (r"\boxed{\frac{3x-1}{2}}", r"The answer is 50%"),
)
"""What loads math-verify's lazy modules and fills its parser's tables once, for all workers; verdicts do not matter."""


def serve(seconds: float, memory: int, workers: int) -> None:
    """Answer the lines that come through standard input, a socket, until its other end is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # workers are waited for, whatever was inherited
    logging.disable()  # math-verify warns that its own timeouts are off
    for reference, answer in _WARM_UP:
        _judge(reference, answer)
    gc.freeze()  # a collection in a worker would touch, and so copy, every page
    connection = socket.socket(fileno=0)
    with contextlib.suppress(OSError):
        connection.sendall(b"ready\n")
        while True:
            pairs = json.loads(_read_line(connection))
            verdicts = _judge_all(connection, pairs, seconds, memory, workers)
            connection.sendall(json.dumps(verdicts).encode() + b"\n")


def _judge_all(
    connection: socket.socket, pairs: Sequence[tuple[str, str]], seconds: float, memory: int, workers: int
) -> list[Verdict]:
    """Judge in up to `workers` processes at once. Raises ConnectionResetError when nobody waits for it any more."""
    verdicts: list[Verdict] = ["died"] * len(pairs)
    waiting = list(range(len(pairs)))
    running: dict[int, tuple[int, int, float]] = {}  # pipe: index, process id, deadline
    while waiting or running:
        while waiting and len(running) < workers:
            index = waiting.pop(0)
            pipe, pid = _fork(*pairs[index], seconds=seconds, memory=memory)
            running[pipe] = index, pid, time.monotonic() + seconds
        patience = min(deadline for _, _, deadline in running.values()) - time.monotonic()
        ready, _, _ = select.select([connection.fileno(), *running], [], [], max(0.0, patience))
        if connection.fileno() in ready:  # nothing is sent while an answer is due
            raise ConnectionResetError("the asking process ended")
        for pipe, (index, pid, deadline) in list(running.items()):
            if pipe in ready or time.monotonic() >= deadline:
                verdicts[index] = _collect(pipe, pid) if pipe in ready else _end(pipe, pid, "timeout")
                del running[pipe]
    return verdicts


def _fork(reference: str, answer: str, *, seconds: float, memory: int) -> tuple[int, int]:
    """Start a worker; return the pipe that its verdict comes through, and its process id."""
    pipe, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        _work(reference, answer, theirs, seconds, memory)
    os.close(theirs)
    return pipe, pid


def _collect(pipe: int, pid: int) -> Verdict:
    """Read the verdict of a worker that wrote one or died."""
    written = os.read(pipe, 64).decode()
    return _end(pipe, pid, next((verdict for verdict in get_args(Verdict) if verdict == written), "died"))


def _end(pipe: int, pid: int, verdict: Verdict) -> Verdict:
    os.close(pipe)
    os.kill(pid, signal.SIGKILL)  # it cannot be another's yet: its id is free only after waitpid
    os.waitpid(pid, 0)
    return verdict


def _work(reference: str, answer: str, pipe: int, seconds: float, memory: int) -> NoReturn:
    """Judge one answer, write the verdict, and end without returning to the server's code."""
    verdict: Verdict = "error"
    try:
        os.close(0)  # the server's socket
        gc.disable()
        _confine(seconds, memory)
        verdict = _judge(reference, answer)
    except MemoryError:
        verdict = "memory"
    finally:  # whatever else sympy raises (it is not a closed set) is an "error"
        os.write(pipe, verdict.encode())
        os._exit(0)


def _confine(seconds: float, memory: int) -> None:
    """Give this process `memory` bytes, no files, no core dump, and no life after the server's."""
    import resource  # not on Windows, where this module can still be imported

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: math.ceil(seconds) + 1,  # where the system has no signal for the parent's death
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
    }
    for resource_kind, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):  # macOS does not limit address space
            resource.setrlimit(resource_kind, (limit, limit))


def _judge(reference: str, answer: str) -> Verdict:
    """Compare in this process. math-verify's own timeouts are off: they are signals, and look like `wrong`."""
    from math_verify import parse, verify

    gold = parse(reference, parsing_timeout=None)
    if all(isinstance(expression, str) for expression in gold):
        return "unparsable"
    return "right" if verify(gold, parse(answer, parsing_timeout=None), timeout_seconds=None) else "wrong"
