"""A whole run with the `vllm` engine: killed in a round, nothing of it is left, and the same command finishes it."""

import os
import subprocess
import sys
import time
from collections import Counter

import pytest
from helpers import vllm_double
from helpers.runs import ROOT, TINY, of_round

from bcft.runs.storage import read_journal, read_json

LIMIT = 120.0
KEYS = {
    **TINY, "engine": "vllm", "vllm_command": f"{sys.executable} {vllm_double.__file__}", "concurrency": 2,
    "vllm_server_timeout": LIMIT, "use_peft": True, "lora_r": 4, "use_cpu": True,
    "dataset_train_split": "train[:60]", "prompts_per_round": 12, "eval_dev_problems": 4, "eval_dev_samples": 1,
    "eval_test_problems": 4, "eval_test_samples": 1, "keep_quantile": 0.0, "require_success": "false",
}  # fmt: skip


def command(path):
    words = [f"{key}={value}" for key, value in {**KEYS, "output_dir": path}.items()]
    return [sys.executable, "-m", "bcft.filtered", *words]


def until(holds, run=None):
    deadline = time.monotonic() + LIMIT
    while not holds():
        assert time.monotonic() < deadline
        assert run is None or run.poll() is None, run.communicate()
        time.sleep(0.05)


def servers(path):
    """Return the processes that serve this run, and those that watch over them."""
    listed = subprocess.run(
        ["ps", "-e", "-ww", "-o", "pid=", "-o", "args="], capture_output=True, text=True, check=True
    ).stdout
    return [line for line in listed.splitlines() if vllm_double.__file__ in line and f"{path}/vllm" in line]


@pytest.mark.slow
def test_a_run_killed_in_a_round_leaves_no_server_and_the_same_command_finishes_it(tmp_path):
    path, environment = tmp_path / "run", os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    journal = path / "round_001" / "journal" / "000.jsonl"
    slowly = environment | {"BCFT_DOUBLE_PAUSE": "0.5"}
    run = subprocess.Popen(command(path), env=slowly, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until(lambda: len(read_journal(journal)) >= 4, run)
        assert len(servers(path)) == 2  # the server, and what watches over it
    finally:
        run.kill()
    run.communicate()
    until(lambda: not servers(path))
    before = {line["id"]: line for line in read_journal(journal)}
    assert 4 <= len(before) < 36

    again = subprocess.run(command(path), env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert not servers(path)
    for number in (1, 2):
        rollouts = of_round(path, number, "rollouts.jsonl")
        assert set(Counter(line["id"] for line in rollouts).values()) == {1}
        assert len(rollouts) == 36
        assert of_round(path, number, "metrics.json")["eval"]["kl_base"] > 0
        if number == 1:
            assert {line["id"]: line for line in rollouts if line["id"] in before} == before
    assert read_json(path / "metrics.json")["rounds"] == 2
    assert [file.name for file in (path / "vllm").iterdir()] == ["server.log"]
