"""What a command line can do, Python can: a dict as recipe, rows, functions, flags; each recorded, each refused."""

import os
import signal

import pandas
import pytest
import torch
import yaml
from helpers.runs import TINY as ROUNDS
from helpers.runs import interrupted

from bcft import collect, evaluate, filtered, preview, refilter, sft
from bcft.algorithms import filtered_bc
from bcft.errors import DataError, UsageError
from bcft.rewards.base import name_of
from bcft.runs.storage import read_json
from bcft.selection.scoring import Scorer

SHORT = {"eval_test_problems": 4, "eval_test_samples": 2, "eval_dev_problems": 4, "max_completion_length": 8}
TINY = SHORT | {
    "model_name_or_path": "bcft:tiny-init", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:32]",
    "max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no",
}  # fmt: skip
ROUND = ROUNDS | {"num_rounds": 1}
ROWS = [
    {"prompt": f"Work out {a} + {b}.", "completion": f"{a}+{b}={a + b}: {a + b}\n#### {a + b}", "answer": str(a + b)}
    for a in range(10)
    for b in range(8)
]


def given(keys, *left_out):
    return {key: value for key, value in keys.items() if key not in left_out}


OWN_ROWS = given(TINY, "dataset_name", "dataset_train_split")

# Recipes


@pytest.mark.slow
def test_a_dict_is_a_recipe_as_a_file_is(tmp_path):
    keys = TINY | {"preview_rows": 2}  # a file may hold keys of other commands, and so may a dict
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    one = sft.run(keys, output_dir=tmp_path / "dict", seed=7)
    two = sft.run(tmp_path / "recipe.yaml", output_dir=tmp_path / "file", seed=7)
    assert one["final"] == two["final"]
    recorded = [yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in ("dict", "file")]
    assert recorded[0] | {"output_dir": ""} == recorded[1] | {"output_dir": ""}
    assert recorded[0]["seed"] == 7


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ({"learning_rte": 1}, "recipe: learning_rte: unknown key; did you mean learning_rate?"),
        (TINY | {"seed": -1}, "recipe: seed: wants an integer >= 0 and < 4294967296, not -1"),
        (TINY | {"seed": "x"}, "recipe: seed: wants"),
        (given(TINY, "model_name_or_path"), "recipe: model_name_or_path: required"),
        (TINY | {7: 1}, "recipe: 7: a key is a word"),
        (TINY | {"quiet": True}, "recipe: quiet: a flag, not a key"),
        ({"dataset_name": "bcft:arithmetic"}, "recipe: model_name_or_path: required"),
        ([("seed", 1)], "recipe: wants the path of a file or a dict of keys, not [('seed', 1)]"),
        (7, "recipe: wants the path of a file or a dict of keys, not 7"),
        ("no/such.yaml", "no/such.yaml: no such recipe file"),
        (None, "command line: model_name_or_path: required"),
    ],
)
def test_a_recipe_that_is_none_is_refused_with_its_place(recipe, named):
    for module in (sft, filtered, evaluate, collect):
        with pytest.raises(UsageError) as caught:
            module.run(recipe)
        assert named in str(caught.value)


def test_a_key_of_another_command_is_refused_where_the_caller_gives_it():
    with pytest.raises(UsageError, match="override: num_rounds: not used here; it is a key of bcft filtered"):
        sft.run(TINY, num_rounds=3)


# Flags


def test_refilter_takes_a_dict_and_quiet(tmp_path, capsys):
    keys = ROUND | {"prompts_per_round": 4, "keep_quantile": 0.0, "require_success": "false"}
    collect.run(keys, output_dir=tmp_path / "run", quiet=True)
    capsys.readouterr()
    keys |= {"rollouts": str(tmp_path / "run")}
    quiet = refilter.run(keys, output_dir=tmp_path / "quiet", quiet=True)
    assert "rollouts: " not in capsys.readouterr().out
    assert refilter.run(keys, output_dir=tmp_path / "loud")["selection"] == quiet["selection"]
    assert "rollouts: " in capsys.readouterr().out


