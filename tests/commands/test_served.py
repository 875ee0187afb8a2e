"""A teacher behind a chat API: every problem is answered once, whatever fails, and its text trains the student."""

import os
import re
import signal
import sys
import threading
from collections import Counter

import pytest
from helpers.chat_server import chat_server
from helpers.runs import interrupted

from bcft import collect, evaluate, sft
from bcft.config.schema import ModelSettings
from bcft.data.examples import make_examples
from bcft.errors import ServerError, UsageError
from bcft.evaluation.held_out import UNFINISHED
from bcft.generation import openai_api
from bcft.policy import loading
from bcft.policy.loading import load_renderer
from bcft.rollout import sample
from bcft.runs.storage import Journal, committed, read_journal, read_json, read_jsonl
from bcft.types import Demonstration, Problem

KEY = "a-secret-of-mine"
STUDENT = {
    "model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic", "dataset_train_split": "train[:300]",
    "max_completion_length": 72, "eval_dev_problems": 8, "eval_test_problems": 8,
}  # fmt: skip
ROUND = {"prompts_per_round": 40, "num_generations": 1, "keep_quantile": 0.0}


def solved(prompt):
    """Return the answer to a problem, wrong for one in five."""
    first, *others = re.findall(r"([-+]?) ?(\d+)", prompt.removeprefix("Work out "))
    result = int(first[1]) + sum(int(sign + number) for sign, number in others)
    return f"So it is.\n#### {result + (sum(map(ord, prompt)) % 5 == 0)}"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Give a key to find, and wait for nothing."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(openai_api, "pause", lambda *_: None)


def keys(server, **changes):
    return STUDENT | ROUND | {"engine": "openai", "base_url": server.url, "served_model": "teacher"} | changes


class Flaky:
    """The faults of a server that fails twice before each answer, in every way."""

    kinds = ("429", "500", "cut", "503", "cut in the middle", "html")

    def __init__(self):
        self.tries = Counter()

    def __call__(self, number, prompt):
        self.tries[prompt] += 1
        return self.kinds[number % len(self.kinds)] if self.tries[prompt] % 3 else ""


def settle():
    """Wait for requests that an interrupted run has left in flight."""
    for thread in threading.enumerate():
        if thread.name == "requests":
            thread.join()


def forked(main, arguments, *, out):
    """Start a command in a process that need not import again; return its number."""
    if child := os.fork():
        return child
    code = 99
    try:
        with out.open("wb", buffering=0) as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
        code = main(arguments)
    finally:
        os._exit(code)  # the end of the tests is the parent's


def journaled(path):
    asked = {line["problem_id"]: line["prompt"] for line in read_jsonl(path / "problems.jsonl")}
    return [asked[line["problem_id"]] for line in read_journal(path / "journal" / "000.jsonl")]


def holds_no_key(path):
    files = [file for file in path.rglob("*") if file.is_file()]
    assert len(files) > 3
    return not any(KEY.encode() in file.read_bytes() for file in files)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """Return the directory of a whole collection from a server that fails two of three times."""
    path = tmp_path_factory.mktemp("collect") / "run"
    with pytest.MonkeyPatch.context() as patch, chat_server(solved, Flaky()) as server:
        patch.setattr(openai_api, "pause", lambda *_: None)
        patch.setenv("OPENAI_API_KEY", KEY)
        collect.run(None, output_dir=str(path), **keys(server))
        assert set(server.answered.values()) == {1}
        assert server.keys == {f"Bearer {KEY}": len(server.requests)}
        assert read_json(path / "usage.json")["requests"] == len(server.requests)
    return path


def test_every_problem_is_answered_once_by_a_server_that_fails_two_of_three_times(collected):
    rollouts = read_jsonl(collected / "rollouts.jsonl")
    assert len({line["problem_id"] for line in rollouts}) == len(rollouts) == 40
    assert {line["turns"][0]["stop"] for line in rollouts} == {"stop_token"}
    assert committed(collected)
    assert holds_no_key(collected)


def test_a_kept_row_is_what_sft_makes_of_the_same_text(collected):
    renderer = load_renderer("bcft:tiny-math", ModelSettings(model_name_or_path="bcft:tiny-math"))
    kept = read_jsonl(collected / "kept.jsonl")
    assert 20 < len(kept) < 40
    asked = {line["problem_id"]: line["prompt"] for line in read_jsonl(collected / "problems.jsonl")}
    texts = [(asked[line["problem_id"]], solved(asked[line["problem_id"]])) for line in kept]
    demonstrations = [
        Demonstration(Problem(line["problem_id"], prompt), prompt, ({"role": "assistant", "content": text},))
        for line, (prompt, text) in zip(kept, texts, strict=True)
    ]
    examples, _ = make_examples(demonstrations, renderer, max_length=512)
    assert [(tuple(line["input_ids"]), tuple(line["labels"])) for line in kept] == [
        (example.input_ids, example.labels) for example in examples
    ]
    assert {line["source"] for line in kept} == {"teacher"}
    assert [line["completion"][0]["content"] for line in kept] == [text for _, text in texts]


