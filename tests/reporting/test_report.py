"""The learning curve and `report.md` say what the files say, and nothing else, for a run at any stage."""

import ast
import re
import struct
from pathlib import Path

import bcft.reporting.picture
import pytest
import yaml
from bcft.reporting.picture import COLORS, PICTURE, draw_figure

from bcft.errors import StorageError, UsageError
from bcft.evaluation.results import Evaluation, Measured
from bcft.reporting.report import check_against, write_report
from bcft.reporting.run_files import RunFiles
from bcft.reporting.tables import conclusion, percent
from bcft.runs.clock import PHASES
from bcft.runs.storage import read_json, write_json, write_jsonl, write_text
from bcft.selection.filter import REASONS

COMMAND = "bcft filtered recipes/filtered_bc.yaml --seed 1"
SAMPLES = 4


def evaluation(solved, *, n=12):
    """Return the attempts at n problems: greedy is right, and so are (solved + i) % 5 of the samples of problem i."""
    return Evaluation(
        tuple(
            {
                "problem_id": f"p{i:02d}", "sample": sample, "prompt": "1 + 1", "completion": "2", "answer": "2",
                "success": "yes" if sample < (solved + i) % (SAMPLES + 1) else "no", "stop": "stop_token", "tokens": 1,
            }
            for i in range(n)
            for sample in range(-1, SAMPLES)
        )
    )  # fmt: skip


def measured(solved, *, success_known=True, n=12):
    evaluated = evaluation(solved, n=n)
    summary = evaluated.summary(None)
    return Measured(evaluated, summary if success_known else {k: summary[k] for k in ("n", "stop_rate", "ungraded")})


def line(number, *, dev=None, note="", **rejected):
    """Return a round as `metrics.jsonl` has it, with a different value for every figure."""
    record = {
        "round": number,
        "rollout": {"played": 100 + number, "success": 0.3 + number / 100, "unknown": 0, "reward_mean": number / 7},
        "diversity": {"unique_correct_per_problem": 1.5 + number, "distinct_2": number / 8, "completion_length": 60.5},
        "selection": {
            "requested_fraction": 0.1, "cutoff": 0.5 + number, "kept": 20 + number, "problems_covered": 9,
            "kept_fraction": 0.2 + number / 1000, "rejected": dict.fromkeys(REASONS, 0) | rejected, "note": note,
        },
        "train": {"rows": 20 + number, "tokens_supervised": 9, "steps": 3, "loss": 0.1, "weights_changed": True},
        "seconds": {phase: float(number + i) for i, phase in enumerate(PHASES)},
    }  # fmt: skip
    return record | ({"eval": dict(dev.summary)} if dev else {})


def make(path, *, rounds, best=None, base=None, control="none", tested=None, **config):
    """Write the files of a run; with `best` it is finished."""
    base = base or measured(1)
    recipe = {"num_rounds": len(rounds), "control": control, "history": 1, "output_dir": str(path)} | config
    write_text(path / "config.yaml", yaml.safe_dump(recipe))
    packages = {"bcft": "0.1.0", "torch": "2.13.0", "bitsandbytes": ""}
    hardware = {"cpu": "a CPU", "cpus": 2, "gpus": [], "world_size": 2, "platform": "x"}
    write_json(path / "versions.json", {"python": "3.11", "packages": packages, **hardware, "data": "f0"})
    write_json(path / "round_000" / "evaluation.json", base.summary)
    write_jsonl(path / "metrics.jsonl", rounds)
    if best is not None:
        tested = tested or measured(3)
        for number, result in ((0, base), (best, tested)):
            write_json(path / f"round_{number:03d}" / "test" / "evaluation.json", result.summary)
            write_jsonl(path / f"round_{number:03d}" / "test" / "evaluation.jsonl", result.evaluation.attempts)
        metrics = {"base": base.summary, "best": tested.summary, "best_round": best, "rounds": len(rounds)}
        write_json(path / "metrics.json", {**metrics, **conclusion(base, tested)})
    return path


def report(path, **more):
    return write_report(path, command=COMMAND, **more).read_text(encoding="utf-8")


