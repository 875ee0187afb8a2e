"""`report.html` says what the files say, and nothing else, for a run of any command at any stage."""

import ast
import re
from html import unescape
from pathlib import Path

import pytest
from helpers.pages import figure, read_page, rows_of, section
from helpers.report_runs import (
    COMMAND,
    attempt,
    cloned_run,
    evaluated_run,
    evaluation,
    filtered_run,
    line,
    measured,
    write_measured,
    write_problems,
)

import bcft.reporting
from bcft import report as command
from bcft.errors import StorageError, UsageError
from bcft.evaluation.results import Evaluation, Measured
from bcft.reporting.page.selection import COLORS
from bcft.reporting.page.svg import NAMES
from bcft.reporting.report import EVERY, Redraw, check_against, write_report
from bcft.reporting.tables import conclusion
from bcft.runs.clock import PHASES
from bcft.runs.storage import read_json, read_jsonl, write_json, write_jsonl
from bcft.selection.filter import REASONS

LIMIT = 3_000_000
EVIL = "<script>document.title = 'acted'</script><img src=https://example.org/x onerror=alert(1)>"


def drawn(path, **more):
    return read_page(write_report(path, **more).read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path):
    """A finished run of three rounds, the second not evaluated."""
    lines = [
        line(1, dev=measured(2), failed=50, duplicate=30),
        line(2, note="Nothing was kept."),
        line(3, dev=measured(3), failed=7),
    ]
    attempts = [
        [attempt(n, "a", 0), attempt(n, "a", 1, reward=0.0, decision="failed"), attempt(n, "b", 0, reward=0.25 * n)]
        for n in (1, 2, 3)
    ]
    path = filtered_run(tmp_path / "filter", rounds=lines, best=3, attempts=attempts)
    write_measured(path / "round_003", measured(3))
    write_problems(path, {"a": "What is 1 + 1?", "b": "What is 2 + 0?"})
    return path


# Numbers


def test_the_conclusion_stands_first(run):
    page = drawn(run)
    header = page.one("header")
    assert header.one("h1").text == "filter"
    assert header.one("p", **{"class": "lead"}).text == conclusion(measured(1), measured(3))["conclusion"]


def test_every_number_below_a_figure_is_that_of_metrics_jsonl(run):
    records, page = read_jsonl(run / "metrics.jsonl"), drawn(run)
    numbers = figure(page, "success")
    by_round = {row["evaluated"]: row for row in numbers}
    base = read_json(run / "round_000/evaluation.json")
    metrics = read_json(run / "metrics.json")
    expected = {"dev, round 0": base, "dev, round 1": records[0]["eval"], "dev, round 3": records[2]["eval"]}
    expected |= {"test, base": metrics["base"], "test, round 3": metrics["best"]}
    assert list(by_round) == list(expected), "a round that was not evaluated has no row"
    for name, summary in expected.items():
        row = by_round[name]
        assert [row["greedy"], row["low"], row["high"]] == [summary["greedy"]["success"], *summary["greedy"]["ci95"]]
        shown = [row["sampled"], row["low 1"], row["high 1"]]
        assert shown == [summary["sampled"]["pass@1"], *summary["sampled"]["ci95"]]
        assert [row["pass@k"], row["maj@k"]] == [summary["sampled"]["pass@k"], summary["sampled"]["maj@k"]]
    last = by_round["test, round 3"]
    assert [last["against base"], last["p"]] == [metrics["vs_base"]["delta"], metrics["vs_base"]["p_value"]]

    for row, record in zip(figure(page, "decisions"), records, strict=True):
        rejected = {name: record["selection"]["rejected"][name] for name in ("failed", "duplicate")}
        kept = record["selection"]["kept"]
        assert row == {"round": record["round"], "kept": kept, **rejected, "total": kept + sum(rejected.values())}

    for row, record in zip(figure(page, "diversity"), records, strict=True):
        diversity = record["diversity"]
        assert row["distinct solutions per problem"] == diversity["unique_correct_per_problem"]
        assert (row["distinct-2"], row["tokens per attempt"]) == (diversity["distinct_2"], 60.5)
        assert row["stopped by itself"] == record["rollout"]["stop_rate"]

    *rounds, whole = figure(page, "time")
    assert [[row[phase] for phase in PHASES] for row in rounds] == [[*r["seconds"].values()] for r in records]
    assert whole["all"] == sum(sum(record["seconds"].values()) for record in records)

    for row, record in zip(section(page, "rounds").table[1:], records, strict=True):
        parts = {**record["rollout"], **record["selection"], **record["train"]}
        assert {k: row[k] for k in ("round", "played", "kept", "cutoff", "rows", "steps", "loss")} == {
            "round": record["round"],
            **{k: parts[k] for k in ("played", "kept", "cutoff", "rows", "steps", "loss")},
        }
        assert row["kept of graded"] == parts["kept_fraction"]


