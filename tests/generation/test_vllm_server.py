"""A server that bcft starts: its health, its log's reason, and that nothing of it is left, however bcft ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import vllm_process

from bcft.errors import ServerError, UsageError
from bcft.generation.vllm.server import Server, check_command

LIMIT = 30.0
"""Seconds after which what a test waits for will not come."""
COMMAND = (sys.executable, "-I", "-S", vllm_process.__file__)
RUN = """
import os, signal, sys, time
from pathlib import Path
from bcft.cli import _preempt
from bcft.config.engine import EngineSettings
from bcft.generation.vllm import open_vllm

signal.signal(signal.SIGTERM, _preempt)
settings = EngineSettings(engine="vllm", vllm_command=tuple(sys.argv[3:]), vllm_server_timeout=60.0)
with open_vllm(settings, directory=Path(sys.argv[1])) as maker:
    maker.weights.server.start([])
    fork = os.fork() if sys.argv[2] == "forks" else -1
    if fork == 0:  # holds the pipe open for longer
        time.sleep(60)
        os._exit(0)
    print(fork, flush=True)
    if sys.argv[2] == "raises":
        raise KeyError("a bug")
    time.sleep(600)
"""


@pytest.fixture
def about(tmp_path, monkeypatch):
    path = tmp_path / "about.json"
    monkeypatch.setenv("BCFT_DOUBLE", str(path))
    return lambda: json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def server(tmp_path):
    made = Server(COMMAND, log=tmp_path / "vllm" / "server.log", timeout=LIMIT)
    yield made
    made.stop()


def alive(pids):
    """Return those of the processes that run; one that has ended and was not waited for does not."""

    def runs(pid):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(") ")[2][0] != "Z"

    return [pid for pid in pids if runs(pid)]


def until(holds):
    deadline = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_server_is_healthy_when_start_returns_and_is_ended_with_its_children(server, about):
    client = server.start(["--model", "here"])
    assert client.healthy()
    assert client.url == f"http://127.0.0.1:{server.port}"
    assert about()["arguments"] == ["--model", "here", "--host", "127.0.0.1", "--port", str(server.port)]
    pids = about()["pids"]
    assert alive(pids) == pids
    server.stop()
    assert not alive(pids)
    assert not server.running()
    server.stop()


def test_a_server_gets_the_environment_a_key_and_nothing_of_a_launcher(server, about, monkeypatch):
    for name, value in {"HF_HUB_OFFLINE": "1", "RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    client = server.start([])
    environment = about()["environment"]
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert not environment.keys() & {"RANK", "WORLD_SIZE", "MASTER_PORT"}
    assert environment["VLLM_NO_USAGE_STATS"] == environment["DO_NOT_TRACK"] == "1"
    assert environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "True"
    assert environment["VLLM_API_KEY"] == client.key
    assert client.key not in " ".join(about()["arguments"])


def test_a_server_that_does_not_start_is_told_in_a_line_with_its_logs_reason(server, about, monkeypatch):
    monkeypatch.setenv("BCFT_DOUBLE_DOES", "fail")
    with pytest.raises(ServerError) as failed:
        server.start([])
    assert str(failed.value) == (
        f"the vLLM server ended while it was starting: ValueError: Unsupported head size 16: see {server.log}"
    )
    until(lambda: not alive(about()["pids"]))


def test_a_server_that_takes_too_long_is_ended(server, about, monkeypatch):
    monkeypatch.setenv("BCFT_DOUBLE_DOES", "hang")
    server.timeout = 3.0
    with pytest.raises(
        ServerError, match="vllm_server_timeout: the vLLM server did not answer within 3 s; its last words"
    ):
        server.start([])
    assert not alive(about()["pids"])


def test_a_server_that_was_killed_takes_its_children_along_and_can_be_started_again(server, about):
    server.start([])
    pids = about()["pids"]
    os.kill(pids[0], signal.SIGKILL)
    until(lambda: not server.running())
    assert not alive(pids)
    assert server.reason() == "the server ended with exit code -9"
    assert server.start([]).healthy()
    assert not set(pids) & set(about()["pids"])


def test_a_server_whose_watchdog_was_killed_is_ended_all_the_same(server, about):
    server.start([])
    pids = about()["pids"]
    os.kill(server._process.pid, signal.SIGKILL)
    until(lambda: not server.running())
    until(lambda: not alive(pids))


def test_a_server_that_ignores_the_request_to_end_is_killed(server, about, monkeypatch):
    monkeypatch.setenv("BCFT_DOUBLE_DOES", "stubborn")
    server.start([])
    pids = about()["pids"]
    server.stop()
    until(lambda: not alive(pids))


@pytest.mark.parametrize(
    ("does", "number", "code"),
    [("waits", signal.SIGKILL, -9), ("forks", signal.SIGKILL, -9), ("waits", signal.SIGTERM, 1), ("raises", None, 1)],
)
def test_nothing_is_left_of_a_server_when_bcft_ends(about, tmp_path, does, number, code):
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path), does, *COMMAND], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        fork = int(run.stdout.readline())
        pids = about()["pids"]
        if number is not None:
            assert alive(pids) == pids
            run.send_signal(number)
        assert run.wait(LIMIT) == code
        until(lambda: not alive(pids))
        if fork > 0:
            os.kill(fork, signal.SIGKILL)
    finally:
        run.kill()
        run.stdout.close()
        run.stderr.close()


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("", "it said nothing"),
        ("loading\nKilled\n", "Killed"),
        ("usage: vllm\napi_server.py: error: unrecognized arguments: --fo\n", "error: unrecognized arguments: --fo"),
        ("File 'x'\ntorch.OutOfMemoryError: CUDA out of memory.\nthe end\n", "OutOfMemoryError: CUDA out of memory"),
        (vllm_process.FAILED, "ValueError: Unsupported head size 16"),
    ],
)
def test_the_reason_is_the_last_error_that_does_not_point_to_another(tmp_path, log, reason):
    server = Server(COMMAND, log=tmp_path / "log", timeout=1.0)
    server.log.write_text(log, encoding="utf-8")
    assert server.reason() == reason


def test_a_program_that_is_not_there_is_named(monkeypatch):
    assert check_command(COMMAND) == COMMAND
    with pytest.raises(UsageError, match="vllm_command: there is no program '/opt/none/python'"):
        check_command(("/opt/none/python", "-m", "vllm"))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="vllm is not installed beside bcft"):
        check_command(())
