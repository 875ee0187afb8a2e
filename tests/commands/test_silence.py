"""No silence: a run whose output is a file says what it does in every phase, with the round and the time left."""

import re
from contextlib import redirect_stdout
from functools import partial
from itertools import pairwise

import pytest
from helpers.runs import TINY

from bcft import filtered, sft
from bcft.algorithms import learner, opening, rounds
from bcft.algorithms import sft as plain_bc
from bcft.evaluation import held_out
from bcft.rollout import sample
from bcft.runs import progress
from bcft.selection import scoring
from bcft.training import trainer

WORK = [
    (filtered, "load_splits"), (sft, "load_splits"), (opening, "load_policy"), (plain_bc, "load_policy"),
    (opening, "check_prompts"), (plain_bc, "check_prompts"), (plain_bc, "make_examples"), (sample, "play_attempts"),
    (sample, "gather"), (scoring, "ask_all"), (held_out, "_batches"), (rounds, "apply_filter"), (trainer, "fit"),
    (learner, "save_policy"), (plain_bc, "save_policy"), (rounds, "save_policy"), (rounds, "commit_round"),
]  # fmt: skip
"""What may take long, in the modules that call it."""


@pytest.fixture
def phases(monkeypatch):
    """For each piece of work, the labels of the phases in which it was done."""
    seen = {}

    def within(holder, name):
        original = getattr(holder, name)

        def called(*args, **keys):
            open_phases = progress._THREAD.phases
            seen.setdefault(name, []).append("" if not open_phases else open_phases[-1].label)
            return original(*args, **keys)

        monkeypatch.setattr(holder, name, called)

    for holder, name in WORK:
        within(holder, name)
    return seen


@pytest.fixture
def logged(monkeypatch, tmp_path):
    """Run a command with a file in the place of the terminal; return its text and the moments of its lines.

    The moments are of the module's own clock, from the start to the end. Of every phase there are lines.
    """
    moments, write = [], progress.write

    def noted(text):
        moments.append(progress._now())
        write(text)

    monkeypatch.setattr(progress, "write", noted)
    monkeypatch.setattr(progress, "FIRST", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    monkeypatch.setattr(progress, "TICK", 0.001)

    def run(command, **keys):
        moments.append(progress._now())
        with (tmp_path / "log").open("w") as file, redirect_stdout(file):
            command(None, output_dir=str(tmp_path / "run"), **keys)
        return (tmp_path / "log").read_text(), [*moments, progress._now()]

    return run


def said(text):
    """Return the phases that the lines name."""
    return {line.split(":")[0] for line in text.splitlines()}


@pytest.mark.slow
def test_a_filtered_run_in_a_file_names_each_round_and_phase_and_is_never_silent(logged, phases):
    text, moments = logged(filtered.run, **TINY)
    assert {f"round {n}, {phase}" for n in (1, 2) for phase in ("score", "train", "dev")} <= said(text)
    assert {"loading the model", "sanity check, roll out", "base, test", "base, dev", "base, test, score"} <= said(text)
    assert re.search(r"^round 1, train: loading trl, \d+ s$", text, flags=re.M)
    assert re.search(r"^round 2, train: \d+ of \d+ steps, .*, loss [\d.]+, about \d+ s left$", text, flags=re.M)
    assert re.search(r"^round 2, roll out: \d+ of 36 attempts, [\d,]+ tokens/s, about \d+ s left$", text, flags=re.M)
    # Of 8 dev, 8 test and 8 harder problems each is attempted once greedily and twice sampled.
    assert "\nevaluation: 72 attempts at the start, 24 in each of 2 rounds, 48 at the end (" in text
    expected = re.search(r"^evaluation: about \d+ s in all at the rate of the sanity check$", text, flags=re.M)
    assert expected
    assert expected.start() < text.index("base, test")
    assert re.search(r"^evaluation: about \d+ s in all, of which \d+ s have passed$", text, flags=re.M)
    # The thread is due every millisecond; what it may be late by is the machine's business.
    assert max(b - a for a, b in pairwise(moments)) < 10
    assert all(all(labels) for labels in phases.values()), phases
    assert phases["fit"] == ["round 1, train", "round 2, train"]
    assert phases["apply_filter"] == ["round 1, select", "round 2, select"]
    assert phases["commit_round"] == ["round 1, commit", "round 2, commit"]
    assert {"round 1, save", "round 2, save", "saving the best round"} == set(phases["save_policy"])


@pytest.mark.slow
def test_an_sft_run_in_a_file_is_never_silent(logged, phases):
    keys = {key: TINY[key] for key in ("model_name_or_path", "dataset_name", "dataset_train_split")}
    keys |= {"eval_test_problems": 8, "eval_test_samples": 2, "max_completion_length": 72, "max_steps": 4}
    text, _ = logged(sft.run, **keys)
    assert {"making rows", "loading the model", "base, test", "final, test", "train"} <= said(text)
    assert re.search(r"^evaluation: \d+ s before training, and about as long after$", text, flags=re.M)
    assert re.search(r"^train: \d of 4 steps, .* left$", text, flags=re.M)
    assert all(all(labels) for labels in phases.values()), phases
    assert set(phases["save_policy"]) == {"train"}
    assert phases["_batches"] == ["base, test, loss", "final, test, loss"]


@pytest.mark.slow
def test_with_quiet_only_the_conclusion_is_printed(logged, phases):
    text, _ = logged(partial(filtered.run, quiet=True), **TINY | {"num_rounds": 1})
    assert len(text.splitlines()) == 1
    assert not any(any(labels) for labels in phases.values())