def test_rewards_and_problems_are_counted_from_the_scores(run):
    page = drawn(run)
    rewards = figure(page, "rewards")
    assert {row["cutoff"] for row in rewards} == {0.5}
    first = {row["reward"]: (row["kept"], row["rejected"]) for row in rewards if row["round"] == 1}
    assert first == {0.0: (0, 1), 0.25: (1, 0), 0.5: (0, 0), 0.75: (0, 0), 1.0: (1, 0)}
    rates = {row["problems"]: row for row in figure(page, "problems")}
    assert [rates["round 1"][name] for name in ("none", "up to half", "more", "all")] == [1, 1, 0, 0]
    moved = {name: row["none"] for name, row in rates.items() if name.startswith("dev")}
    assert sum(moved.values()) == 12
    before, after = (evaluation(solved).rates for solved in (1, 3))
    assert moved["dev, none after, none before"] == 0
    assert moved["dev, all after, up to half before"] == sum(
        0 < old <= 0.5 and new == 1 for old, new in zip(before, after, strict=True)
    )


def test_many_different_rewards_are_counted_in_columns_of_one_width(tmp_path):
    made = [attempt(1, f"p{i}", 0, reward=i / 100, decision="kept" if i > 30 else "below_cutoff") for i in range(41)]
    path = filtered_run(tmp_path / "run", rounds=[line(1, below_cutoff=31)], attempts=[made])
    rows = figure(drawn(path), "rewards")
    assert len(rows) == 16
    assert (sum(row["kept"] for row in rows), sum(row["rejected"] for row in rows)) == (10, 31)


def test_marks_of_a_curve_are_where_its_numbers_are(run):
    """The places of the marks are an affine function of the values, with 0 % at the bottom."""
    text = write_report(run).read_text(encoding="utf-8")
    markup = text[text.index('id="figure-success"') :].split("</svg>")[0]
    groups = [re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*style="fill: var\(--(\S+)\)', part)
              for part in markup.split("<defs>")]  # fmt: skip
    marks = [[float(y) for _, y, _ in group] for group in groups if len(group) == 3]
    values = [[s["sampled"]["pass@k"] for s in _dev(run)], [s["greedy"]["success"] for s in _dev(run)],
              [s["sampled"]["pass@1"] for s in _dev(run)]]  # fmt: skip
    assert len(marks) == 3
    places = {
        round(y, 1): value for ys, line in zip(marks, values, strict=True) for y, value in zip(ys, line, strict=True)
    }
    (y0, v0), *_, (y1, v1) = sorted(places.items())
    for y, value in places.items():
        assert value == pytest.approx(v0 + (v1 - v0) * (y - y0) / (y1 - y0), abs=0.002)


def _dev(path):
    return [read_json(path / "round_000/evaluation.json"), measured(2).summary, measured(3).summary]