def rows(text, title):
    """Return the cells of the first table below a title."""
    lines = re.search(rf"## {title}\n\n((?:\|.*\n)+)", text)[1].splitlines()
    head, _, *body = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(head, cells, strict=True)) for cells in body]


def panels(path, other=None):
    """Return the two panels of the picture, and the upper one's lines by their label."""
    above, below = draw_figure(RunFiles.read(path), RunFiles.read(other) if other else None).axes
    return above, below, {drawn.get_label(): drawn for drawn in above.lines}


@pytest.fixture
def run(tmp_path):
    """A finished run of three rounds, the second not evaluated."""
    lines = [
        line(1, dev=measured(2), failed=50, duplicate=30),
        line(2, note="Nothing was kept."),
        line(3, dev=measured(3), failed=7),
    ]
    return make(tmp_path / "filter", rounds=lines, best=3)


def test_the_conclusion_stands_first_and_every_rounds_figures_stand_in_their_row(run):
    text = report(run)
    assert text.startswith(f"# filter\n\n**{conclusion(measured(1), measured(3))['conclusion']}**\n")
    before, *after = rows(text, "Rounds")
    assert before["round"] == "0"
    assert before["dev sampled"].startswith(percent(measured(1).summary["sampled"]["pass@1"]))
    assert not before["played"] + before["kept"] + before["seconds"], "round 0 plays nothing"
    for number, cells in enumerate(after, 1):
        assert cells["round"] == str(number)
        assert cells["played"] == str(100 + number)
        assert cells["success"] == percent(0.3 + number / 100)
        assert (cells["kept"], cells["cutoff"]) == (str(20 + number), f"{0.5 + number}")
        assert (cells["kept of graded"], cells["requested"]) == (percent(0.2 + number / 1000), "10.0 %")
        assert cells["distinct solutions per problem"] == f"{1.5 + number:.2f}"
        assert cells["seconds"] == f"{sum(range(number, number + len(PHASES))):.1f}"
    assert "\n- Round 2: Nothing was kept.\n" in text


def test_a_figure_that_no_round_has_gets_no_column(run):
    assert not {"entropy", "kept with a wrong step"} & rows(report(run), "Rounds")[1].keys()
    lines = [line(1), line(2), line(3, dev=measured(3))]
    lines[1]["diversity"]["entropy"] = 0.25
    write_jsonl(run / "metrics.jsonl", lines)
    assert [cells["entropy"] for cells in rows(report(run), "Rounds")] == ["", "", "0.250", ""]


def test_what_a_policy_forgets_is_a_column_and_the_scales_to_choose_from_are_a_table(tmp_path):
    figures = measured(2).summary
    path = make(tmp_path / "scaled", rounds=[line(1, dev=measured(2))], best=1)
    assert "KL" not in report(path)
    write_jsonl(path / "metrics.jsonl", [line(1) | {"eval": {**figures, "kl_base": 0.25}}])
    scales = [{"scale": scale, "eval": {**figures, "kl_base": 0.25 * scale}} for scale in (0.5, 1.0)]
    metrics = read_json(path / "metrics.json") | {"scale": 0.5, "scales": scales}
    write_json(path / "metrics.json", metrics)
    text = report(path)
    assert [cells["KL(base \\|\\| policy), nats/token"] for cells in rows(text, "Rounds")] == ["", "0.2500"]
    half, whole = rows(text, "Scales of round 1")
    assert (half["scale"], half["KL(base \\|\\| policy), nats/token"], half[""]) == ("0.5", "0.1250", "in `best/`")
    assert (whole["scale"], whole["dev sampled"], whole[""]) == ("1", half["dev sampled"], "")
    assert "| test | base | round 1 x 0.5 |" in text


def test_a_round_that_was_not_evaluated_has_no_mark_and_a_blank_cell(run):
    _, _, lines = panels(run)
    for label in ("sampled, 95 % interval", "greedy"):
        assert list(lines[label].get_xdata()) == [0, 1, 3]
        assert min(lines[label].get_ydata()) > 0
    assert [bool(cells["dev sampled"]) for cells in rows(report(run), "Rounds")] == [True, True, False, True]