@pytest.mark.slow
def test_quiet_prints_the_conclusion_only(tmp_path, capsys):
    metrics = sft.run(TINY, output_dir=tmp_path, quiet=True)
    assert capsys.readouterr().out.strip() == metrics["conclusion"]


@pytest.mark.parametrize(("module", "keys"), [(sft, TINY), (filtered, ROUND)])
def test_a_dry_run_prints_what_the_flag_prints_and_returns_nothing(tmp_path, capsys, monkeypatch, module, keys):
    monkeypatch.chdir(tmp_path)
    assert module.run(keys, dry_run=True) == {}
    printed = capsys.readouterr().out
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(keys))
    before = signal.getsignal(signal.SIGTERM)
    assert module.main(["recipe.yaml", "--dry-run"]) == 0
    signal.signal(signal.SIGTERM, before)
    assert printed.splitlines()[:-1] == capsys.readouterr().out.splitlines()[:-1]
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_a_dry_run_takes_functions_environments_and_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = given(ROUND, "dataset_name", "dataset_train_split")
    assert filtered.run(keys, reward_funcs=short, success_func="", train_dataset=ROWS, dry_run=True) == {}
    assert "problems to attempt" in capsys.readouterr().out
    with pytest.raises(DataError, match="train_dataset row 3: expected a mapping"):
        sft.run(OWN_ROWS, train_dataset=[*ROWS[:3], "x"], dry_run=True)
    with pytest.raises(UsageError, match="success_func"):
        filtered.run(ROUND, reward_funcs=[short, long], dry_run=True)
    with pytest.raises(UsageError, match="environment"):
        filtered.run(ROUND, environment=7, dry_run=True)
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_a_function_that_was_changed_goes_on_with_allow_drift(tmp_path, monkeypatch):
    def mine(completions, **_):
        return [-float(len(text)) for text in completions]

    keys = ROUND | {"output_dir": str(tmp_path), "success_func": ""}
    interrupted(
        monkeypatch,
        tmp_path,
        filtered_bc,
        "score_round",
        when="before",
        **ROUND | {"reward_funcs": mine, "success_func": ""},
    )

    def mine(completions, **_):  # as a notebook's cell, corrected
        return [float(len(text)) for text in completions]

    with pytest.raises(UsageError, match=r"another recipe \(reward_funcs was"):
        filtered.run(keys, reward_funcs=mine)
    assert filtered.run(keys, reward_funcs=mine, allow_drift=True)["rounds"] == 1


# Rows


def one_by_one(rows):
    yield from rows


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Dataset", "list", "generator", "tuple"])
def test_rows_of_any_kind_train_as_a_file_of_them_does(tmp_path, kind, jsonl):
    import datasets

    rows = {"Dataset": datasets.Dataset.from_list, "list": list, "generator": one_by_one, "tuple": tuple}[kind](ROWS)
    metrics = sft.run(OWN_ROWS, train_dataset=rows, output_dir=tmp_path / "rows")
    assert metrics["final"] == jsonl["final"]
    recorded = yaml.safe_load((tmp_path / "rows" / "config.yaml").read_text())
    assert recorded["dataset_name"].startswith("train_dataset@")


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory):
    """Return the metrics of a run on a file with the same rows."""
    from helpers.tiny import write_jsonl

    path = tmp_path_factory.mktemp("jsonl")
    return sft.run(OWN_ROWS, dataset_name=write_jsonl(path / "rows.jsonl", ROWS), output_dir=path / "run")


def test_a_run_is_resumed_with_the_same_rows_only(tmp_path):
    first = sft.run(OWN_ROWS, train_dataset=ROWS, output_dir=tmp_path)
    assert sft.run(OWN_ROWS, train_dataset=list(ROWS), output_dir=tmp_path) == first
    changed = [*ROWS[:-1], ROWS[-1] | {"completion": "#### 0"}]
    with pytest.raises(UsageError, match="dataset_name was 'train_dataset@"):
        sft.run(OWN_ROWS, train_dataset=changed, output_dir=tmp_path)