def test_what_a_policy_forgets_and_the_scales_to_choose_from_are_shown(tmp_path):
    figures = measured(2).summary
    path = filtered_run(tmp_path / "scaled", rounds=[line(1, dev=measured(2))], best=1)
    write_jsonl(path / "metrics.jsonl", [line(1) | {"eval": {**figures, "kl_base": 0.25}}])
    scales = [{"scale": scale, "eval": {**figures, "kl_base": 0.25 * scale}} for scale in (0.5, 1.0)]
    write_json(path / "metrics.json", read_json(path / "metrics.json") | {"scale": 0.5, "scales": scales})
    page = drawn(path)
    kl = "KL(base || policy), nats/token"
    assert [row[kl] for row in figure(page, "diversity")] == [0.25]
    half, whole = rows_of(section(page, "success").all("table")[-1])
    assert (half["scale"], half[kl], half["chosen"]) == (0.5, 0.125, "in best/")
    assert (whole["scale"], whole["chosen"]) == (1.0, "")
    assert "round 1 x 0.5" in section(page, "success").text


# Runs of every kind and stage


@pytest.mark.parametrize("rounds", [[], [line(1)], [line(1, dev=measured(2))]], ids=["none", "no dev", "one"])
def test_an_unfinished_run_has_a_page_without_a_conclusion(tmp_path, rounds):
    path = filtered_run(tmp_path / "half", rounds=rounds, num_rounds=5)
    page = drawn(path)
    assert page.one("header").one("p", **{"class": "lead"}).text == f"Not finished: {len(rounds)} of 5 rounds so far."
    assert len(section(page, "rounds").table) == len(rounds) + 1
    assert not re.search("better|distinguishable", page.text)


def test_a_run_that_has_nothing_but_its_recipe_has_a_page(tmp_path):
    path = filtered_run(tmp_path / "begun", rounds=[], num_rounds=5)
    for name in ("metrics.jsonl", "versions.json", "round_000/evaluation.json"):
        (path / name).unlink()
    assert "Not finished: 0 of 5 rounds" in drawn(path).text


def test_a_run_that_ended_early_says_why(run):
    base = measured(1).summary
    ended = {"base": base, "best": base, "best_round": 0, "conclusion": "the same", "stopped": "no gain"}
    write_json(run / "metrics.json", ended)
    assert "Stopped after round 3: no gain" in drawn(run).one("header").text


def test_where_success_is_unknown_rewards_take_its_place(tmp_path):
    lines = [line(n, dev=measured(1, success_known=False)) for n in (1, 2)]
    for record in lines:
        record["rollout"]["unknown"] = record["rollout"]["played"]
    ungraded = measured(1, success_known=False)
    page = drawn(filtered_run(tmp_path / "ungraded", rounds=lines, base=ungraded, tested=ungraded, best=2))
    assert "Mean reward of the rollouts; success is unknown" in page.text
    assert not page.all("section", id="problems")


def test_a_reward_that_was_measured_on_dev_is_the_curve(tmp_path):
    def rewarded(mean):
        attempts = [a | {"success": "unknown", "graded": True, "reward": mean} for a in evaluation(1).attempts]
        made = Evaluation(tuple(attempts))
        summary = made.summary(None)
        return Measured(made, summary | {"reward": summary["reward"] | {"ci95": [mean, mean + 1]}})

    lines = [line(n, dev=rewarded(n / 4)) for n in (1, 2)]
    path = filtered_run(tmp_path / "rewarded", rounds=lines, base=rewarded(0.0), tested=rewarded(0.125), best=2)
    rows = [row for row in figure(drawn(path), "success") if row["evaluated"].startswith("dev")]
    assert [(row["mean reward"], row["low"], row["high"]) for row in rows] == [
        (0, 0, 1),
        (0.25, 0.25, 1.25),
        (0.5, 0.5, 1.5),
    ]


def test_several_reward_functions_have_their_means_and_an_ungraded_attempt_says_so(tmp_path):
    made = [attempt(1, "a", 0, names=("one", "two")), attempt(1, "a", 1, reward=None, decision="ungraded")]
    page = drawn(filtered_run(tmp_path / "run", rounds=[line(1, ungraded=1)], attempts=[made]))
    assert rows_of(section(page, "rewards").all("table")[-1]) == [{"round": 1, "one": 1, "two": 1}]
    texts = [row.text for row in section(page, "attempts").all("details")]
    assert "not graded" in texts[1]
    assert "no reward function could grade it" in texts[1]


