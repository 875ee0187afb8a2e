"""What can be refused without weights is refused before any are loaded: one fault for each check, in every command."""

import json
import shutil
import signal
from collections import namedtuple

import pytest
from helpers.hub import GATED, NO_REPOSITORY, NO_REVISION, local_hub
from helpers.tiny import llama_tokenizer, save_llama, write_jsonl

from bcft import collect, evaluate, filtered, sft
from bcft.policy import loading

ROWS = [
    {"question": f"What is {a} plus {b}?", "answer": f"{a} + {b} = {a + b}\n#### {a + b}"}
    for a in range(2, 12)
    for b in range(2, 12)
]
MAIN = {
    "sft": (sft.main, ["eval_test_samples=2"]),
    "filtered": (filtered.main, ["num_rounds=1", "prompts_per_round=2", "eval_test_samples=2"]),
    "evaluate": (evaluate.main, ["eval_test_samples=2"]),
    "collect": (collect.main, ["prompts_per_round=2"]),
    "sft --dry-run": (sft.main, ["--dry-run", "eval_test_samples=2"]),
    "filtered --dry-run": (filtered.main, ["--dry-run", "eval_test_samples=2"]),
}
EVERY = tuple(MAIN)
TRAINING = tuple(name for name in MAIN if name.startswith(("sft", "filtered")))
SFT = tuple(name for name in MAIN if name.startswith("sft"))
ROUNDS = tuple(name for name in MAIN if name.startswith("filtered"))
PLAYING = tuple(name for name in MAIN if not name.startswith("sft"))


class Loaded(BaseException):
    """Weights were about to be loaded."""


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Return a directory with a tiny model, `model`, and rows for it, `rows.jsonl`."""
    path = tmp_path_factory.mktemp("good")
    save_llama(path / "model", llama_tokenizer([row["question"] + row["answer"] for row in ROWS], vocabulary=320))
    write_jsonl(path / "rows.jsonl", ROWS)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch, good):
    """Work in a directory with a copy of the model and the rows."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here, monkeypatch, capsys):
    """Return a function that runs a command with more keys; it returns exit code, error lines and loads."""
    assert (here / "model").is_dir()
    loads = []

    def load_model(name, *_, **__):
        loads.append(name)
        raise Loaded

    monkeypatch.setattr(loading, "load_model", load_model)
    before = signal.getsignal(signal.SIGTERM)

    def run_command(command, *tokens):
        main, own = MAIN[command]
        keys = {"model_name_or_path": "model", "dataset_name": "rows.jsonl", "output_dir": "run"}
        keys |= dict(token.split("=", 1) for token in (*own, *tokens) if "=" in token)
        given = [f"{key}={value}" for key, value in keys.items()]
        code = main([*given, *(token for token in own if "=" not in token)])
        return code, capsys.readouterr().err.splitlines(), len(loads)

    yield run_command
    signal.signal(signal.SIGTERM, before)


# Damage to the model's directory and to the rows


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def damaged_tokenizer(here):
    (here / "model" / "tokenizer.json").write_text("{")


def missing_tokenizer(here):
    for file in (here / "model").glob("*token*"):
        file.unlink()
    (here / "model" / "special.txt").touch()


