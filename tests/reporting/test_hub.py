"""A Hub that does not answer makes the libraries work offline, and what is missing then is named."""

import os

import pytest

from bcft.errors import DataError
from bcft.reporting import hub
from bcft.reporting.hub import Missing, available, work_offline_if_unreachable


@pytest.fixture
def online(monkeypatch):
    """A machine on which nothing says that the Hub is unreachable; counts how often the Hub is asked."""
    calls = []
    monkeypatch.setattr(hub, "_answers", lambda: calls.append(1))
    monkeypatch.delenv("HF_HUB_OFFLINE")
    return calls


def test_the_hub_is_asked_once_and_only_where_something_may_come_from_it(online, tmp_path):
    for local in (["bcft:tiny-math", "bcft:arithmetic"], [str(tmp_path), "rows.jsonl"]):
        work_offline_if_unreachable(local)
    assert "HF_HUB_OFFLINE" not in os.environ
    assert not online
    for _ in range(2):
        work_offline_if_unreachable(["meta-llama/Llama-3.2-3B-Instruct", "bcft:arithmetic"])
    assert (len(online), os.environ["HF_HUB_OFFLINE"]) == (1, "1")


def test_a_hub_that_answers_leaves_the_libraries_online(online, monkeypatch):
    monkeypatch.setattr(hub, "_answers", lambda: True)
    work_offline_if_unreachable(["meta-llama/Llama-3.2-3B-Instruct"])
    assert "HF_HUB_OFFLINE" not in os.environ
    assert not online


def test_an_address_where_nothing_listens_does_not_answer(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not hub._answers()


def test_only_an_error_that_the_network_caused_makes_something_missing():
    def unreachable():
        try:
            raise ConnectionError
        except ConnectionError as error:
            raise DataError("cannot load it") from error

    def malformed():
        raise DataError("rows.jsonl:2: no answer")

    missing = available(unreachable, "some/data")
    assert isinstance(missing, Missing)
    assert missing == "unknown: some/data is not on this machine, and the Hub is unreachable"
    with pytest.raises(DataError, match=r"rows\.jsonl:2"):
        available(malformed, "rows.jsonl")
    assert available(lambda: 7, "some/data") == 7