def test_nothing_kept_and_nothing_graded_is_a_page(tmp_path):
    record = line(1, errored=2)
    record["selection"] |= {"kept": 0, "note": "All environments failed."}
    made = [
        attempt(1, "a", n, reward=None, decision="errored", ended="error", error="Boom: x", turns=()) for n in (0, 1)
    ]
    page = drawn(filtered_run(tmp_path / "run", rounds=[record], attempts=[made]))
    assert "No attempt was graded so far." in section(page, "rewards").text
    assert "All environments failed." in section(page, "filter").text
    assert "rejected, errored: its environment failed: Boom: x" in section(page, "attempts").text


def test_a_conversation_shows_every_action_and_observation(tmp_path):
    path = filtered_run(tmp_path / "run", rounds=[line(1)], attempts=[[attempt(1, "a", 0, turns=("go", "stop"))]])
    write_problems(path, {"a": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Walk."}]})
    row = section(drawn(path), "attempts").one("details")
    labels = [label.text for label in row.all("dt")]
    texts = [text.text for text in row.all("dd")]
    assert labels == [
        "prompt, system", "prompt, user", "action 1", "observation 1", "action 2", "reference", "verdict", "why",
    ]  # fmt: skip
    assert texts[:6] == ["Be brief.", "Walk.", "go", "answer to go", "stop", "2"]
    assert texts[6] == "solved, reward 1 (r 1); stopped by itself"
    assert texts[7] == "kept: it passes every rule, with a reward at or above the cutoff (0.5)"


def test_sft_shows_loss_counts_tokens_and_the_problems_before_and_after(tmp_path):
    losses = [{"step": n, "loss": 1 / n, "learning_rate": 0.1} for n in (1, 2, 3)] + [{"step": 3, "eval_loss": 0.4}]
    tokens = [{"id": 1, "text": "1+1", "label": -100}, {"id": 2, "text": "=2<", "label": 2}]
    rows = {
        "words": "7 of 8 rows", "counts": {"given": 8, "kept": 7, "tokens": 20},
        "examples": [{"where": "x.jsonl:1", "problem_id": "a", "weight": 1.0, "tokens": tokens}],
    }  # fmt: skip
    path = cloned_run(tmp_path / "cloned", losses=losses, rows=rows)
    write_problems(path, {"p00": "What is 1 + 1?"})
    page = drawn(path)
    assert [row["loss"] for row in figure(page, "loss")] == [1, 0.5, 1 / 3, ""]
    assert figure(page, "loss")[3]["eval_loss"] == 0.4
    assert {row[""]: row["count"] for row in section(page, "rows").table}["rows trained on"] == 7
    shaded = section(page, "tokens").one("pre")
    assert ([n.text for n in shaded.all("b")], [n.text for n in shaded.all("span")]) == (["=2<"], ["1+1"])
    problems = section(page, "problems").all("details")
    assert len(problems) == 12
    (first,) = [row for row in problems if "What is 1 + 1?" in row.text]
    assert "before: greedy solved, stopped by itself, 1 of 4 sampled attempts solved" in first.text
    values = {row[""]: (row["value"], row["low"], row["high"]) for row in figure(page, "success")}
    final = read_json(path / "metrics.json")["final"]["sampled"]
    assert values["after, sampled"] == (final["pass@1"], *final["ci95"])


def test_unfinished_runs_of_other_commands_have_a_page(tmp_path):
    for made, name in ((cloned_run(tmp_path / "a"), "metrics.json"), (evaluated_run(tmp_path / "b"), "metrics.json")):
        (made / name).unlink()
        assert drawn(made).one("header").one("p", **{"class": "lead"}).text == "Not finished."


def test_without_dev_problems_the_rollouts_say_what_was_solved(tmp_path):
    path = filtered_run(tmp_path / "run", rounds=[line(1), line(2)])
    write_json(path / "round_000/evaluation.json", {})
    assert "Solved attempts of the rollouts" in drawn(path).text


def test_an_evaluation_shows_its_figures_and_rows(tmp_path):
    page = drawn(evaluated_run(tmp_path / "run" / "evaluate", against=measured(1)))
    assert page.one("h1").text == "run/evaluate"
    assert {row[""] for row in figure(page, "success")} >= {"model, sampled", "against, greedy"}
    assert len(section(page, "problems").all("details")) == 12


# Two runs


def test_two_runs_have_the_paired_difference_and_what_sets_the_recipes_apart(run, tmp_path):
    mine, theirs = measured(3), measured(2)
    other = filtered_run(tmp_path / "control", rounds=[line(1, dev=theirs)], best=1, tested=theirs, control="random")
    page = drawn(run, against=other)
    beside = section(page, "beside")
    paired = conclusion(theirs, mine, before="in control")
    assert f"Paired, problem by problem: {paired['conclusion']}." in beside.text
    keys = {row["key"]: (row["here"], row["there"]) for row in rows_of(beside.all("table")[-1])}
    assert keys["control"] == ("none", "random")
    assert "output_dir" not in keys
    legend = page.one("figure", **{"data-figure": "success"}).text
    assert "sampled, control" in legend
    assert len(beside.all("details")) == 12


@pytest.mark.parametrize("kind", ["sft", "evaluate"])
def test_runs_of_different_commands_are_compared_on_the_same_problems(run, tmp_path, kind):
    made = cloned_run(tmp_path / "x") if kind == "sft" else evaluated_run(tmp_path / "x")
    for first, second in ((run, made), (made, run), (made, made)):
        text = section(drawn(first, against=second), "beside").text
        assert "Paired, problem by problem: not distinguishable" in text


def test_an_unfinished_run_or_other_problems_are_not_paired(run, tmp_path):
    half = filtered_run(tmp_path / "half", rounds=[line(1, dev=measured(2))], control="random")
    assert "Not compared on test problems yet: half must be finished." in drawn(run, against=half).text
    fewer = {"base": measured(1, n=8), "tested": measured(3, n=8)}
    other = filtered_run(tmp_path / "other", rounds=[line(1, dev=measured(3))], best=1, **fewer)
    assert "tested on different problems" in drawn(run, against=other).text
    (other / "round_001/test/evaluation.jsonl").unlink()
    assert "attempts at the test problems are missing" in drawn(run, against=other).text


# The page itself


def test_what_a_policy_says_stays_text(run):
    for number in (1, 2, 3):
        made = [attempt(number, "a", 0, turns=(EVIL,)), attempt(number, "b", 0, turns=("\x00\u202eשלום 你好 🙂",))]
        place = run / f"round_{number:03d}"
        write_jsonl(place / "rollouts.jsonl", [played for played, _ in made])
        write_jsonl(place / "scores.jsonl", [scored for _, scored in made])
    write_problems(run, {"a": EVIL, "b": "مرحبا"})
    text = write_report(run).read_text(encoding="utf-8")
    page = read_page(text)
    assert len(page.all("script")) == 1
    assert not page.all("img")
    assert not [name for node in page.all("*") for name in node.attributes if name.startswith("on")]
    assert EVIL in [node.text for node in section(page, "attempts").all("dd")]
    assert "שלום 你好 🙂" in text
    assert "\x00" not in text


def test_the_page_asks_for_nothing_and_its_references_are_within_it(run):
    text = write_report(run).read_text(encoding="utf-8")
    page = read_page(text)
    targets = [
        node.attributes[name]
        for node in page.all("*")
        for name in ("src", "href", "xlink:href", "data", "action", "poster")
        if name in node.attributes
    ]
    assert targets
    assert {target for target in targets if not target.startswith("#")} == {"data:,"}
    ids = [node.attributes["id"] for node in page.all("*") if "id" in node.attributes]
    assert len(ids) == len({*ids}), "an id is there twice"
    assert {target[1:] for target in targets if target.startswith("#")} <= {*ids}
    assert set(re.findall(r"url\(#?([^)]*)\)", text)) <= {*ids}
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_colors_are_those_of_the_style_sheet_in_every_drawing(run):
    text = write_report(run).read_text(encoding="utf-8")
    style, body = text.split("</style>")
    used = {*re.findall(r"var\(--([\w-]+)\)", body)}
    assert used
    assert used <= {*NAMES}
    assert used <= {*re.findall(r"^  --([\w-]+): light-dark", style, flags=re.M)}
    drawings = "".join(re.findall(r"<svg.*?</svg>", body, flags=re.S))
    assert not re.findall(r"#[0-9a-f]{6}|font-family", drawings)


def test_only_drawing_imports_what_draws():
    """Commands that draw once, at their end, load it there."""
    package = Path(bcft.reporting.__file__).parent
    for file in package.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        loaded = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [one for one in loaded if re.search("matplotlib|jinja2|markupsafe", one)], file


def test_every_decision_has_a_color_of_its_own():
    assert set(COLORS) == {"kept", *REASONS}
    assert len(set(COLORS.values())) == len(COLORS)


def test_the_same_files_give_the_same_bytes_whatever_the_users_own_style(run, tmp_path):
    import matplotlib

    other = filtered_run(tmp_path / "control", rounds=[line(1, dev=measured(2))], best=1)
    before = write_report(run, against=other).read_bytes()
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        assert write_report(run, against=other).read_bytes() == before
        assert matplotlib.rcParams["text.usetex"] is True
    write_json(run / "status.json", read_json(run / "status.json") | {"state": "running", "seconds": 1.0})
    assert write_report(run, against=other).read_bytes() == before


def test_two_thousand_long_attempts_fit_and_what_is_left_out_is_said(tmp_path):
    words = "<" + "ünïcode & words " * 400
    made = [
        attempt(1, f"p{i // 4}", i % 4, turns=(words, words), decision=("failed", "kept")[i % 2], reward=float(i % 2))
        for i in range(2400)
    ]
    made[7][1]["decision"] = "tie_break"
    path = filtered_run(tmp_path / "run", rounds=[line(1, dev=measured(2))], best=1, attempts=[made])
    write_problems(path, {f"p{i}": words for i in range(600)})
    page_path = write_report(path)
    assert page_path.stat().st_size <= LIMIT
    attempts = section(read_page(page_path.read_text(encoding="utf-8")), "attempts")
    rows = attempts.all("details")
    assert len(rows) == 2000
    assert attempts.one("p").text.startswith("2,000 of 2,400 attempts, of 1 of 1 rounds")
    assert [row.attributes["data-g"] for row in rows].count("tie break") == 1
    assert "characters left out …]" in rows[0].text
    assert {label.text for label in rows[0].all("dt")} >= {"prompt", "action 1", "action 2", "verdict", "why"}


def test_a_prompt_that_fits_its_line_is_there_once_and_a_short_text_is_whole(run):
    row = section(drawn(run), "attempts").all("details")[0]
    assert row.one("summary").text.endswith("What is 1 + 1?")
    assert "prompt" not in [label.text for label in row.all("dt")]


# Files and commands


def test_commands_are_quoted_and_versions_and_recipe_are_in_the_page(tmp_path):
    path = filtered_run(tmp_path / "a 'name'", rounds=[line(1, dev=measured(2))], best=1)
    repeat = section(drawn(path), "repeat")
    commands = [unescape(node.text) for node in repeat.all("pre")]
    assert commands[0] == COMMAND
    quoted = f"'{tmp_path}/a '\"'\"'name'\"'\"'/config.yaml'"
    assert commands[1].startswith(f"bcft filtered {quoted} --output_dir ")
    assert "bcft 0.1.0, torch 2.13.0; Python 3.11 on x; a CPU, 2 CPU cores, no GPU, 2 processes." in repeat.text
    assert "control: none" in commands[-1]


def test_a_run_with_python_objects_promises_no_command(tmp_path):
    path = filtered_run(tmp_path / "run", rounds=[line(1)], reward_funcs=["m.reward@0a1b2c3d"])
    repeat = section(drawn(path), "repeat").text
    assert "Given from Python, so that no command line repeats the run: reward_funcs." in repeat
    assert "--output_dir" not in repeat


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "a: [1,"), ("config.yaml", "- a list"), ("metrics.jsonl", '{"round": 1, "roll'),
        ("metrics.jsonl", '{"round": 1}'), ("metrics.jsonl", "[1]"), ("metrics.json", "{"),
        ("metrics.json", '{"best_round": 3}'), ("round_000/evaluation.json", "\ufffe"), ("status.json", "{"),
        ("round_001/scores.jsonl", '{"id": "1-a-0"}'),
        ("versions.json", "{}"), ("round_001/scores.jsonl", "{"), ("round_001/rollouts.jsonl", '{"id": "1-a-0", {'),
    ],
)  # fmt: skip
def test_a_damaged_file_is_one_line_with_its_name_before_anything_is_written(run, name, content):
    (run / name).write_bytes(content.encode("utf-16" if "evaluation" in name else "utf-8"))
    with pytest.raises(UsageError, match=re.escape(str(run / name))) as caught:
        write_report(run)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("made", ["nothing", "collect"])