def test_the_chosen_round_is_marked_only_in_a_finished_run(run):
    above, _, _ = panels(run)
    rings = [drawn for drawn in above.collections if drawn.get_label() == "chosen: round 3"]
    assert rings[0].get_offsets().tolist() == [[3, measured(3).summary["sampled"]["pass@1"]]]
    (run / "metrics.json").unlink()
    assert not [drawn for drawn in panels(run)[0].collections if drawn.get_label().startswith("chosen")]


def test_bars_and_totals_add_up_to_the_attempts_and_leave_out_reasons_that_do_not_occur(run):
    _, below, _ = panels(run)
    assert [bars.get_label() for bars in below.containers] == ["kept", "failed", "duplicate"]
    top = {round(bar.get_x() + bar.get_width() / 2): bar.get_y() + bar.get_height() for bar in below.patches}
    heights = [sum(bars[i].get_height() for bars in below.containers) for i in range(3)]
    assert heights == [21 + 80, 22, 23 + 7]
    assert top[1] == 101
    totals = {cells["decision"]: cells["attempts"] for cells in rows(report(run), "Decisions")}
    assert totals == {"kept": "66", "failed": "57", "duplicate": "30"}


def test_every_decision_has_a_color_of_its_own():
    assert set(COLORS) == {"kept", *REASONS}
    assert len(set(COLORS.values())) == len(COLORS)


def test_an_unfinished_run_reports_its_rounds_without_a_conclusion(tmp_path):
    path = make(tmp_path / "half", rounds=[line(1, dev=measured(2))], num_rounds=5)
    text = report(path)
    assert "Not finished: 1 of 5 rounds so far." in text
    assert not re.search("better|distinguishable|is unknown|## Against", text)
    assert len(rows(text, "Rounds")) == 2


def test_a_run_without_a_round_reports_the_policy_before_training(tmp_path):
    text = report(make(tmp_path / "begun", rounds=[], num_rounds=5))
    assert "Not finished: 0 of 5 rounds so far." in text
    assert len(rows(text, "Rounds")) == 1


def test_a_run_that_ended_early_says_why(run):
    base = measured(1).summary
    ended = {"base": base, "best": base, "best_round": 0, "conclusion": "the same", "stopped": "s"}
    write_json(run / "metrics.json", ended)
    assert "Stopped after round 3: s." in report(run)
    assert "no round is better" in panels(run)[0].get_title(loc="left")


def test_against_states_the_paired_difference_and_what_sets_the_recipes_apart(run, tmp_path):
    mine, theirs = measured(3), measured(2)
    other = make(tmp_path / "control", rounds=[line(1, dev=theirs)], best=1, tested=theirs, control="random")
    text = report(run, against=other)
    paired = conclusion(theirs, mine, before="in `control`")
    assert f"Paired, problem by problem: {paired['conclusion']}." in text
    assert f"paired difference {100 * paired['vs_base']['delta']:+.1f} points" in text
    assert "`control` (none here, random there)" in text
    assert "output_dir" not in text
    above, _, lines = panels(run, other)
    assert list(lines["sampled, random control"].get_ydata()) == [
        result.summary["sampled"]["pass@1"] for result in (measured(1), theirs)
    ]
    assert above.get_xlim() == (-0.5, 3.5)


def test_against_an_unfinished_run_draws_it_and_compares_nothing(run, tmp_path):
    other = make(tmp_path / "control", rounds=[line(1, dev=measured(2))], control="random")
    assert "Not compared on test problems yet: `control` must be finished." in report(run, against=other)
    (other / "metrics.jsonl").unlink()
    (other / "round_000" / "evaluation.json").unlink()
    assert "Not compared" in report(run, against=other)


def test_other_test_problems_are_not_paired(run, tmp_path):
    fewer = {"base": measured(1, n=8), "tested": measured(3, n=8)}
    other = make(tmp_path / "other", rounds=[line(1, dev=measured(3))], best=1, **fewer)
    assert "tested on different problems" in report(run, against=other)
    (other / "round_001" / "test" / "evaluation.jsonl").unlink()
    assert "attempts at the test problems are missing" in report(run, against=other)


