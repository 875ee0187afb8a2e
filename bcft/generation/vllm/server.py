"""A vLLM server that this process starts: its port, its log, its health, and its end.

It runs under `watchdog.py`, in a process group of its own, which ends with this process, however that ends.
"""

import contextlib
import importlib.util
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bcft.errors import ServerError, UsageError
from bcft.generation.vllm import watchdog
from bcft.generation.vllm.client import SECRET, Client
from bcft.runs.progress import Progress
from bcft.runs.storage import storage

COMMAND = ("-m", "vllm.entrypoints.openai.api_server")
"""What starts vLLM in the Python that runs this."""
_LOOK = 0.2
"""Seconds between two looks at a server that is starting."""
_OF_A_LAUNCHER = re.compile(r"(RANK|LOCAL_RANK|GROUP_RANK|ROLE_RANK|\w*WORLD_SIZE|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+)")
"""Variables of torchrun, from which vLLM would take this process's place among others."""
_ERROR = re.compile(r"\b[A-Z]\w*(?:Error|Exception)\b: (?!.*See (?:root cause|stack trace))\S.*|\berror: \S.*")
"""A reason in a log: the error that ended a process, or what argparse refuses; not that another process has ended."""
_HARMLESS = re.compile(r"\b(DEBUG|INFO|WARNING) \d\d-\d\d ")
"""A line of vLLM's log that is no error, whatever it names."""
_LONGEST = 300


def check_command(command: Sequence[str]) -> tuple[str, ...]:
    """Return the words that start vLLM, the default for (). Raises UsageError when there is no such program."""
    if not command:
        if importlib.util.find_spec("vllm") is None:
            raise UsageError(
                "engine: vllm is not installed beside bcft: give it an environment of its own, and vllm_command: "
                f"[/opt/vllm/bin/python, {', '.join(COMMAND)}], or vllm_server_base_url"
            )
        return (sys.executable, *COMMAND)
    if shutil.which(command[0]) is None:
        raise UsageError(f"vllm_command: there is no program {command[0]!r}: give the path of one")
    return tuple(command)


class Server:
    """A server that is started, perhaps several times, and ended once more than that.

    command: the words before the arguments; log: what it prints is added there; timeout: seconds it may take to start;
    label: of the progress, '' for none.
    """

    def __init__(
        self, command: Sequence[str], *, log: Path, timeout: float, label: str = "starting the vLLM server"
    ) -> None:
        self.command = command
        self.log = log
        self.timeout = timeout
        self.label = label
        self.key = secrets.token_urlsafe(24)  # loopback is shared by all users of a machine
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = -1
        self._logged = 0

    def start(self, arguments: Sequence[str], *, port: int = 0) -> Client:
        """End the server before, start another, and wait until it is healthy.

        port: 0 for one that is free. Raises ServerError, with the log's reason, when it does not become healthy.
        """
        self.stop()
        self.port = port or _free_port()
        with storage(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            log = self.log.open("ab")
        words = [*self.command, *arguments, "--host", "127.0.0.1", "--port", str(self.port)]
        with log:
            self._logged = log.tell()
            read, self._pipe = os.pipe()
            try:
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", watchdog.__file__, str(os.getpid()), *words],
                    stdin=read,
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                    start_new_session=True,  # Ctrl-C is for this process alone, and one signal ends the group
                )
            finally:
                os.close(read)
        client = Client(f"http://127.0.0.1:{self.port}", key=self.key)
        healthy = False
        try:
            self._wait(client)
            healthy = True
        finally:
            if not healthy:
                self.stop()
        return client

    def running(self) -> bool:
        """Return whether its process runs; it may still not answer. What a killed one left behind is ended."""
        if self._process is not None and self._process.poll() is not None:
            self.stop()
        return self._process is not None

    def stop(self) -> None:
        """End the server and all processes of its group."""
        process, self._process = self._process, None
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        if process is None:
            return
        try:
            process.wait(watchdog.GRACE + 5)
        except subprocess.TimeoutExpired:
            pass
        finally:  # interrupted while waiting, too
            _kill_group(process)

    def reason(self) -> str:
        """Return why the server ended or cannot answer, as its log says: the last error, else the last line."""
        lines = self._said()
        found = [match[0] for line in lines if (match := _ERROR.search(line)) and not _HARMLESS.search(line)]
        return _one_line((found or lines)[-1])

    def _said(self) -> list[str]:
        """Return the lines that the server has logged since its last start."""
        if not self.log.is_file():
            return ["it said nothing"]
        with self.log.open("rb") as file:
            file.seek(self._logged)
            lines = file.read().decode(errors="replace").splitlines()
        return [line for line in lines if line.strip()] or ["it said nothing"]

    def _wait(self, client: Client) -> None:
        deadline = time.monotonic() + self.timeout
        with Progress(self.label):
            while not client.healthy():
                if not self.running():
                    raise ServerError(f"the vLLM server ended while it was starting: {self.reason()}: see {self.log}")
                if time.monotonic() > deadline:
                    raise ServerError(
                        f"vllm_server_timeout: the vLLM server did not answer within {self.timeout:g} s; its last "
                        f"words are {_one_line(self._said()[-1])!r}: see {self.log}, or give it longer"
                    )
                time.sleep(_LOOK)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not _OF_A_LAUNCHER.fullmatch(name)}
        return kept | {
            SECRET: self.key,
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
        }


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_LONGEST].rstrip(".")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a process's group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS says it in another way
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
