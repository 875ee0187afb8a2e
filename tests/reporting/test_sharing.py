"""A finished run is uploaded once, as one folder with its card, by the Hub's own client; a failure loses nothing."""

import json
from pathlib import Path

import pytest
from helpers.finished import KEPT, finished_run, model_files
from helpers.uploads import TOKEN, taking_hub
from huggingface_hub import DatasetCard, ModelCard, constants

from bcft.config.loader import load
from bcft.errors import ServerError, UsageError
from bcft.reporting import cards
from bcft.reporting.dataset_card import FIELDS
from bcft.reporting.sharing import PUSHED, check_push, push, write_card
from bcft.runs.storage import read_json

MODEL = {"push_to_hub": True, "hub_model_id": "me/adder"}
BOTH = {**MODEL, "hub_dataset_id": "team/kept"}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with taking_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def uploaded(config):
    """Upload what a run's keys ask for; return the lines that are printed."""
    path = Path(config.training.output_dir)
    return list(push(config.sharing, path, command_line=config.command_line, against=None))


def checked(config, *, finished=False):
    """Check as before a run."""
    check_push(config.sharing, config.model, Path(config.training.output_dir), finished=finished)


def asking(config, **keys):
    """Return the configuration of the same run with other keys of sharing."""
    return load("filtered", None, {**{key: config.values[key] for key in config.given}, **keys})


# What is uploaded


def test_a_model_is_one_upload_of_its_files_and_its_card_private_by_default(hub, tmp_path):
    config = finished_run(tmp_path / "run", **MODEL)
    (line,) = uploaded(config)
    files = hub.files["models/me/adder"]
    assert {name: files[name] for name in files if name != "README.md"} == model_files(tmp_path / "run")
    assert b'from_pretrained("me/adder")' in files["README.md"]
    assert (hub.commits, hub.private) == (["models/me/adder"], {"models/me/adder": True})
    assert line.startswith("The model is at http://127.0.0.1")
    assert line.endswith("/me/adder")
    assert not (tmp_path / "run/.hub").exists()


def test_a_dataset_is_the_kept_trajectories_with_their_outcomes(hub, tmp_path):
    uploaded(finished_run(tmp_path / "run", **BOTH))
    files = hub.files["datasets/team/kept"]
    assert files.keys() == {"README.md", "train.jsonl"}
    rows = [json.loads(line) for line in files["train.jsonl"].splitlines()]
    assert [row["id"] for row in rows] == list(KEPT)
    outcomes = [[row[name] for name in ("reward", "success", "decision", "round", "pass_rate")] for row in rows]
    assert outcomes == [[1.0, "yes", "kept", 1, 0.5], [1.0, "yes", "kept", 1, 1.0]]
    assert all(row.keys() <= FIELDS.keys() for row in rows)


def test_a_run_that_kept_nothing_has_no_dataset(hub, tmp_path):
    config = finished_run(tmp_path / "run", kept=(), **{**BOTH, "hub_model_id": None})
    assert uploaded(config) == ["No trajectory was kept, so there is no dataset to upload"]
    assert not hub.commits


def test_an_adapter_is_uploaded_with_a_base_that_others_have(hub, tmp_path):
    uploaded(finished_run(tmp_path / "run", adapter=True, use_peft=True, **MODEL))
    files = hub.files["models/me/adder"]
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= files.keys()
    assert json.loads(files["adapter_config.json"]) == {"base_model_name_or_path": "bcft:tiny-math", "r": 2}
    assert "bcft/assets" in (tmp_path / "run/best/adapter_config.json").read_text()


def test_nothing_is_uploaded_twice_and_what_is_missing_is(hub, tmp_path):
    config = finished_run(tmp_path / "run", **MODEL)
    uploaded(config)
    assert uploaded(config) == []
    uploaded(asking(config, **BOTH))
    uploaded(asking(config, **{**BOTH, "hub_model_id": "team/adder", "hub_private_repo": False}))
    assert hub.commits == ["models/me/adder", "datasets/team/kept", "models/team/adder"]
    assert hub.private == {"models/me/adder": True, "datasets/team/kept": True, "models/team/adder": False}
    manifest = tmp_path / "run/manifest.json"
    manifest.write_text(manifest.read_text() + "\n")  # as after more rounds
    uploaded(config)
    assert hub.commits[3:] == ["models/me/adder"]


def test_a_run_that_is_uploaded_needs_no_hub_any_more(hub, tmp_path, monkeypatch):
    config = finished_run(tmp_path / "run", **MODEL)
    uploaded(config)
    monkeypatch.delenv("HF_TOKEN")
    hub.asked.clear()
    checked(config, finished=True)
    assert uploaded(config) == []
    assert not hub.asked
    with pytest.raises(UsageError, match="there is no token"):
        checked(config)  # more rounds


def test_nothing_of_the_machine_is_uploaded(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "canary")
    keys = {"reward_args": {"path": str(tmp_path / "r.txt"), "api_key": "canary"}, "against": str(tmp_path / "other")}
    uploaded(finished_run(tmp_path / "run", adapter=True, use_peft=True, **keys, **BOTH))
    everything = b"\n".join(content for files in hub.files.values() for content in files.values())
    for private in (str(tmp_path), "/tmp", TOKEN, "canary", "/bcft/assets"):
        assert private.encode() not in everything, private
    assert TOKEN not in "".join(file.read_text(errors="replace") for file in (tmp_path / "run").rglob("*.json"))


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


