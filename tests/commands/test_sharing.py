"""A finished run is uploaded once, as one folder with its card, by the Hub's own client; a failure loses nothing."""

import json
import re
from pathlib import Path

import pytest
import yaml
from datasets import load_dataset
from helpers.runs import TINY
from helpers.uploads import TOKEN, taking_hub
from huggingface_hub import DatasetCard, ModelCard, constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from bcft import filtered, sft
from bcft.errors import ServerError, UsageError
from bcft.reporting import cards, sharing
from bcft.runs.storage import read_json, read_jsonl

SMALL = {"num_rounds": 1, "prompts_per_round": 8, "num_generations": 2, "eval_dev_problems": 4, "eval_test_problems": 4}
LORA = {**TINY, **SMALL, "use_peft": True, "lora_r": 2, "lora_target_modules": ["q_proj"], "reward_args": {}}
PLAIN = {
    **{key: value for key, value in TINY.items() if key not in ("num_rounds", "prompts_per_round", "num_generations")},
    "dataset_train_split": "train[:40]", "eval_test_problems": 4,
}  # fmt: skip
PLAIN = {key: value for key, value in PLAIN.items() if key not in ("eval_dev_samples", "eval_every")}
BOTH = {"push_to_hub": True, "hub_model_id": "me/adder", "hub_dataset_id": "team/kept"}
MODEL = {"push_to_hub": True, "hub_model_id": "me/adder"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with taking_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished filtered run of an adapter, with its keys."""
    keys = {**LORA, "output_dir": str(tmp_path_factory.mktemp("run") / "it")}
    filtered.run(None, **keys)
    return Path(keys["output_dir"]), keys


@pytest.fixture
def run(finished):
    """The finished run, of which nothing is uploaded."""
    path, keys = finished
    (path / sharing.PUSHED).unlink(missing_ok=True)
    return path, keys


def uploaded(files, place):
    """Write what a repository holds into a directory."""
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def uploads(hub):
    """Return the paths of commits and new repositories that were asked for."""
    return [line for line in hub.asked if "/commit/" in line or "create" in line]


# What is uploaded


def test_a_run_of_sft_uploads_its_model_once_it_is_committed(hub, tmp_path, capsys):
    run = tmp_path / "run"
    sft.run(None, output_dir=str(run), **PLAIN, **MODEL)
    files = hub.files["models/me/adder"]
    weights = {
        name for name in read_json(run / "manifest.json")["files"] if name not in ("metrics.json", "config.yaml")
    }
    assert files.keys() == weights | {"README.md"}
    assert all(files[name] == (run / name).read_bytes() for name in weights)
    assert hub.private["models/me/adder"]
    assert hub.commits == ["models/me/adder"]
    assert not (run / ".hub").exists()
    place = uploaded(files, tmp_path / "got")
    assert AutoModelForCausalLM.from_pretrained(place).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(place).chat_template
    assert "The model is at http://127.0.0.1" in capsys.readouterr().out
    assert not any("hub" in key for key in yaml.safe_load((run / "config.yaml").read_text()))


def test_a_finished_run_uploads_adapter_and_kept_rows_and_never_twice(hub, run, tmp_path):
    path, keys = run
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file() and "report" not in file.name}
    metrics = filtered.run(None, **keys, **BOTH)
    assert sorted(hub.commits) == ["datasets/team/kept", "models/me/adder"]
    again = filtered.run(None, **keys, **BOTH)
    assert len(hub.commits) == 2
    assert metrics == again == read_json(path / "metrics.json")
    changed = {file.name for file, content in before.items() if file.read_bytes() != content}
    assert changed <= {"status.json", ".lock", "learning_curve.png"}

    model = uploaded(hub.files["models/me/adder"], tmp_path / "model")
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {
        file.name for file in model.iterdir()
    }
    assert read_json(model / "adapter_config.json")["base_model_name_or_path"] == "bcft:tiny-math"
    code = re.search(r"```python\n(.+?)```", (model / "README.md").read_text(), re.S)[1].replace("me/adder", str(model))
    names = {}
    exec(compile(code, "card", "exec"), names)
    assert names["model"].peft_config["default"].r == 2

    data = uploaded(hub.files["datasets/team/kept"], tmp_path / "data")
    assert {file.name for file in data.iterdir()} == {"README.md", "train.jsonl"}
    rows = list(load_dataset(str(data), split="train", cache_dir=str(tmp_path / "datasets")))
    kept = [line for line in read_jsonl(path / "round_001/scores.jsonl") if line["decision"] == "kept"]
    assert [(row["id"], row["reward"], row["success"]) for row in rows] == [
        (line["id"], line["reward"], line["success"]) for line in kept
    ]
    assert {(row["decision"], row["round"]) for row in rows} == {("kept", 1)}
    for row in rows:
        of_problem = [x for x in read_jsonl(path / "round_001/scores.jsonl") if row["problem_id"] in x["id"]]
        assert row["pass_rate"] == sum(x["success"] == "yes" for x in of_problem) / len(of_problem)


def test_more_or_another_repository_is_uploaded_by_the_same_command(hub, run):
    _, keys = run
    filtered.run(None, **keys, **MODEL)
    filtered.run(None, **keys, **BOTH)
    filtered.run(None, **keys, **{**BOTH, "hub_model_id": "team/adder", "hub_private_repo": False})
    assert hub.commits == ["models/me/adder", "datasets/team/kept", "models/team/adder"]
    assert hub.private == {"models/me/adder": True, "datasets/team/kept": True, "models/team/adder": False}


def test_one_process_alone_uploads(hub, run, monkeypatch):
    path, keys = run
    monkeypatch.setenv("RANK", "1")
    filtered.run(None, **keys, **BOTH)
    assert not hub.asked
    assert not (path / sharing.PUSHED).exists()


def test_nothing_of_the_machine_is_uploaded(hub, run):
    path, keys = run
    filtered.run(None, **keys, **BOTH)
    texts = {name: text for files in hub.files.values() for name, text in files.items() if b"\0" not in text}
    for name, text in texts.items():
        for private in (str(path), str(Path.home()), TOKEN, "/bcft/assets"):
            assert private == "/" or private.encode() not in text, (name, private)
    assert TOKEN not in (path / sharing.PUSHED).read_text()


def test_paths_lose_their_directories_and_arguments_their_secrets():
    recipe = {
        "dataset_name": "/home/jo/data/sums.jsonl,~/more/b.jsonl", "output_dir": "/home/jo/runs/x",
        "reward_args": {"api_key": "abc", "rubric": "/srv/r.txt"}, "system_prompt": "In <b></b>, as 1/2 and/or 3.",
    }  # fmt: skip
    shown = cards.recipe_of(recipe)
    assert shown["dataset_name"] == "sums.jsonl,b.jsonl"
    assert shown["reward_args"] == {"api_key": "...", "rubric": "r.txt"}
    assert shown["system_prompt"] == recipe["system_prompt"]
    assert "output_dir" not in shown


# The cards


def test_the_cards_are_read_by_the_hubs_library_and_name_their_sources(hub, run):
    path, keys = run
    filtered.run(None, **keys, **BOTH)
    model, data = (hub.files[name]["README.md"].decode() for name in ("models/me/adder", "datasets/team/kept"))
    ModelCard(model).validate()
    DatasetCard(data).validate()
    about = ModelCard(model).data
    assert about.library_name == "peft"
    assert {result.metric_type: result.metric_value for result in about.eval_results}["pass@1"] == pytest.approx(
        read_json(path / "metrics.json")["best"]["sampled"]["pass@1"], abs=1e-6
    )
    versions, manifest = read_json(path / "versions.json"), read_json(path / "round_001/manifest.json")
    for said in ("bcft:tiny-math", "bcft:arithmetic", "## Limits", "keep_quantile", "| round |", versions["data"]):
        assert said in model, said
    for said in (
        versions["data"],
        versions["functions"][0],
        manifest["tokenizer"],
        manifest["files"]["kept.jsonl"][:16],
    ):
        assert said in data, said
    rows = [json.loads(line) for line in hub.files["datasets/team/kept"]["train.jsonl"].splitlines()]
    assert all(f"| `{column}` |" in data for row in rows for column in row)


def test_the_control_stands_in_the_card(hub, run):
    path, keys = run
    filtered.run(None, **keys, **MODEL, against=str(path))
    card = hub.files["models/me/adder"]["README.md"].decode()
    assert "| base | best | it |" in card
    assert "Beside the it, paired problem by problem: not distinguishable" in card


# What goes wrong


@pytest.mark.parametrize("fault", [403, 500, 0, 413])
@pytest.mark.parametrize("at", ["/commit/", "/preupload/", "/repos/create"])
def test_a_failed_upload_loses_nothing_and_the_same_command_repeats_it(hub, run, capsys, at, fault):
    path, keys = run
    hub.faults[at] = fault
    with pytest.raises(ServerError, match=r"nothing is lost; the same command .*: bcft filtered .*push_to_hub"):
        filtered.run(None, **keys, **MODEL)
    assert read_json(path / "metrics.json")["conclusion"] in capsys.readouterr().out
    assert read_json(path / "status.json")["exit_code"] == ServerError.exit_code
    assert not hub.commits
    hub.faults.clear()
    filtered.run(None, **keys, **MODEL)
    assert hub.commits == ["models/me/adder"]
    assert read_json(path / "status.json")["exit_code"] == 0


@pytest.mark.parametrize(
    ("given", "value", "said"),
    [
        ("token", None, "no token: set HF_TOKEN"),
        ("offline", True, "HF_HUB_OFFLINE is set"),
        ("role", "read", "the token may only read"),
        ("faults", {"whoami": 401}, "does not know this token"),
        ("faults", {"whoami": 0}, "the Hub does not answer"),
        ("private", {"models/me/adder": False}, "everybody can read me/adder"),
    ],
)
def test_what_the_hub_would_not_take_is_refused_before_the_run(hub, monkeypatch, tmp_path, given, value, said):
    if given == "token":
        monkeypatch.delenv("HF_TOKEN")
    elif given == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value)
    else:
        setattr(hub, given, value)
    refused(hub, tmp_path, MODEL, said)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({**MODEL, "hub_model_id": "other/x"}, "which are me, team"),
        ({**MODEL, "hub_model_id": "x"}, "wants owner/name, not 'x'"),
        ({"push_to_hub": True}, "needs hub_model_id"),
        ({"hub_model_id": "me/x"}, "no effect without push_to_hub: true"),
        ({**MODEL, "hub_token": TOKEN}, "set HF_TOKEN in the environment instead"),
        ({**MODEL, "hub_strategy": "end"}, "uploaded once"),
        ({**MODEL, "model_name_or_path": ".", "use_peft": True, "learning_rate": 1e-4}, "is on this machine alone"),
    ],
)
def test_keys_that_name_no_place_of_ones_own_are_refused_before_the_run(hub, tmp_path, keys, said):
    refused(hub, tmp_path, keys, said)


def refused(hub, tmp_path, keys, said):
    """Run `sft`, which must be refused in one line, before anything is asked of a model or written to the Hub."""
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        sft.run(None, output_dir=str(tmp_path / "run"), **{**PLAIN, **keys})
    assert len(str(caught.value).splitlines()) == 1
    assert TOKEN not in str(caught.value)
    assert not (tmp_path / "run/config.yaml").exists()
    assert not uploads(hub)


def test_a_run_that_is_uploaded_needs_no_hub_any_more(hub, run, monkeypatch):
    _, keys = run
    filtered.run(None, **keys, **MODEL)
    monkeypatch.delenv("HF_TOKEN")
    hub.asked.clear()
    filtered.run(None, **keys, **MODEL)
    assert not hub.asked