@pytest.mark.slow
def test_sft_clones_the_teacher_with_the_ids_of_its_rows(collected, tmp_path, capsys):
    kept = len(read_jsonl(collected / "kept.jsonl"))
    whole = {key: value for key, value in STUDENT.items() if key != "dataset_train_split"}
    changes = {"dataset_name": str(collected), "eval_test_samples": 1, "max_steps": 2, "learning_rate": 1e-3}
    changes |= {"eval_dev_problems": 2, "eval_test_problems": 2}
    metrics = sft.run(None, output_dir=str(tmp_path / "model"), **whole | changes)
    assert metrics["train"]["steps"] == 2
    assert f"{kept:,} with the ids that were sampled" in capsys.readouterr().out


def test_a_collection_that_is_cut_resumes_and_asks_for_nothing_that_is_journaled(tmp_path, monkeypatch):
    path = tmp_path / "run"
    with chat_server(solved, Flaky()) as server:
        for times in (1, 7, 13):
            before = journaled(path) if path.exists() else []
            interrupted(monkeypatch, path, Journal, "append", times=times, run=collect.run, **keys(server))
            settle()
            assert len(journaled(path)) == len(before) + times
            server.requests.clear()
        known = journaled(path)
        collect.run(None, output_dir=str(path), **keys(server))
        asked = {body["messages"][-1]["content"] for body in server.requests}
    assert len(set(known)) == len(known) == 21
    assert not asked & {*known}
    rollouts = [line["problem_id"] for line in read_jsonl(path / "rollouts.jsonl")]
    assert len({*rollouts}) == len(rollouts) == 40


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)])
def test_a_collection_that_is_killed_resumes_and_asks_for_nothing_that_is_journaled(tmp_path, number, code):
    path = tmp_path / "run"

    def fault(number, _):
        return "hold" if number == 30 else ("429", "")[number % 2]

    with chat_server(solved, fault) as server:
        given = [f"{key}={value}" for key, value in keys(server, output_dir=path, concurrency=1).items()]
        child = forked(collect.main, given, out=tmp_path / "out")
        try:
            assert server.held.wait(300)
        finally:
            os.kill(child, number)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out = (tmp_path / "out").read_bytes()
        assert ended == code, out
        server.release.set()
        known = journaled(path)
        assert len(known) == 15, out
        server.requests.clear()
        collect.run(None, output_dir=str(path), **keys(server))
        asked = Counter(body["messages"][-1]["content"] for body in server.requests)
        assert not asked.keys() & {*known}
        assert server.answered.total() <= 41  # the one that was held may be answered to nobody
        assert read_json(path / "usage.json")["requests"] == 30 + asked.total()
    assert len({line["problem_id"] for line in read_jsonl(path / "rollouts.jsonl")}) == 40
    assert holds_no_key(path)
    assert KEY.encode() not in out


@pytest.mark.parametrize("environment", [None, "bcft.environments.two_attempts.TwoAttempts"])
def test_a_budget_stops_a_collection_in_one_line_and_raising_it_resumes(tmp_path, capsys, environment):
    path = tmp_path / "run"
    with chat_server((lambda _: "#### 1") if environment else solved) as server:
        changes = {"environment": environment, "success_func": ""} if environment else {}
        run = keys(server, output_dir=str(path), concurrency=4, **changes)
        given = [f"{key}={value}" for key, value in run.items()]
        assert collect.main([*given, "max_requests=12"]) == 2
        err = capsys.readouterr().err
        assert err == (
            "bcft: error: max_requests: 12 of 12 requests are used: raise it and resume with the same command\n"
        )
        assert read_json(path / "status.json")["state"] == "failed"
        known = journaled(path)
        assert len(server.requests) == 12
        assert len(known) == (4 if environment else 12)  # of eight conversations, four have had their second turn
        server.requests.clear()
        assert collect.main([*given, "max_requests=500"]) == 0
        assert not {body["messages"][0]["content"] for body in server.requests} & {*known}
    assert len(read_jsonl(path / "rollouts.jsonl")) == 40


def test_a_failure_of_the_server_is_one_line_and_loses_nothing(tmp_path, capsys):
    path = tmp_path / "run"
    with chat_server(solved, lambda number, _: "500" if number > 10 else "") as server:
        given = [f"{key}={value}" for key, value in keys(server, output_dir=str(path), concurrency=2).items()]
        assert collect.main(given) == ServerError.exit_code == 8
        (line,) = capsys.readouterr().err.splitlines()
        assert re.fullmatch(r"bcft: error: engine: teacher at \S+ does not answer, asked 8 times: .*", line)
        assert len(journaled(path)) == 10
        assert read_json(path / "status.json")["exit_code"] == 8