def template_without_stop(here):
    (here / "template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def broken_template(here):
    (here / "template.jinja").write_text("{% for m in messages %}{{ m['content'] }}")


def damaged_generation_config(here):
    (here / "model" / "generation_config.json").write_text("{")


def impossible_shape(here):
    edit(here / "model" / "config.json", hidden_size=30)


def too_few_embeddings(here):
    config = json.loads((here / "model" / "config.json").read_text())
    edit(here / "model" / "config.json", vocab_size=config["vocab_size"] - 2)


def unknown_architecture(here):
    edit(here / "model" / "config.json", model_type="no_such_model")


def without_a_cache(here):
    config = {"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320, "state_size": 4}
    (here / "model" / "config.json").write_text(json.dumps(config | {"architectures": ["MambaForCausalLM"]}))


def pickled(here):
    (here / "model" / "model.safetensors").rename(here / "model" / "pytorch_model.bin")


def malformed_row(here):
    write_jsonl(here / "rows.jsonl", [*ROWS[:4], {"question": 7, "answer": "1"}, *ROWS[4:]])


def contradictory_rows(here):
    write_jsonl(here / "rows.jsonl", [*ROWS, ROWS[0] | {"answer": "#### 5"}])


def rendered_prompts(here):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(here / "model")
    for_model = [
        {
            "prompt": tokenizer.apply_chat_template([{"role": "user", "content": row["question"]}], tokenize=False),
            "completion": row["answer"],
        }
        for row in ROWS
    ]
    write_jsonl(here / "rows.jsonl", [row | {"answer": "4"} for row in for_model])


def with_stop(here, rows):
    """Return rows whose answers end in the letters of the model's stop token."""
    from transformers import AutoTokenizer

    stop = AutoTokenizer.from_pretrained(here / "model").eos_token
    return [row | {"answer": row["answer"] + stop} for row in rows]


def spelled_stops(here):
    write_jsonl(here / "spelled.jsonl", with_stop(here, ROWS))


def spelled_stops_held_out(here):
    (here / "split").mkdir()
    write_jsonl(here / "split" / "train.jsonl", ROWS)
    held_out = [{"question": f"How many are {n}?", "answer": f"#### {n}"} for n in range(4)]
    write_jsonl(here / "split" / "test.jsonl", with_stop(here, held_out))


def two_functions(here):
    (here / "mine.py").write_text("def f(completions, **_): return [1.0 for _ in completions]\ng = f\n")


def raising_module(here):
    (here / "mine_raises.py").write_text("raise RuntimeError('no licence')\n")


def adapter_with_a_lost_base(here):
    (here / "adapter").mkdir()
    own = {"base_model_name_or_path": "/moved/away/base", "peft_type": "LORA", "r": 4}
    (here / "adapter" / "adapter_config.json").write_text(json.dumps(own))


def nothing(_):
    """Leave the files alone: the fault is a key."""


FAULTS = {
    "configuration: unknown key": (nothing, ["seeed=1"], 2, "seeed", EVERY),
    "configuration: value": (nothing, ["temperature=hot"], 2, "temperature", EVERY),
    "configuration: seed": (nothing, ["seed=4294967296"], 2, "seed", EVERY),
    "configuration: without effect": (nothing, ["max_turns=3"], 2, "max_turns", EVERY),
    "configuration: scheduler": (nothing, ["lr_scheduler_type=cosin"], 2, "lr_scheduler_type", TRAINING),
    "data: no file": (nothing, ["dataset_name=no.jsonl"], 3, "no.jsonl", EVERY),
    "data: no split": (nothing, ["dataset_test_split=dev"], 3, "dataset_test_split", EVERY),
    "data: row": (malformed_row, [], 3, "rows.jsonl:5", EVERY),
    "data: contradiction": (contradictory_rows, [], 3, "rows.jsonl:101", PLAYING),
    "data: rendered prompts": (rendered_prompts, [], 3, "rows.jsonl:", EVERY),
    "data: stop tokens": (spelled_stops, ["dataset_name=spelled.jsonl"], 3, "spelled.jsonl:", SFT),
    "data: stop tokens, held out": (spelled_stops_held_out, ["dataset_name=split"], 3, "test.jsonl:", SFT),
    "data: no row fits": (nothing, ["max_length=3"], 3, "max_length", SFT),
    "data: too long": (nothing, ["max_length=3", "overlength=raise"], 3, "rows.jsonl:", SFT),
    "data: no dev rows": (nothing, ["eval_strategy=epoch", "eval_dev_problems=0"], 2, "eval_strategy", SFT),
    "replay: stop tokens": (spelled_stops, ["replay_dataset=spelled.jsonl"], 3, "spelled.jsonl:", ROUNDS),
    "replay: no row fits": (nothing, ["replay_dataset=rows.jsonl", "max_length=3"], 3, "max_length", ROUNDS),
    "against": (nothing, ["against=nowhere"], 2, "nowhere", ROUNDS),
    "reward: no module": (nothing, ['reward_funcs=["nowhere.f"]'], 2, "reward_funcs", EVERY),
    "reward: no function": (nothing, ["success_func=bcft.rewards.nothing"], 2, "success_func", EVERY),
    "reward: no number": (nothing, ["reward_weights=[1, 2]"], 2, "reward_weights", EVERY),
    "reward: import raises": (raising_module, ['reward_funcs=["mine_raises.f"]'], 2, "reward_funcs", EVERY),
    "reward: who decides": (two_functions, ['reward_funcs=["mine.f", "mine.g"]'], 2, "success_func", EVERY),
    "environment: no module": (nothing, ["environment=nowhere.E"], 2, "environment", EVERY),
    "environment: no class": (nothing, ["environment=bcft.environments.grid_walk.Grd"], 2, "environment", EVERY),
    "environment: none": (nothing, ["environment=math.pi"], 2, "environment", EVERY),
    "environment: arguments": (
        nothing, ["environment=bcft.environments.grid_walk.GridWalk", "environment_args={sise: 3}"],
        2, "environment_args", EVERY,
    ),
    "tokenizer: damaged": (damaged_tokenizer, [], 2, "model_name_or_path", EVERY),
    "tokenizer: eos": (nothing, ["eos_token=<no_such>"], 2, "eos_token", EVERY),
    "template: no file": (nothing, ["chat_template_path=no.jinja"], 2, "chat_template_path", EVERY),
    "template: broken": (broken_template, ["chat_template_path=template.jinja"], (2, 3), "template", EVERY),
    "template: no stop token": (template_without_stop, ["chat_template_path=template.jinja"], 3, "stop", EVERY),
    "generation config": (damaged_generation_config, [], 2, "generation_config.json", EVERY),
    "model: shape": (impossible_shape, [], 2, "model_name_or_path", EVERY),
    "model: embeddings": (too_few_embeddings, [], 2, "embeddings", EVERY),
    "model: architecture": (unknown_architecture, [], 2, "model_name_or_path", EVERY),
    "model: cache": (without_a_cache, [], 2, "mamba", EVERY),
    "model: no such directory": (nothing, ["model_name_or_path=./nowhere"], 2, "model_name_or_path", EVERY),
    "model: pickle": (pickled, [], 3, "pytorch_model.bin", EVERY),
    "model: dtype": (nothing, ["dtype=bfloat16"], 2, "dtype", TRAINING),
    "model: 4 bits": (nothing, ["load_in_4bit=true"], 2, "load_in_4bit", TRAINING),
    "adapter: targets": (
        nothing, ["use_peft=true", "lora_target_modules=[no_such]"], 2, "lora_target_modules", TRAINING,
    ),
    "adapter: saved": (
        nothing, ["use_peft=true", "lora_modules_to_save=[no_such]"], 2, "lora_modules_to_save", TRAINING,
    ),
    "adapter: base": (adapter_with_a_lost_base, ["model_name_or_path=adapter"], 2, "/moved/away/base", EVERY),
    "tracker": (nothing, ["report_to=mlflow"], 2, "report_to", TRAINING),
    "scheduler": (nothing, ["lr_scheduler_type=cosine_with_min_lr"], 2, "lr_scheduler_type", TRAINING),
    "scheduler: arguments": (
        nothing, ["lr_scheduler_type=constant", "lr_scheduler_kwargs={a: 1}"], 2, "lr_scheduler_kwargs", TRAINING,
    ),
    "optimizer": (nothing, ["optim=galore_adamw"], 2, "optim", TRAINING),
}  # fmt: skip
"""What is done to the files, keys, exit code, what the error names, and the commands that check it."""
CASES = [(fault, command) for fault, (*_, commands) in FAULTS.items() for command in commands]


@pytest.mark.parametrize(("fault", "command"), CASES)
def test_a_fault_is_refused_in_one_line_before_the_first_load(run, here, fault, command):
    damage, tokens, code, named, _ = FAULTS[fault]
    damage(here)
    ended, lines, loads = run(command, *tokens)
    assert ended in (code if isinstance(code, tuple) else (code,)), lines
    assert loads == 0
    assert len(lines) == 1, lines
    assert lines[0].startswith("bcft: error: ")
    assert named in lines[0]


@pytest.mark.parametrize("command", [name for name in MAIN if "--dry-run" not in name])
def test_without_a_fault_weights_are_loaded(run, command):
    """The tests above can fail: they are about commands that come that far."""
    with pytest.raises(Loaded):
        run(command)


@pytest.mark.parametrize("command", [name for name in MAIN if "--dry-run" in name])
def test_without_a_fault_a_dry_run_ends_and_loads_nothing(run, here, command):
    assert run(command) == (0, [], 0)
    assert not (here / "run").exists()


# The Hub

REFUSALS = {
    "401, gated": ((401, GATED), "HF_TOKEN"),
    "403, gated": ((403, GATED), "access"),
    "401, no repository": ((401, NO_REPOSITORY), "me/model"),
    "404": ((404, NO_REPOSITORY), "me/model"),
    "404, revision": ((404, NO_REVISION), "revision"),
}


@pytest.mark.parametrize("command", [name for name in MAIN if "--dry-run" not in name])
@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_the_hub_refuses_is_one_line_that_says_what_to_do(run, tmp_path, monkeypatch, refusal, command):
    answer, named = REFUSALS[refusal]
    with local_hub(monkeypatch, tmp_path / "cache", refused={"me/model": answer}):
        ended, lines, loads = run(command, "model_name_or_path=me/model")
    assert (ended, loads, len(lines)) == (2, 0, 1), lines
    assert "me/model" in lines[0]
    assert named in lines[0]


# The disk


@pytest.mark.parametrize("command", TRAINING)
def test_a_disk_too_small_for_what_will_be_written_is_refused(run, monkeypatch, command):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    ended, lines, loads = run(command)
    assert (ended, loads, len(lines)) == (7, 0, 1), lines
    assert "output_dir" in lines[0]


@pytest.mark.parametrize("command", [*SFT, *ROUNDS])
def test_prompts_come_before_the_disk(run, here, monkeypatch, command):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    rendered_prompts(here)
    ended, lines, loads = run(command)
    assert (ended, loads, len(lines)) == (3, 0, 1), lines
    assert "rows.jsonl:" in lines[0]


# The order

ORDER = [
    ("seed", nothing, ["seed=-1"]),
    ("rows.jsonl:5", malformed_row, []),
    ("environment", nothing, ["environment=nowhere.E"]),
    ("report_to", nothing, ["report_to=mlflow"]),
    ("cannot load 'model'", damaged_tokenizer, []),
    ("generation_config.json", damaged_generation_config, []),
    ("mamba", without_a_cache, []),
]
"""Faults in the order in which they are found: what the error names, and how it is made."""


@pytest.mark.parametrize("first", range(len(ORDER)))
@pytest.mark.parametrize("command", ["filtered", "filtered --dry-run"])
def test_of_several_faults_the_cheapest_to_find_is_reported(run, here, command, first):
    named, *_ = ORDER[first]
    for _, damage, _ in ORDER[first:]:
        damage(here)
    ended, lines, loads = run(command, *(token for *_, tokens in ORDER[first:] for token in tokens))
    assert loads == 0
    assert ended
    assert named in lines[0]
