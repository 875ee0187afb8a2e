"""Trajectories leave as rows with their outcomes, and rows that others scored are selected from by these."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import load_dataset
from helpers.tiny import write_jsonl

from bcft import export, preview, refilter
from bcft.errors import DataError, FaultError, UsageError
from bcft.runs.storage import SCORES, read_json, read_jsonl, seal, write_manifest
from bcft.runs.storage import write_jsonl as write_rows
from bcft.selection.apply import apply_filter
from bcft.selection.filter import Rule
from bcft.selection.scoring import Score
from bcft.types import Problem, Trajectory, Turn, problem_id

KEYS = {"model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "success_func": ""}
USER, SYSTEM = {"role": "user", "content": "And now?"}, {"role": "system", "content": "Be brief."}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}


def said(action, n, *, observation=(), stop="stop_token", **more):
    """A turn whose ids say which attempt it is of."""
    return Turn(action, (1,), (2, n), stop, observation=tuple(observation), **more)


def single(n):
    return (said(f"{n % 3}", n % 3, stop="max_tokens" if n == 7 else "stop_token"),)


def several(n):
    return (said(f"first {n % 3}", n % 3, observation=[USER]), said("last", 9))


def with_tools(n):
    message = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "name": "look", "content": f"seen {n % 3}"}
    return (said("<call>", n % 3, observation=[result], message=message), said("done", 9, observation=[USER]))


SHAPES = {
    "texts": (lambda n: f"{n} + 1?", single, {}),
    "messages": (lambda n: [{"role": "user", "content": f"{n} + 1?"}], single, {}),
    "a system message": (lambda n: [SYSTEM, {"role": "user", "content": f"{n} + 1?"}], single, {}),
    "several turns": (lambda n: f"{n} + 1?", several, {}),
    "an environment's opening": (lambda n: f"{n} + 1?", several, {"opening": (USER,)}),
    "tools": (lambda n: f"{n} + 1?", with_tools, {"tools": (TOOL,)}),
}


def make_run(path, shape, *, rounds=2, rule=None):
    """Write a run of `filtered` with eight attempts at each of six problems a round, one failed and one ungraded."""
    prompt, turns, more = SHAPES[shape]
    problems = {}
    for n in range(6):
        identity = problem_id(prompt(n))
        problems[identity] = Problem(identity, prompt(n), {"answer": str(n)})
    rows = [{"problem_id": i, "prompt": p.prompt, **p.columns} for i, p in problems.items()]
    write_rows(path / "problems.jsonl", rows)
    source = {"dataset_name": "bcft:arithmetic", "dataset_config": None, "dataset_train_split": "train"}
    (path / "config.yaml").write_text(yaml.safe_dump({**source, "dataset_test_split": None, "environment": None}))
    for number in range(1, rounds + 1):
        place = path / f"round_{number:03d}"
        place.mkdir()
        scores = []
        for identity in problems:
            for n in range(8):
                failed = {"ended": "error", "error": "it broke"} if (identity, n) == (next(iter(problems)), 6) else {}
                played = Trajectory(number, identity, n, turns(n), **({"ended": "done", **more} | failed))
                graded = n != 5 and not failed
                reward = float(n % 3 + len(scores) % 2) if graded else 0.0
                known = ("yes" if reward >= 2 else "no") if graded else "unknown"
                scores.append(Score(played, (("r", reward if graded else None),), graded, reward, known))
        write_rows(place / "rollouts.jsonl", [score.trajectory.to_json() for score in scores])
        seal(place, "rollouts.jsonl")
        rule = rule or Rule(keep_quantile=0.5, round=number)
        apply_filter(scores, rule, problems, source="self", train_on="all_turns", check_steps=None).write(place)
    return path


def select(rollouts, output, **keys):
    return refilter.run(None, rollouts=str(rollouts), output_dir=str(output), quiet=True, **KEYS, **keys)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_say_what_was_said_and_how_it_ended_and_select_as_the_run_did(tmp_path, shape, monkeypatch):
    """The round trip: of a round's rows the same are kept, with the words that were sampled."""
    run = make_run(tmp_path / "run", shape)
    out = export.run(run, output_dir=tmp_path / "rows", to="dataset")
    rows = read_jsonl(out / "train.jsonl")
    assert len(rows) == 2 * 48
    by_id = {row["id"]: row for row in rows}
    for number in (1, 2):
        place = run / f"round_{number:03d}"
        played = [Trajectory.from_json(line) for line in read_jsonl(place / "rollouts.jsonl")]
        scores = {line["id"]: line for line in read_jsonl(place / SCORES)}
        for t in played:
            row, score = by_id[t.id], scores[t.id]
            assert row["messages"] == [*row["prompt"], *row["completion"]]
            assert [m["content"] for m in row["completion"]] == [m["content"] for m in t.messages]
            assert row["completion"][-1]["role"] == "assistant"
            assert {key: row[key] for key in ("reward", "graded", "success", "decision")} == {
                key: score[key] for key in ("reward", "graded", "success", "decision")
            }
            assert (row["is_truncated"], row["has_error"], row["round"]) == (t.truncated, t.ended == "error", number)
            assert row["stop_condition"] == ("error" if row["has_error"] else "max_tokens" if t.truncated else "done")
            outcomes = [scores[o.id]["success"] for o in played if o.problem_id == t.problem_id]
            known = [o for o in outcomes if o != "unknown"]
            assert row["pass_rate"] == known.count("yes") / len(known)
            assert ("tools" in row) == (shape == "tools")
        # The rows of one round alone, through the rule that the round had.
        mine = write_jsonl(tmp_path / f"round{number}.jsonl", [row for row in rows if row["round"] == number])
        select(mine, tmp_path / f"again{number}", keep_quantile=0.5)
        again = {line["id"]: line["decision"] for line in read_jsonl(tmp_path / f"again{number}" / SCORES)}
        assert again == {identity: line["decision"] for identity, line in scores.items()}
        kept = read_jsonl(tmp_path / f"again{number}" / "kept.jsonl")
        texts = [[m["content"] for m in row["completion"]] for row in kept]
        assert texts == [[m["content"] for m in row["completion"]] for row in read_jsonl(place / "kept.jsonl")]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert len(load_dataset(str(out), cache_dir=str(tmp_path / "cache"))["train"]) == len(rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_pairs_are_the_best_and_the_worst_attempt_of_a_problem_in_a_round(tmp_path, shape):
    run = make_run(tmp_path / "run", shape)
    out = export.run(run, output_dir=tmp_path / "pairs", to="pairs")
    rows = {(row["problem_id"], row["round"]): row for row in read_jsonl(out / "train.jsonl")}
    for number in (1, 2):
        place = run / f"round_{number:03d}"
        played = {line["id"]: Trajectory.from_json(line) for line in read_jsonl(place / "rollouts.jsonl")}
        scores = read_jsonl(place / SCORES)
        for identity in {t.problem_id for t in played.values()}:
            whole = [
                line
                for line in scores
                if played[line["id"]].problem_id == identity and line["graded"] and not played[line["id"]].truncated
            ]
            rewards = [line["reward"] for line in whole]
            row = rows.pop((identity, number))
            assert (row["chosen_reward"], row["rejected_reward"]) == (max(rewards), min(rewards))
            assert row["chosen_id"] == next(line["id"] for line in whole if line["reward"] == max(rewards))
            assert row["rejected_id"] == next(line["id"] for line in whole if line["reward"] == min(rewards))
            assert row["chosen"] == list(map(dict, played[row["chosen_id"]].messages))
            assert row["prompt"][-1]["role"] == "user"
    assert not rows


def test_openings_that_differ_make_no_pair_and_a_run_without_any_is_refused(tmp_path):
    run = make_run(tmp_path / "run", "texts", rounds=1)
    file = run / "round_001" / "rollouts.jsonl"
    lines = read_jsonl(file)
    for n, line in enumerate(lines):
        line["opening"] = [{"role": "user", "content": f"from {n}"}]
    write_rows(file, lines)
    seal(file.parent, file.name)
    with pytest.raises(UsageError, match="no problem has attempts with unequal rewards"):
        export.run(run, output_dir=tmp_path / "pairs", to="pairs")
    (run / "round_001" / SCORES).unlink()
    with pytest.raises(UsageError, match="no attempt is scored"):
        export.run(run, output_dir=tmp_path / "rows", to="dataset")
    with pytest.raises(UsageError, match=r"has no rollouts.jsonl"):
        export.run(tmp_path / "nothing", output_dir=tmp_path / "rows2", to="dataset")


def test_what_refilter_kept_leaves_with_its_own_decisions(tmp_path):
    run = make_run(tmp_path / "run", "texts")
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"rollouts": str(run)}
    again = tmp_path / "again"
    again.mkdir()
    (again / "config.yaml").write_text(yaml.safe_dump(config))
    scores = [line for n in (1, 2) for line in read_jsonl(run / f"round_{n:03d}" / SCORES)]
    write_rows(again / SCORES, [line | {"decision": "tie_break"} for line in scores])
    write_manifest(again, [again / SCORES], about={})
    out = export.run(again, output_dir=tmp_path / "rows", to="dataset")
    rows = read_jsonl(out / "train.jsonl")
    assert (len(rows), {row["decision"] for row in rows}) == (96, {"tie_break"})