@pytest.mark.slow
def test_rows_take_the_place_of_the_recipes_dataset_whole(tmp_path):
    """The slice in the recipe is of its own dataset: nothing of the rows is left out."""
    sft.run(TINY | {"dataset_train_split": "train[:3]"}, train_dataset=ROWS, output_dir=tmp_path)
    metrics = read_json(tmp_path / "metrics.json")
    assert metrics["train"]["rows"] > 40
    with pytest.raises(UsageError, match="override: dataset_test_split: has no effect with train_dataset"):
        sft.run(TINY, train_dataset=ROWS, dataset_test_split="test", output_dir=tmp_path)


@pytest.mark.parametrize("split", ["nosuch[:5]", "nosuch", "test[:5]", "train_sft[2:]", "Train"])
def test_the_name_of_a_split_beside_rows_is_train_or_refused(split):
    for module in (sft, filtered, evaluate, collect, preview):
        with pytest.raises(UsageError, match=r"override: dataset_train_split: .* has no effect with train_dataset"):
            module.run(given(ROUND, "dataset_train_split"), train_dataset=ROWS, dataset_train_split=split)
    own = preview.run(OWN_ROWS, train_dataset=ROWS, dataset_train_split="train[10:]", preview_rows=1)
    assert int(own[0]["where"].removeprefix("train_dataset row ")) >= 10


def test_a_preview_of_rows_is_that_of_a_file_of_them(tmp_path):
    from helpers.tiny import write_jsonl

    rows = preview.run(OWN_ROWS, train_dataset=ROWS, preview_rows=3)
    of_file = preview.run(OWN_ROWS, dataset_name=write_jsonl(tmp_path / "rows.jsonl", ROWS), preview_rows=3)
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in of_file]
    assert rows[0]["where"].startswith("train_dataset row ")


@pytest.mark.parametrize(
    ("rows", "kind", "named"),
    [
        ("rows.jsonl", UsageError, "dataset_name takes a file"),
        ({"train": ROWS}, UsageError, "a dict of train: give one split"),
        (7, UsageError, "wants a datasets.Dataset or a list of dicts, not 7"),
        (pandas.DataFrame(ROWS), UsageError, "a pandas DataFrame: give datasets.Dataset.from_pandas(df)"),
        (pandas.Series(["a"]), UsageError, "a pandas Series: give datasets.Dataset.from_pandas(df)"),
        ([], DataError, "train_dataset: no rows"),
        ([["a", "b"]], DataError, "train_dataset row 0: expected a mapping from columns to values, not ['a', 'b']"),
        ([ROWS[0], None], DataError, "train_dataset row 1: expected a mapping from columns to values, not None"),
        ([*ROWS, {"prompt": 7, "completion": "x"}], DataError, "train_dataset row 80"),
    ],
)
@pytest.mark.parametrize("module", [sft, filtered])
def test_what_are_no_rows_is_refused_with_its_place(tmp_path, module, rows, kind, named):
    keys = OWN_ROWS if module is sft else given(ROUND, "dataset_name", "dataset_train_split")
    with pytest.raises(kind) as caught:
        module.run(keys, train_dataset=rows, output_dir=tmp_path / "run")
    assert named in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_prompts_without_completions_are_rows_of_rounds_and_evaluations(tmp_path):
    rows = [{"prompt": row["prompt"], "answer": row["answer"]} for row in ROWS]
    keys = given(ROUND, "dataset_name", "dataset_train_split")
    assert filtered.run(keys, train_dataset=rows, output_dir=tmp_path / "rounds")["rounds"] == 1
    asked = SHORT | {"model_name_or_path": "bcft:tiny-math"}
    found = evaluate.run(
        given(asked, "eval_dev_samples"), train_dataset=rows, output_dir=tmp_path / "evaluate", quiet=True
    )
    assert found["model"]["n"] == 4
    with pytest.raises(DataError, match="train_dataset row 0"):
        sft.run(OWN_ROWS, train_dataset=rows, output_dir=tmp_path / "sft")


