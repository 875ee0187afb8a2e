"""Progress: never longer silent than said, nothing after the end, the figures right, no thread left."""

import io
import sys
import threading
from itertools import pairwise

import pytest
from helpers.clocks import Time
from hypothesis import given
from hypothesis import strategies as st

from bcft.runs import progress
from bcft.runs.progress import EVERY, FIRST, TICK, Progress, duration, tell


@pytest.fixture
def time(monkeypatch):
    """The time of the module, moved by hand."""
    made = Time()
    monkeypatch.setattr(progress, "_now", lambda: made.now)
    monkeypatch.setattr(progress, "_wait", made.wait)
    return made


@pytest.fixture
def printed(monkeypatch, time):
    """The lines printed, each with its time."""
    lines = []
    monkeypatch.setattr(progress, "write", lambda text: lines.append((time.now, text)))
    return lines


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "bcft-progress"]


# When it speaks


def test_a_phase_speaks_after_the_first_seconds_and_then_at_least_as_often_as_said(time, printed):
    with Progress("round 3, roll out") as phase:
        phase.count(384, "attempts")
        time.passes(200)
    moments = [0, *(moment for moment, _ in printed)]
    assert moments[1] == FIRST
    assert {b - a for a, b in pairwise(moments[1:])} == {EVERY}


def test_a_short_phase_says_nothing(time, printed):
    with Progress("round 3, score") as phase:
        phase.count(10, "attempts")
        time.passes(FIRST - TICK)
        phase.advance(10)
    assert printed == []


def test_a_long_phase_ends_with_what_it_has_done_and_a_short_one_where_it_is_asked_for(time, printed):
    for seconds, summary in ((FIRST, False), (FIRST - TICK, True)):
        printed.clear()
        with Progress("base, test", summary=summary) as phase:
            phase.count(40, "attempts")
            phase.advance(40, tokens=900)
            time.passes(seconds)
        assert printed[-1] == (time.now, f"base, test: 40 attempts in {seconds:.0f} s, {900 / seconds:.0f} tokens/s")


PHASES = st.recursive(
    st.integers(0, 100).map(lambda seconds: ("phase", seconds, [])),
    lambda inner: st.tuples(st.just("around"), st.integers(0, 50), st.lists(inner, max_size=4)),
    max_leaves=8,
)


@given(PHASES)
def test_whatever_the_phases_there_is_no_silence_and_the_innermost_speaks(tree):
    """By the rule alone, without a thread: looked at every second, as the thread does."""
    shown, now, lines = progress._Thread(), 0.0, []

    class Spoken(Progress):
        def beat(self, now):
            self.spoke = True
            lines.append((now, self is shown.phases[-1]))

    def pass_through(node):
        nonlocal now
        kind, seconds, inner = node
        phase = Spoken("x", around=kind == "around")
        phase.opened = now
        shown.phases.append(phase)
        for _ in range(seconds):
            now += TICK
            shown.look(now)
        for child in inner:
            pass_through(child)
        shown.phases.remove(phase)

    pass_through(("around", 0, [tree]))
    moments = [0.0, *(moment for moment, _ in lines), now]
    assert max(b - a for a, b in pairwise(moments)) <= EVERY
    assert all(innermost for _, innermost in lines)


def test_between_the_phases_the_one_around_them_speaks_of_the_time_since_the_last(time, printed):
    with Progress("filtered, other work", around=True):
        for number in (1, 2):
            with Progress(f"round {number}, train"):
                time.passes(12)
            time.passes(35)
    assert printed == [
        (10, "round 1, train: 10 s"), (40, "filtered, other work: 28 s"),
        (57, "round 2, train: 10 s"), (87, "filtered, other work: 28 s"),
    ]  # fmt: skip


def test_what_else_is_printed_is_no_silence_either(time, printed):
    with Progress("round 1, train"):
        time.passes(25)
        tell("a message")
        time.passes(29)
        assert [text for _, text in printed] == ["round 1, train: 10 s", "a message"]
        time.passes(1)
        assert printed[-1] == (55, "round 1, train: 55 s")


# Who is silent


@pytest.mark.parametrize(("label", "rank"), [("", "0"), ("round 3, train", "1")], ids=["quiet", "another process"])
def test_a_phase_without_a_label_and_other_processes_print_nothing(monkeypatch, printed, label, rank):
    monkeypatch.setenv("RANK", rank)
    with Progress(label, summary=True) as phase:
        phase.count(4, "steps")
        phase.advance(4)
        assert threads() == []
    assert printed == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_after_the_end_there_is_no_thread_and_no_line_also_after_an_error(time, printed, error):
    before = []

    def fail():
        with Progress("filtered, other work", around=True), Progress("round 1, train") as phase:
            phase.count(4, "steps")
            phase.advance(3)
            time.passes(60)
            before.extend(printed)
            assert len(threads()) == 1
            raise error

    with pytest.raises(error):
        fail()
    assert threads() == []
    assert printed == before
    with Progress("round 1, train"):
        assert len(threads()) == 1
    assert threads() == []


def test_an_interrupt_while_a_phase_opens_leaves_none_open(monkeypatch, printed):
    add = progress._THREAD.add

    def interrupted(phase):
        add(phase)
        raise KeyboardInterrupt

    monkeypatch.setattr(progress._THREAD, "add", interrupted)
    with pytest.raises(KeyboardInterrupt), Progress("round 1, train"):
        pytest.fail("the body began")
    assert progress._THREAD.phases == threads() == printed == []