def test_a_wrong_key_is_one_line_that_shows_none_of_it(tmp_path, capsys):
    with chat_server(solved, lambda *_: "401") as server:
        given = [f"{key}={value}" for key, value in keys(server, output_dir=str(tmp_path / "run")).items()]
        assert collect.main([*given, "concurrency=1"]) == 2
        assert len(server.requests) == 1
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1
    assert KEY not in captured.out + captured.err
    assert holds_no_key(tmp_path / "run")


def test_the_server_and_the_limits_may_change_on_resuming_and_the_model_may_not(tmp_path, monkeypatch):
    path = tmp_path / "run"
    with chat_server(solved) as server:
        interrupted(monkeypatch, path, Journal, "append", times=5, run=collect.run, **keys(server))
    with chat_server(solved) as server:
        with pytest.raises(UsageError, match="served_model was 'teacher', now 'other'"):
            collect.run(None, output_dir=str(path), **keys(server, served_model="other"))
        with pytest.raises(UsageError, match="engine was 'openai', now 'hf'"):
            collect.run(None, output_dir=str(path), **STUDENT, **ROUND)
        collect.run(None, output_dir=str(path), **keys(server, concurrency=3, max_total_tokens=100_000))
        assert len(server.requests) == 35


def test_answers_that_cannot_be_used_are_counted_and_never_kept(tmp_path, capsys):
    unusable = {1: ("####", "content_filter"), 2: ("no", "refusal"), 3: ("", "stop"), 4: ("So it", "length")}

    def reply(prompt):
        return unusable.get(sum(map(ord, prompt)) % 7, solved(prompt))

    with chat_server(reply) as server:
        metrics = collect.run(None, output_dir=str(tmp_path), **keys(server))
    numbers = [sum(map(ord, prompt)) % 7 for prompt in journaled(tmp_path)]
    cut = sum(number in unusable for number in numbers)
    assert metrics["rollout"]["played"] == 40
    assert metrics["rollout"]["truncated"] == metrics["selection"]["rejected"]["truncated"] == cut > 0
    out = capsys.readouterr().out
    assert f"{numbers.count(1)} filtered by the server" in out
    assert f"{numbers.count(2)} refused by the model" in out


def test_an_evaluation_resumes_as_well_and_says_whose_noise_it_is(tmp_path, monkeypatch, capsys):
    with chat_server(solved, Flaky()) as server:
        given = {k: v for k, v in keys(server).items() if k not in ROUND} | {"eval_test_samples": 2}
        interrupted(monkeypatch, tmp_path, Journal, "append", times=9, run=evaluate.run, **given)
        played, play = [], sample.play_attempts
        monkeypatch.setattr(sample, "play_attempts", lambda *given, **k: played.extend(given[1]) or play(*given, **k))
        metrics = evaluate.run(None, output_dir=str(tmp_path), **given)
        assert len(played) == 3 * 8 - 9 + 3 * metrics["model"]["harder"]["n"]
        temperatures = Counter(body["temperature"] for body in server.requests)
    assert 0.0 in temperatures
    assert metrics["model"]["n"] == 8
    assert "draws its own noise" in metrics["note"]
    assert metrics["note"] == read_json(tmp_path / "evaluate" / "metrics.json")["note"]
    assert metrics["note"] in capsys.readouterr().out
    assert holds_no_key(tmp_path)


def test_a_teacher_is_compared_with_a_student_that_is_sampled_here_and_is_asked_once_for_that(
    tmp_path, monkeypatch, capsys
):
    with chat_server(solved) as server:
        given = {k: v for k, v in keys(server).items() if k not in ROUND}
        given |= {"eval_test_samples": 1, "against": "bcft:tiny-math", "eval_test_problems": 4}
        # The teacher is measured; the student is not.
        interrupted(monkeypatch, tmp_path, loading, "load_policy", run=evaluate.run, **given)
        asked = len(server.requests)
        metrics = evaluate.run(None, output_dir=str(tmp_path), **given)
        assert len(server.requests) == asked == metrics["model"]["n"] * 2 + metrics["model"]["harder"]["n"] * 2
        assert not list(tmp_path.rglob(UNFINISHED))
        del given["against"]
        # Neither what another teacher was measured by nor what is complete is taken for this one's.
        for name in ("other", "teacher"):
            before = len(server.requests)
            evaluate.run(None, output_dir=str(tmp_path), **given | {"served_model": name})
            assert len(server.requests) == before + asked
    assert "teacher on a server, its text tokenized for bcft:tiny-math" in capsys.readouterr().out
    assert metrics["against"]["n"] == 4