def test_the_cards_are_read_by_the_hubs_library_and_name_their_sources(hub, tmp_path):
    path = tmp_path / "run"
    uploaded(finished_run(path, **BOTH))
    model, data = (hub.files[name]["README.md"].decode() for name in ("models/me/adder", "datasets/team/kept"))
    ModelCard(model).validate()
    DatasetCard(data).validate()
    about = ModelCard(model).data
    assert {result.metric_type: result.metric_value for result in about.eval_results} == {
        "accuracy": 0.5, "pass@1": 0.625,
    }  # fmt: skip
    versions, manifest = read_json(path / "versions.json"), read_json(path / "round_001/manifest.json")
    rejected = "Kept 2; rejected: 1 failed, 1 duplicate."
    for said in ("bcft:tiny-math", "bcft:arithmetic", "## Limits", "keep_quantile", rejected, versions["data"]):
        assert said in model, said
    kept = manifest["files"]["kept.jsonl"][:16]
    for said in (versions["data"], versions["functions"][0], manifest["tokenizer"], kept):
        assert said in data, said
    assert all(f"| `{column}` |" in data for column in FIELDS)


def test_the_card_beside_the_model_is_written_once_unless_the_run_went_on(tmp_path):
    finished_run(tmp_path / "run")
    card = tmp_path / "run/best/README.md"
    write_card(tmp_path / "run", against=None, anew=False)
    assert f'from_pretrained("{card.parent}")' in card.read_text()
    card.write_text("own words")
    write_card(tmp_path / "run", against=None, anew=False)
    assert card.read_text() == "own words"
    write_card(tmp_path / "run", against=None, anew=True)
    assert card.read_text() != "own words"


def test_a_control_stands_beside_the_model(tmp_path):
    finished_run(tmp_path / "run")
    finished_run(tmp_path / "control", control="random")
    write_card(tmp_path / "run", against=tmp_path / "control", anew=True)
    card = (tmp_path / "run/best/README.md").read_text()
    assert "| solved, greedy | 50.0 % [15.0, 85.0] | 50.0 % [15.0, 85.0] | 50.0 % [15.0, 85.0] |" in card
    assert "| base | best | random control |" in card


# What goes wrong


@pytest.mark.parametrize(
    ("at", "fault", "said"),
    [
        ("/commit/", 403, "the Hub answers 403: the token may not write there"),
        ("/commit/", 500, "the Hub answers 500"),
        ("/preupload/", 0, "the Hub does not answer"),
        ("/repos/create", 0, "the Hub does not answer"),
        ("/repos/create", 413, "the Hub answers 413"),
        ("/validate-yaml", 400, "Invalid metadata in README.md"),
    ],
)
def test_a_failed_upload_loses_nothing_and_the_same_command_repeats_it(hub, tmp_path, at, fault, said):
    config = finished_run(tmp_path / "run", **MODEL)
    hub.faults[at] = fault
    with pytest.raises(ServerError, match="nothing is lost; the same command") as caught:
        uploaded(config)
    assert said in str(caught.value)
    assert str(caught.value).endswith(f"and no more: {config.command_line}")
    assert len(str(caught.value).splitlines()) == 1
    assert TOKEN not in str(caught.value)
    assert not (tmp_path / "run" / PUSHED).exists()
    hub.faults.clear()
    uploaded(config)
    assert hub.commits == ["models/me/adder"]


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
def test_what_the_hub_would_not_take_is_refused_before_the_run(hub, monkeypatch, given, value, said):
    if given == "token":
        monkeypatch.delenv("HF_TOKEN")
    elif given == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value)
    else:
        setattr(hub, given, value)
    refused(hub, MODEL, said)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({**MODEL, "hub_model_id": "other/x"}, "which are me, team"),
        ({**MODEL, "hub_model_id": "x"}, "wants owner/name, not 'x'"),
        ({"push_to_hub": True}, "needs hub_model_id"),
        ({"hub_model_id": "me/x"}, "no effect without push_to_hub: true"),
        ({**MODEL, "hub_token": TOKEN}, "set HF_TOKEN in the environment instead"),
        ({**MODEL, "hub_strategy": "end"}, "uploaded once"),
        ({**MODEL, "model_name_or_path": ".", "use_peft": True}, "is on this machine alone"),
    ],
)
def test_keys_that_name_no_place_of_ones_own_are_refused_before_the_run(hub, keys, said):
    refused(hub, keys, said)


def refused(hub, keys, said):
    """Check a run, which must be refused in one line, before anything is written to the Hub."""
    given = {"model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "output_dir": "nowhere"}
    with pytest.raises(UsageError) as caught:
        checked(load("filtered", None, given | keys))
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert TOKEN not in str(caught.value)
    assert not any("create" in line or "commit" in line for line in hub.asked)


def test_the_keys_of_sharing_are_in_no_file_of_a_run():
    given = {"model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic"}
    assert load("filtered", None, given | BOTH).resolved == load("filtered", None, given).resolved