def test_an_interrupt_before_the_thread_starts_leaves_no_phase_open(monkeypatch, time, printed):
    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt), Progress("round 1, train"):
            pytest.fail("the body began")
    assert progress._THREAD.phases == threads() == printed == []
    with Progress("round 1, train"):
        time.passes(FIRST)
    assert [text for _, text in printed] == ["round 1, train: 10 s"]


def test_a_line_is_one_write_and_the_output_may_close(monkeypatch, time):
    class Output(io.StringIO):
        broken = False

        def write(self, text):
            if self.broken:
                raise BrokenPipeError
            writes.append(text)
            return len(text)

    writes, output = [], Output()
    monkeypatch.setattr(sys, "stdout", output)
    with Progress("round 1, train"):
        time.passes(FIRST)
        output.broken = True
        for _ in range(50):
            time.now += TICK
            time.ticks.release()
        threads()[0].join(5)
        assert threads() == []
    assert writes == ["round 1, train: 10 s\n"]


# What it says


@pytest.mark.parametrize(
    ("seconds", "done", "tokens", "line"),
    [
        (45, 0, 0, "0 of 384 attempts finished, 45 s"),
        (10, 3, 60, "3 of 384 attempts, 10 s"),
        (60, 3, 60, "3 of 384 attempts, 1.0 tokens/s, about 2.1 h left"),
        (10, 20, 400, "20 of 384 attempts, 40 tokens/s, about 3 min left"),
        (60, 120, 6780, "120 of 384 attempts, 113 tokens/s, about 2 min left"),
        (60, 300, 0, "300 of 384 attempts, 5.0 attempts/s, about 17 s left"),
        (60, 384, 6780, "384 of 384 attempts, 113 tokens/s, about 0 s left"),
        (6000, 2, 4000, "2 of 384 attempts, 1.5 s per token, about 318.3 h left"),
    ],
)
def test_the_line_says_what_is_done_the_rate_and_the_time_left(seconds, done, tokens, line):
    phase = Progress("round 3, roll out")
    phase.count(384, "attempts")
    phase.advance(done, tokens=tokens)
    assert phase.line(phase.since + seconds) == f"round 3, roll out: {line}"


def test_what_an_earlier_process_did_counts_as_done_and_not_for_the_rate():
    phase = Progress("train")
    phase.count(100, "steps", before=60)
    phase.advance(10, note="loss 0.5000")
    assert phase.line(phase.since + 20) == "train: 70 of 100 steps, 2 s per step, loss 0.5000, about 60 s left"
    phase.turn_to("saving")
    assert phase.line(phase.since + 3) == "train: saving, 3 s"


@given(st.integers(1, 500), st.integers(1, 500), st.floats(0.1, 1000))
def test_at_a_constant_rate_the_time_left_is_exact(total, done, pace):
    done = min(done, total)
    phase = Progress("x")
    phase.count(total, "attempts")
    for _ in range(done):
        phase.advance()
    left = phase.line(phase.since + pace * done).split("about ")[1].removesuffix(" left")
    assert left in {duration(pace * (total - done) * (1 + error)) for error in (-1e-6, 0, 1e-6)}


@given(st.integers(1, 10**6))
def test_a_duration_is_rounded_by_a_fifth_at_most(seconds):
    value, unit = duration(seconds).split()
    assert float(value) * {"s": 1, "min": 60, "h": 3600}[unit] == pytest.approx(seconds, rel=0.2)


# On a terminal


class Terminal(io.StringIO):
    """A terminal that shows what was written to it."""

    def isatty(self):
        return True


def test_on_a_terminal_there_are_bars_that_move_by_themselves_and_no_lines(monkeypatch, time):
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with Progress("filtered, other work", around=True):
        time.passes(40)
        assert err.getvalue() == ""  # messages of the phases inside would break its bar
        with Progress("round 1, train") as phase:
            phase.turn_to("loading trl")
            time.passes(3)
            assert "round 1, train: loading trl" in err.getvalue()
            phase.count(4, "steps")
            phase.advance(2, note="loss 0.5000")
            time.passes(1)
            assert "2/4" in err.getvalue().split("\r")[-1]
            assert "loss 0.5000" in err.getvalue()
            time.passes(60)
    assert out.getvalue() == "round 1, train: 2 steps in 61 s, 30.5 s per step, loss 0.5000\n"
    assert err.getvalue().split("\r")[-2].strip() == ""


def test_the_thread_never_shows_a_bar_that_is_being_replaced(monkeypatch, time):
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    safe = {}

    class Bar(progress.tqdm):
        def close(self):  # by hand, and once more when it is garbage
            safe.setdefault(id(self), progress._THREAD.lock.locked() or not progress._THREAD.phases)
            bars.append(self)
            super().close()

    bars = []  # kept, so that no id stands for two
    monkeypatch.setattr(progress, "tqdm", Bar)
    with Progress("round 1, train") as phase:
        phase.turn_to("loading trl")
        phase.count(4, "steps")
        time.passes(1)
    assert list(safe.values()) == [True] * 3


@pytest.mark.parametrize("redirected", ["stdout", "stderr"])
def test_with_one_output_redirected_there_are_lines(monkeypatch, time, printed, redirected):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.StringIO() if name == redirected else Terminal())
    with Progress("round 1, train"):
        time.passes(FIRST)
    assert [text for _, text in printed] == ["round 1, train: 10 s"]
