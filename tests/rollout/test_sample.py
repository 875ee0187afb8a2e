"""A round's attempts: drawn by seed and number alone, played once each, and whole again after an interruption."""

import json
import signal
from contextlib import contextmanager
from threading import Event
from types import SimpleNamespace

import pytest
from helpers.episodes import Counting, Scripted, attempts, rollout_settings
from helpers.tiny import llama_tokenizer

from bcft.environments.single_turn import SingleTurn
from bcft.errors import FaultError, Preempted, ServerError
from bcft.generation import make_engine
from bcft.policy.chat_template import Renderer
from bcft.rollout import sample
from bcft.rollout.sample import ROLLOUTS, draw, play_journaled, roll_out, share
from bcft.runs.clock import Clock
from bcft.runs.progress import Progress
from bcft.runs.storage import Journal, read_journal, read_jsonl, sealed
from bcft.types import Problem, Trajectory


class Interrupted(Exception):  # noqa: N818
    """A kill, as seen from inside."""


@pytest.fixture(scope="module")
def renderer():
    return Renderer(llama_tokenizer(["say a number"], vocabulary=300))


@pytest.fixture
def engines(monkeypatch):
    """The scripted engines that were made, in the place of the policy's."""
    made = []

    @contextmanager
    def make_engine(policy, settings):  # noqa: ARG001
        made.append(Scripted(policy.renderer))
        yield made[-1]

    monkeypatch.setattr(sample, "make_engine", make_engine)
    return made


@pytest.fixture
def policy(renderer):
    return SimpleNamespace(renderer=renderer)


def requested(engines):
    """Return how many attempts the engines opened."""
    return sum(len(engine.waves[0]) for engine in engines if engine.waves)


def played(function, policy, directory, given, make=Counting):
    return function(policy, given, rollout_settings(make), directory=directory, clock=Clock(), label="")


def test_a_round_draws_problems_without_replacement_and_by_its_seed_and_number_alone():
    problems = [Problem(f"{n:03}", "?") for n in range(50)]

    def drawn(number, seed=0, given=problems):
        return [(a.problem.id, a.sample) for a in draw(given, number, seed=seed, prompts=18, samples=3)]

    chosen = {identity for identity, _ in drawn(1)}
    assert len(chosen) == 18
    assert sorted(drawn(1)) == [(identity, number) for identity in sorted(chosen) for number in range(3)]
    assert drawn(1) == drawn(1, given=problems[::-1])
    assert len({tuple(drawn(number, seed)) for number in (1, 2) for seed in (0, 1)}) == 4
    assert len({identity for number in range(20) for identity, _ in drawn(number)}) == 50


def test_a_draw_is_what_it_always_was():
    """Changed only with a reason: another draw is another result for every run."""
    problems = [Problem(f"{n:016x}", "?") for n in range(6)]
    drawn = draw(problems, 2, seed=7, prompts=3, samples=2)
    chosen = ["0000000000000000", "0000000000000003", "0000000000000002"]
    assert [a.id for a in drawn] == [f"2-{identity}-{number}" for identity in chosen for number in range(2)]


