"""Runs that upload what they have made: once they are committed, from one process, and so that others can load it."""

from pathlib import Path

import pytest
from datasets import load_dataset
from helpers.runs import TINY
from helpers.uploads import taking_hub
from transformers import AutoModelForCausalLM, AutoTokenizer

from bcft import filtered
from bcft.errors import ServerError
from bcft.reporting.sharing import PUSHED
from bcft.runs.storage import read_json

SMALL = {"num_rounds": 1, "prompts_per_round": 8, "num_generations": 2, "eval_dev_problems": 4, "eval_test_problems": 4}
BOTH = {"push_to_hub": True, "hub_model_id": "me/adder", "hub_dataset_id": "team/kept"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with taking_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def test_a_run_uploads_itself_again_only_after_a_failure_and_others_can_load_it(hub, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    keys = {**TINY, **SMALL, **BOTH, "output_dir": str(run)}
    hub.faults["/commit/"] = 403
    with pytest.raises(ServerError, match="nothing is lost"):
        filtered.run(None, **keys)
    metrics = read_json(run / "metrics.json")
    assert metrics["conclusion"] in capsys.readouterr().out
    status = read_json(run / "status.json")
    assert (status["state"], status["exit_code"]) == ("failed", ServerError.exit_code)
    hub.faults.clear()
    monkeypatch.setenv("RANK", "1")
    filtered.run(None, **keys)
    assert not (run / PUSHED).exists()
    monkeypatch.delenv("RANK")
    files = {file: file.read_bytes() for file in run.rglob("*.json*") if file.name != "status.json"}
    for _ in range(2):
        assert filtered.run(None, **keys) == metrics
    assert hub.commits == ["models/me/adder", "datasets/team/kept"]
    assert read_json(run / "status.json")["exit_code"] == 0
    assert all(file.read_bytes() == content for file, content in files.items())

    for repository, content in hub.files.items():
        for name, data in content.items():
            place = tmp_path / repository / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "models/me/adder")
    mine = AutoModelForCausalLM.from_pretrained(run / "best")
    assert all((a == b).all() for a, b in zip(model.parameters(), mine.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(tmp_path / "models/me/adder").chat_template
    rows = load_dataset(str(tmp_path / "datasets/team/kept"), split="train", cache_dir=str(tmp_path / "datasets_cache"))
    assert len(rows) == read_json(run / "round_001/metrics.json")["selection"]["kept"]
    assert {"prompt", "completion", "reward", "decision", "round", "pass_rate"} <= set(rows.column_names)
    everything = b"\n".join(data for content in hub.files.values() for data in content.values())
    assert str(tmp_path).encode() not in everything
    assert str(Path.home()).encode() not in everything or Path.home() == Path("/root")