@pytest.mark.parametrize("config", ["", "num_train_epochs: 1\n"], ids=["nothing", "sft"])
def test_against_a_directory_that_is_not_a_filtered_run_is_refused(run, tmp_path, config):
    if config:
        write_text(tmp_path / "x" / "config.yaml", config)
    for refused in (lambda: report(run, against=tmp_path / "x"), lambda: check_against(tmp_path / "x")):
        with pytest.raises(UsageError, match=r"^against: \S+/x is not a run of bcft filtered: give"):
            refused()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "a: [1,"),
        ("config.yaml", "- a list"),
        ("metrics.jsonl", '{"round": 1, "roll'),
        ("metrics.jsonl", '{"round": 1}'),
        ("metrics.jsonl", "[1]"),
        ("metrics.json", "{"),
        ("metrics.json", '{"best_round": 3}'),
        ("round_000/evaluation.json", "\ufffe"),
    ],
)
def test_a_damaged_file_is_one_line_with_its_name_before_anything_is_written(run, tmp_path, name, content):
    other = make(tmp_path / "other", rounds=[line(1, dev=measured(2))], best=1)
    check_against(other)
    (other / name).write_bytes(content.encode("utf-16" if "evaluation" in name else "utf-8"))
    for refused in (
        lambda: check_against(other),
        lambda: report(run, against=other),
        lambda: report(other),
    ):
        with pytest.raises(UsageError, match=re.escape(str(other / name))) as caught:
            refused()
        assert "\n" not in str(caught.value)
    assert not (run / "report.md").exists()


def test_damaged_attempts_on_test_or_versions_are_one_line_with_the_file(run, tmp_path):
    other = make(tmp_path / "other", rounds=[line(1, dev=measured(2))], best=1)
    attempts = other / "round_001" / "test" / "evaluation.jsonl"
    attempts.write_text("{")
    with pytest.raises(UsageError, match=re.escape(f"{attempts} is damaged")):
        report(run, against=other)
    for content in ("{", "{}"):
        (run / "versions.json").write_text(content)
        with pytest.raises(UsageError, match=re.escape(f"{run / 'versions.json'} is damaged")):
            report(run)


def test_where_success_is_unknown_rewards_take_its_place(tmp_path):
    lines = [line(n, dev=measured(1, success_known=False)) for n in (1, 2)]
    for record in lines:
        record["rollout"]["unknown"] = record["rollout"]["played"]
    ungraded = measured(1, success_known=False)
    path = make(tmp_path / "ungraded", rounds=lines, base=ungraded, tested=ungraded, best=2)
    text = report(path)
    assert "success is unknown" in text
    assert [cells["success"] for cells in rows(text, "Rounds")] == ["", "r 0.143", "r 0.286"]
    assert list(panels(path)[2]["mean reward"].get_ydata()) == [1 / 7, 2 / 7]


def test_a_reward_that_was_measured_on_dev_is_the_curve(tmp_path):
    def rewarded(mean):
        attempts = [a | {"success": "unknown", "graded": True, "reward": mean} for a in evaluation(1).attempts]
        made = Evaluation(tuple(attempts))
        summary = made.summary(None)
        return Measured(made, summary | {"reward": summary["reward"] | {"ci95": [mean, mean + 1]}})

    lines = [line(n, dev=rewarded(n / 4)) for n in (1, 2)]
    path = make(tmp_path / "rewarded", rounds=lines, base=rewarded(0.0), tested=rewarded(0.125), best=2)
    text = report(path)
    assert [cells["dev reward"] for cells in rows(text, "Rounds")] == [
        "0 [0, 1]",
        "0.25 [0.25, 1.25]",
        "0.5 [0.5, 1.5]",
    ]
    assert "| mean reward | 0 [0, 1] | 0.125 [0.125, 1.125] |" in text
    assert list(panels(path)[2]["mean reward, 95 % interval"].get_ydata()) == [0.0, 0.25, 0.5]


def test_without_samples_greedy_is_the_curve(tmp_path):
    greedy = measured(2)
    del greedy.summary["sampled"]
    path = make(tmp_path / "greedy", rounds=[line(1, dev=greedy)], base=greedy, tested=greedy, best=1)
    assert "dev sampled" not in rows(report(path), "Rounds")[0]
    assert list(panels(path)[2]) == ["greedy, 95 % interval", "before training"]