def test_processes_share_whole_problems_and_leave_none_out(monkeypatch):
    given = attempts(5, 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    parts = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        parts.append(share(given))
    assert sorted(a.id for part in parts for a in part) == sorted(a.id for a in given)
    assert not {a.problem.id for a in parts[0]} & {a.problem.id for a in parts[1]}
    assert [len(part) for part in parts] == [9, 6]


def test_trajectories_come_back_in_the_order_of_their_attempts(policy, engines, tmp_path):
    given = attempts(5, 3)[::-1]
    assert [t.id for t in played(play_journaled, policy, tmp_path, given)] == [a.id for a in given]
    assert requested(engines) == 15


def test_attempts_and_the_tokens_of_their_actions_are_counted_as_they_finish(policy, engines):
    """The share of the work never falls, ends at 1, and grows before the first attempt of many turns has ended."""
    given, seen = attempts(5, 3), []

    class Seen(Progress):
        def advance(self, more=1, **keys):
            super().advance(more, **keys)
            seen.append((self.done, self.tokens, self.share))

    progress = Seen("")
    settings = rollout_settings(Counting)
    trajectories = list(sample.play_attempts(policy, given, settings, phase="rollout", progress=progress))
    sampled = sum(len(turn.action_ids) for trajectory in trajectories for turn in trajectory.turns)
    assert (progress.total, progress.done, progress.tokens) == (15, 15, sampled)
    assert [share for *_, share in seen] == sorted(share for *_, share in seen)
    assert progress.share == pytest.approx(1)
    before = max(share for done, _, share in seen if not done)
    assert before == pytest.approx((Counting.turns - 1) / settings.max_turns, abs=1 / settings.max_turns)
    assert engines


@pytest.mark.parametrize("failing", ["reset", "step"])
def test_the_work_of_attempts_whose_environment_fails_is_counted_too(policy, engines, failing):
    class Broken(Counting):
        pass

    def fail(*_, **__):
        raise ValueError("broken")

    setattr(Broken, failing, fail)
    progress = Progress("")
    list(sample.play_attempts(policy, attempts(2, 2), rollout_settings(Broken), phase="rollout", progress=progress))
    assert (progress.done, progress.share) == (4, pytest.approx(1))
    assert engines


def test_what_was_played_before_is_not_counted(policy, engines, tmp_path, capsys):
    given = attempts(5, 3)
    for done in (9, 15, 15):
        play_journaled(
            policy, given[:done], rollout_settings(Counting), directory=tmp_path, clock=Clock(), label="base, test",
            phase="test",
        )  # fmt: skip
    counts = [line.split(" in ")[0] for line in capsys.readouterr().out.splitlines()]
    assert counts == ["base, test: 9 attempts", "base, test: 6 attempts"]
    assert requested(engines) == 15


def test_a_round_that_was_interrupted_plays_only_the_missing_attempts_and_ends_in_the_same_file(
    policy, engines, tmp_path, monkeypatch
):
    given = attempts(5, 3)
    monkeypatch.setattr(sample, "CHUNK", 4)
    whole = played(roll_out, policy, tmp_path / "whole", given)
    append, written = Journal.append, []

    def interrupted(self, rows):
        append(self, rows)
        written.extend(rows)
        if len(written) == 8:
            raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", interrupted)
        with pytest.raises(Interrupted):
            played(roll_out, policy, tmp_path / "resumed", given)
    assert not sealed(tmp_path / "resumed", ROLLOUTS)
    engines.clear()
    assert played(roll_out, policy, tmp_path / "resumed", given) == whole
    assert requested(engines) == 15 - 8
    assert (tmp_path / "resumed" / ROLLOUTS).read_bytes() == (tmp_path / "whole" / ROLLOUTS).read_bytes()


def test_a_signal_in_an_instant_environment_is_not_journaled_as_its_error(policy, engines, tmp_path, monkeypatch):
    """Journaled, it would stay in the result of the resumed run."""
    monkeypatch.setattr(sample, "CHUNK", 1)
    strikes = [True]

    class Struck(Counting):
        instant = True

        def step(self, action):
            if self.problem.prompt == "say 2" and self.left == 1 and strikes:
                strikes.clear()
                signal.raise_signal(signal.SIGTERM)
            return super().step(action)

    def preempt(*_):
        raise Preempted("asked to stop")

    given = attempts(5, 1)
    before = signal.signal(signal.SIGTERM, preempt)
    try:
        with pytest.raises(Preempted):
            played(roll_out, policy, tmp_path, given, Struck)
    finally:
        signal.signal(signal.SIGTERM, before)
    lines = list(read_journal(tmp_path / "journal" / "000.jsonl"))
    assert 0 < len(lines) < 5
    assert {line["ended"] for line in lines} == {"done"}
    engines.clear()
    resumed = played(roll_out, policy, tmp_path, given, Struck)
    assert requested(engines) == 5 - len(lines)
    assert resumed == played(roll_out, policy, tmp_path / "whole", given)


class Service(Counting):
    """An environment whose service is down for some problems."""

    instant = True
    down = frozenset()

    def step(self, action):
        if self.problem.prompt in self.down:
            raise ConnectionError("the service is down")
        return super().step(action)


@pytest.mark.parametrize("down", [1, 2, 3, 4, 5])
def test_where_too_many_environments_failed_nothing_is_sealed_and_repaired_only_those_are_played(
    policy, engines, tmp_path, monkeypatch, down
):
    given = attempts(5, 3)
    whole = played(roll_out, policy, tmp_path / "whole", given, Service)
    prompts = list(dict.fromkeys(attempt.problem.prompt for attempt in given))
    monkeypatch.setattr(Service, "down", frozenset(prompts[:down]))
    for _ in range(2):
        with pytest.raises(FaultError, match=f"{3 * down} of 15 trajectories failed; .*the service is down"):
            played(roll_out, policy, tmp_path / "run", given, Service)
        assert not sealed(tmp_path / "run", ROLLOUTS)
    monkeypatch.setattr(Service, "down", frozenset())
    engines.clear()
    assert played(roll_out, policy, tmp_path / "run", given, Service) == whole
    assert requested(engines) == 3 * down


def test_a_few_errors_stay_errors_of_the_sealed_round(policy, engines, tmp_path, monkeypatch):
    given = attempts(20, 1)
    monkeypatch.setattr(Service, "down", frozenset({given[3].problem.prompt}))
    first = played(roll_out, policy, tmp_path, given, Service)
    assert [t.ended for t in first].count("error") == 1
    engines.clear()
    monkeypatch.setattr(Service, "down", frozenset())
    assert played(roll_out, policy, tmp_path, given, Service) == first
    assert requested(engines) == 0


def test_attempts_in_the_journal_of_another_process_are_not_played_again(policy, engines, tmp_path):
    given = attempts(5, 3)
    whole = played(play_journaled, policy, tmp_path, given)
    own = tmp_path / "journal" / "000.jsonl"
    own.rename(own.with_name("001.jsonl"))
    engines.clear()
    assert played(play_journaled, policy, tmp_path, given) == whole
    assert requested(engines) == 0
    assert not own.exists()


def test_a_sealed_round_is_read_and_nothing_is_played(policy, engines, tmp_path, monkeypatch):
    whole = played(roll_out, policy, tmp_path, attempts())
    assert [Trajectory.from_json(line) for line in read_jsonl(tmp_path / ROLLOUTS)] == whole
    engines.clear()
    monkeypatch.setattr(sample, "play_attempts", None)
    assert played(roll_out, policy, tmp_path, attempts()) == whole
    (tmp_path / ROLLOUTS).write_text("")
    with pytest.raises(TypeError):  # not as it was sealed: it would be played again
        played(roll_out, policy, tmp_path, attempts())


def test_the_journal_holds_every_trajectory_in_chunks(policy, engines, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "CHUNK", 4)
    whole = played(play_journaled, policy, tmp_path, attempts(5, 1))
    file = tmp_path / "journal" / "000.jsonl"
    assert len(file.read_text().splitlines()) == 2
    assert {line["id"] for line in read_journal(file)} == {t.id for t in whole}
    assert len(engines) == 1


# What a server plays


def served(policy, directory, given, make=SingleTurn, **changes):
    """Play with an engine that is made as the settings say; return it."""
    engine = Failing(policy.renderer)

    @contextmanager
    def maker(*_):
        yield engine

    settings = rollout_settings(make, make_engine=maker, **changes)
    with pytest.raises(ServerError):
        play_journaled(policy, given, settings, directory=directory, clock=Clock(), label="")
    return engine


class Failing(Scripted):
    """An engine whose server is gone after ten actions."""

    left = 10

    def generate(self, requests):
        for action in super().generate(requests):
            if self.left == 0:
                raise ServerError("gone")
            self.left -= 1
            yield action


def chunks(directory):
    """Return how many attempts each line of the journal holds."""
    text = (directory / "journal" / "000.jsonl").read_text()
    return [len(json.loads(line)["rows"]) for line in text.splitlines()]


def test_every_answer_of_a_server_is_on_the_disk_before_the_next_is_waited_for(policy, tmp_path):
    served(policy, tmp_path, attempts(8, samples=2), max_turns=1)
    assert chunks(tmp_path) == [1] * 10


class Slow(Counting):
    """An environment of one turn that answers in a thread, when the engine has failed already."""

    turns = 1

    def step(self, action):
        Slow.failed.wait(30)
        return super().step(action)


def test_what_an_environment_still_grades_when_a_server_is_gone_is_kept(policy, tmp_path, monkeypatch):
    monkeypatch.setattr(Slow, "failed", Event(), raising=False)
    original = Failing.generate

    def generate(self, requests):
        try:
            yield from original(self, requests)
        finally:
            Slow.failed.set()

    monkeypatch.setattr(Failing, "generate", generate)
    served(policy, tmp_path, attempts(8, samples=2), Slow)
    assert chunks(tmp_path) == [1] * 10


def test_conversations_that_are_paid_for_are_played_a_few_at_a_time(policy, tmp_path):
    engine = served(policy, tmp_path, attempts(8, samples=2), Counting, at_once=3)
    assert [len(wave) for wave in engine.waves] == [
        3,
        3,
        3,
        3,
    ]  # three conversations of three turns, and a part of the next
    assert chunks(tmp_path) == [1] * 3


def test_an_engine_of_the_settings_takes_the_place_of_the_programs_own(policy):
    @contextmanager
    def maker(given, settings):
        yield given, settings

    settings = rollout_settings(SingleTurn, make_engine=maker)
    with make_engine(policy, settings) as made:
        assert made == (policy, settings)