# Rows of others

ROW = {"prompt": [{"role": "user", "content": "1 + 1?"}], "completion": [{"role": "assistant", "content": "2"}]}
LOG = [
    ROW | {"reward": 1.0, "answer": "2", "info": {"source": "a"}},
    ROW | {"completion": [{"role": "assistant", "content": "3"}, USER], "reward": 0.0, "answer": "2"},
    ROW | {"reward": 1, "answer": "2"},
    ROW | {"completion": [{"role": "assistant", "content": "two"}], "reward": 0.9, "is_truncated": True},
    ROW | {"completion": [], "reward": 0.0, "error": "timeout"},
    ROW | {"completion": [{"role": "assistant", "content": "II"}], "reward": None},
]
DECISIONS = ["kept", "below_cutoff", "duplicate", "truncated", "errored", "ungraded"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "json"])
def test_a_log_of_another_tool_is_selected_from_by_its_rewards_and_its_text_trains(tmp_path, suffix):
    log = [row | {"answer": row.get("answer", "2"), "info": None} for row in LOG]
    file = tmp_path / f"results.{suffix}"
    if suffix == "parquet":
        pq.write_table(
            pa.Table.from_pylist([{k: row.get(k) for k in {k for r in log for k in r}} for row in log]), file
        )
    elif suffix == "json":
        file.write_text(json.dumps(log))
    else:
        write_jsonl(file, log)
    many = write_jsonl(tmp_path / "more.jsonl", [ROW | {"reward": 0.5, "prompt": f"{n}?"} for n in range(40)])
    metrics = refilter.run(
        None, rollouts=[str(file), many], output_dir=str(tmp_path / "out"), keep_quantile=0.9, **KEYS
    )
    decisions = [line["decision"] for line in read_jsonl(tmp_path / "out" / SCORES)]
    assert decisions[: len(LOG)] == DECISIONS
    kept = read_jsonl(tmp_path / "out" / "kept.jsonl")
    assert kept[0]["completion"] == ROW["completion"]
    assert kept[0]["answer"] == "2"
    assert metrics["rollout"]["played"] == 46
    assert read_json(tmp_path / "out" / "manifest.json")["rollouts"] == [str(file), many]
    trained = preview.run({"model_name_or_path": "bcft:tiny-math", "dataset_name": str(tmp_path / "out")})
    assert "".join(t["text"] for t in trained[0]["tokens"] if t["label"] != -100).startswith("2")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "line 1: no column reward"),
        ({"reward": "high"}, "reward: expected a finite number or null, not 'high'"),
        ({"reward": True, "success": True}, None),
        ({"reward": 1.0, "success": "maybe"}, "success: expected true, false, yes, no or unknown"),
        ({"reward": 1.0, "round": -1}, "round: expected a whole number"),
        ({"reward": 1.0, "completion": []}, "no message of the assistant, and no error"),
        ({"reward": 1.0, "images": ["a.png"]}, "column 'images'"),
    ],
)
def test_a_row_that_cannot_be_selected_is_refused_by_its_place(tmp_path, row, message):
    file = write_jsonl(tmp_path / "log.jsonl", [ROW | row])
    if message is None:
        assert select(file, tmp_path / "out")["selection"]["kept"] == 1
        return
    with pytest.raises(DataError, match=rf"log\.jsonl:?1?.*{message.removeprefix('line 1: ')}"):
        select(file, tmp_path / "out")