@pytest.mark.parametrize("count", [1, 40])
def test_the_picture_is_a_png_with_integer_rounds_and_nothing_overlaps(tmp_path, count):
    rounds = [line(n, dev=measured(3), **dict.fromkeys(REASONS, 5)) for n in range(1, count + 1)]
    path = make(tmp_path / "run", rounds=rounds, best=count)
    other = make(tmp_path / ("a-name-that-is-far-too-long-for-a-legend" * 2), rounds=rounds, best=1)
    report(path, against=other)
    content = (path / PICTURE).read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", content[16:24]) == (1800, 1200)
    assert b"tEXt" not in content, "the name and version of what drew it"
    assert len(content) < 300_000
    figure = draw_figure(RunFiles.read(path), RunFiles.read(other))
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert all(tick == int(tick) for tick in axes.get_xticks())
        legend, inner = axes.get_legend().get_window_extent(), axes.get_window_extent()
        assert inner.x1 <= legend.x0 < legend.x1 <= figure.bbox.x1
        assert legend.y0 >= 0
        assert axes.get_tightbbox().x1 <= figure.bbox.x1
        assert inner.width > figure.bbox.width / 2, "the names leave the curves no room"
    above, below = figure.axes
    assert above.get_legend().get_window_extent().y0 > below.get_legend().get_window_extent().y1


def test_the_same_files_give_the_same_bytes(run):
    first = report(run), (run / PICTURE).read_bytes()
    assert (report(run), (run / PICTURE).read_bytes()) == first


def test_a_users_own_matplotlib_style_changes_nothing_and_stays_as_it_was(run):
    import matplotlib

    report(run)
    before = (run / PICTURE).read_bytes()
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "red", "savefig.bbox": "tight"}):
        report(run)
        assert matplotlib.rcParams["text.usetex"] is True
    assert (run / PICTURE).read_bytes() == before


@pytest.mark.parametrize("name", ["$x_{", "_hidden", "a|b"])
def test_any_directory_may_stand_in_picture_and_tables(run, tmp_path, name):
    other = make(tmp_path / name, rounds=[line(1, dev=measured(2))], best=1)
    escaped = name.replace("|", r"\|")
    assert f"| test | this run, round 3 | `{escaped}`, round 1 |" in report(run, against=other)
    shown = [entry.get_text() for entry in panels(run, other)[0].get_legend().get_texts()]
    assert f"sampled, {name}" in shown


def test_only_drawing_imports_matplotlib():
    tree = ast.parse(Path(bcft.reporting.picture.__file__).read_text(encoding="utf-8"))
    loaded = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert loaded
    assert not [line for line in loaded if "matplotlib" in line]


def test_files_are_replaced_atomically_and_a_failed_write_leaves_the_old_files(run, monkeypatch):
    before = report(run), (run / PICTURE).read_bytes()
    write_jsonl(run / "metrics.jsonl", [line(3, dev=measured(3))])

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            report(run)
    assert ((run / "report.md").read_text(encoding="utf-8"), (run / PICTURE).read_bytes()) == before
    assert report(run) != before[0]
    assert (run / PICTURE).read_bytes() != before[1]
    assert not list(run.glob("*.tmp"))


def test_command_versions_seconds_and_files_are_in_the_report(run):
    text = report(run)
    assert f"```bash\n{COMMAND}\n```" in text
    assert "bcft 0.1.0, torch 2.13.0; Python 3.11 on x; a CPU, 2 CPU cores, no GPU, 2 processes." in text
    spent = {cells["phase"]: cells["seconds"] for cells in rows(text, "Where the time went")}
    assert spent == {phase: f"{6 + 3 * i:.1f}" for i, phase in enumerate(PHASES)} | {"all": "81.0"}
    listed = re.findall(r"^- `(\S+?)`", text, flags=re.M)
    assert "metrics.jsonl" in listed
    assert "status.json" not in listed, "the file does not exist"
    assert all((run / name).exists() for name in listed)
