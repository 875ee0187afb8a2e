"""What each round forgets is in its record, the same after an interruption, on two processes and after drift."""

import pytest
from helpers.runs import TINY, interrupted, of_round, torchrun

from bcft import filtered
from bcft.algorithms import filtered_bc
from bcft.algorithms import run as shared
from bcft.evaluation.divergence import REFERENCE
from bcft.runs.storage import read_jsonl

RUN = TINY | {"num_rounds": 1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of one round."""
    path = tmp_path_factory.mktemp("plain")
    filtered.run(None, output_dir=str(path), **RUN)
    return path


def forgotten(path, number=1):
    return of_round(path, number, "metrics.json")["eval"]["kl_base"]


def reference(path):
    return (path / "round_000" / REFERENCE).read_bytes()


def test_a_run_says_what_each_round_forgets(plain):
    (record,) = read_jsonl(plain / "metrics.jsonl")
    assert record["eval"]["kl_base"] == forgotten(plain) > 0
    assert "kl_base" not in of_round(plain, 0, "evaluation.json")
    assert not (plain / "round_000" / "evaluating").exists()
    assert f'<data value="{forgotten(plain)}">' in (plain / "report.html").read_text()


def test_the_base_that_was_interrupted_before_its_file_plays_nothing_again(plain, tmp_path, monkeypatch, work):
    interrupted(monkeypatch, tmp_path, shared, "record_base", when="before", **RUN)
    assert (tmp_path / "round_000" / "evaluation.json").is_file()
    filtered.run(None, output_dir=str(tmp_path), **RUN)
    assert reference(tmp_path) == reference(plain)
    assert forgotten(tmp_path) == forgotten(plain)
    assert work["played"].count("dev") == 2 * 8 * (1 + 2)


@pytest.mark.slow
def test_a_later_round_is_compared_with_the_file_alone(tmp_path, monkeypatch):
    keys = RUN | {"num_rounds": 2}
    filtered.run(None, output_dir=str(tmp_path / "whole"), **keys)
    interrupted(monkeypatch, tmp_path / "cut", filtered_bc, "commit", **keys)
    monkeypatch.setattr(shared, "record_base", lambda *_, **__: 1 / 0)
    filtered.run(None, output_dir=str(tmp_path / "cut"), **keys)
    assert [forgotten(tmp_path / "cut", n) for n in (1, 2)] == [forgotten(tmp_path / "whole", n) for n in (1, 2)]


@pytest.mark.slow
def test_a_base_that_is_measured_anew_says_anew_what_it_says(plain, tmp_path, monkeypatch):
    interrupted(monkeypatch, tmp_path, filtered_bc, "evaluate_round", when="before", **RUN | {"temperature": 0.5})
    assert reference(tmp_path) != reference(plain)
    filtered.run(None, output_dir=str(tmp_path), allow_drift=True, **RUN)
    assert reference(tmp_path) == reference(plain)


@pytest.mark.slow
def test_two_processes_write_the_file_of_one_and_find_what_one_finds(plain, tmp_path):
    given = (f"{key}={value}" for key, value in (RUN | {"per_device_train_batch_size": 2}).items())
    torchrun("-m", "bcft.filtered", *given, f"output_dir={tmp_path / 'two'}", directory=tmp_path)
    assert reference(tmp_path / "two") == reference(plain)
    assert forgotten(tmp_path / "two") == pytest.approx(forgotten(plain), rel=0.05)