def test_ids_twice_and_rows_beside_runs_and_mostly_errors_are_refused(tmp_path):
    rows = [ROW | {"reward": 1.0, "id": "a"}] * 2
    with pytest.raises(DataError, match="id 'a' is given twice"):
        select(write_jsonl(tmp_path / "twice.jsonl", rows), tmp_path / "out")
    run, log = make_run(tmp_path / "run", "texts", rounds=1), write_jsonl(tmp_path / "log.jsonl", rows[:1])
    with pytest.raises(UsageError, match="select from them apart"):
        refilter.run(None, rollouts=[log, str(run)], output_dir=str(tmp_path / "out"), quiet=True, **KEYS)
    broken = write_jsonl(tmp_path / "broken.jsonl", [ROW | {"reward": None, "has_error": True}] * 3)
    with pytest.raises(DataError, match=r"rollouts: .*nothing.parquet does not exist"):
        select(tmp_path / "nothing.parquet", tmp_path / "out")
    with pytest.raises(FaultError):
        select(broken, tmp_path / "out")


def test_what_openenv_collected_is_selected_by_its_reward(tmp_path):
    """The file is OpenEnv's own: tests/data/openenv/make.py wrote it with its CollectRunner."""
    file = Path(__file__).parents[1] / "data" / "openenv" / "results.jsonl"
    metrics = select(file, tmp_path / "out")
    assert (metrics["rollout"]["played"], metrics["selection"]["kept"]) == (12, 4)
    kept = read_jsonl(tmp_path / "out" / "kept.jsonl")
    assert [row["prompt"][0]["content"] for row in kept] == [f"Guess my number. It is {n} plus 1." for n in range(1, 5)]
    calls = [[m["role"], m.get("tool_calls", [{}])[0].get("function")] for m in kept[0]["completion"]]
    assert calls == [
        ["assistant", {"name": "guess", "arguments": {"number": 3}}],
        ["tool", None],
        ["assistant", {"name": "guess", "arguments": {"number": 2}}],
    ]
    assert read_jsonl(tmp_path / "out" / SCORES)[0]["id"] == "kind0-000000"


def test_the_command_line_writes_both(tmp_path):
    run = make_run(tmp_path / "run", "texts", rounds=1)
    command = [sys.executable, "-m", "bcft.export", str(run), "--to", "pairs", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "6 pairs" in done.stdout
    code = "import sys, bcft.export; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