def test_a_directory_of_no_such_run_is_one_line_and_exit_code_2(tmp_path, made, capsys):
    (tmp_path / "x").mkdir()
    if made == "collect":
        write_json(tmp_path / "x" / "status.json", {"command": "collect"})
    assert command.main([str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"bcft: error: report: {tmp_path / 'x'} is ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["a", "b", "c"], ["a", "--quick"]])
def test_a_wrong_command_line_is_one_line(arguments, capsys):
    assert command.main(arguments) == 2
    assert capsys.readouterr().err.startswith("bcft: error: command line: ")


def test_the_command_draws_one_run_or_two_and_the_one_that_the_recipe_names(run, tmp_path, capsys):
    other = filtered_run(tmp_path / "control", rounds=[line(1, dev=measured(2))], best=1)
    assert command.main([str(run)]) == 0
    assert capsys.readouterr().out == f"Report: {run / 'report.html'}\n"
    alone = (run / "report.html").read_bytes()
    assert command.main([str(run), str(other)]) == 0
    beside = (run / "report.html").read_bytes()
    assert beside != alone
    recipe = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(f"{recipe}against: {other}\n")
    assert command.run(run) == run / "report.html"
    assert read_page((run / "report.html").read_text()).all("section", id="beside")


@pytest.mark.parametrize("config", ["", "num_train_epochs: 1\n"], ids=["nothing", "sft"])
def test_against_a_directory_that_is_not_a_filtered_run_is_refused(tmp_path, config):
    if config:
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / "config.yaml").write_text(config)
    with pytest.raises(UsageError, match=r"^against: \S+/x is not a run of bcft filtered: give"):
        check_against(tmp_path / "x")


def test_files_are_replaced_atomically_and_a_failed_write_leaves_the_old_page(run, monkeypatch):
    before = write_report(run).read_bytes()
    write_jsonl(run / "metrics.jsonl", [line(3, dev=measured(3))])

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            write_report(run)
    assert (run / "report.html").read_bytes() == before
    assert write_report(run).read_bytes() != before


def test_a_run_at_work_is_drawn_when_it_is_due_and_a_page_that_fails_costs_one_line(run, monkeypatch):
    said, now = [], [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    redraw = Redraw(run, against=None, say=said.append)
    redraw()
    assert not (run / "report.html").exists(), "a short run is drawn once, at its end"
    now[0] += EVERY
    redraw()
    assert (run / "report.html").exists()
    (run / "metrics.jsonl").write_text("{")
    redraw()
    assert not said
    now[0] += EVERY
    redraw()
    assert len(said) == 1
    assert "metrics.jsonl is damaged" in said[0]