# Reward functions


def short(completions, **_):
    return [-float(len(text)) for text in completions]


def long(completions, **_):
    return [float(len(text)) for text in completions]


MATH = "bcft.rewards.math_reward"


@pytest.mark.parametrize(
    ("functions", "success", "recorded", "scored"),
    [
        (short, "", ["test_python.short@"], ["short"]),
        ([short, long], "", ["test_python.short@", "test_python.long@"], ["short", "long"]),
        ([MATH, short], MATH, [MATH, "test_python.short@"], ["math_reward", "short"]),
        ((short, MATH), "math_reward", ["test_python.short@", MATH], ["short", "math_reward"]),
        (MATH, None, [MATH], ["math_reward"]),
        ([MATH], None, [MATH], ["math_reward"]),
    ],
)
def test_one_function_or_several_as_objects_or_names(monkeypatch, functions, success, recorded, scored):
    seen = {}

    def report(config, *_, **__):
        return seen.setdefault("recorded", config.resolved["reward_funcs"])

    def of(*arguments, whole=Scorer.of, **keys):
        return seen.setdefault("scorer", whole(*arguments, **keys))

    monkeypatch.setattr(filtered, "run_or_report", report)
    monkeypatch.setattr(filtered.Scorer, "of", of)
    filtered.run(ROUND, reward_funcs=functions, success_func=success)
    assert all(part in name for part, name in zip(recorded, seen["recorded"], strict=True))
    assert [name_of(function) for function in seen["scorer"].functions] == scored


@pytest.mark.parametrize("functions", [7, [short, 7], {"f": short}, ["nowhere.f", short], "nowhere.f"])
def test_what_is_no_function_is_refused_by_key(tmp_path, functions):
    with pytest.raises(UsageError, match="reward_funcs"):
        filtered.run(ROUND, reward_funcs=functions, success_func="", output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The process that embeds a run


def test_the_number_of_threads_does_not_outlive_a_run(tmp_path):
    """The embedded model runs on one thread."""
    before, threads = torch.get_num_threads(), 3
    torch.set_num_threads(threads)
    try:
        one = {"eval_test_problems": 1, "eval_test_samples": 1, "eval_dev_problems": 0}
        sft.run(TINY, output_dir=tmp_path / "sft", **one)
        assert torch.get_num_threads() == threads
        evaluate.run(one, model_name_or_path="bcft:tiny-math", dataset_name="bcft:arithmetic", output_dir=tmp_path)
        assert torch.get_num_threads() == threads
        with pytest.raises(UsageError):
            sft.run(TINY, eval_strategy="epoch", eval_dev_problems=0, output_dir=tmp_path / "refused")
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


# A small dataset, of which more is held out when more is asked for


def test_problems_that_a_run_trained_on_are_not_evaluated(tmp_path):
    keys = OWN_ROWS | {"eval_test_problems": 4, "eval_dev_problems": 2, "output_dir": str(tmp_path)}
    sft.run(keys, train_dataset=ROWS)
    asked = {"model_name_or_path": str(tmp_path), "eval_test_samples": 1, "max_completion_length": 8}
    asked |= {"output_dir": str(tmp_path / "again")}
    with pytest.raises(UsageError, match=r"eval_test_problems: .* were training problems of .* eval_test_problems: 4"):
        evaluate.run(asked, train_dataset=ROWS, eval_dev_problems=2, eval_test_problems=16)
    with pytest.raises(UsageError, match="were training problems"):
        evaluate.run(asked | {"model_name_or_path": "bcft:tiny-init"}, against=str(tmp_path), train_dataset=ROWS)
    found = evaluate.run(asked, train_dataset=ROWS, eval_dev_problems=2, eval_test_problems=3)
    assert found["model"]["n"] == 3
