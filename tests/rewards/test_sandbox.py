"""Answers come from a policy that may gain by breaking the sandbox: each is limited, and harms no other."""

import os
import random
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import cast, get_args

import pytest

from bcft.errors import FaultError
from bcft.rewards import sandbox as module
from bcft.rewards.formulas import Verdict, Verifier
from bcft.rewards.sandbox import Sandbox

HALF = (r"\boxed{\frac{1}{2}}", r"\boxed{0.5}")
NOT_HALF = (r"\boxed{\frac{1}{2}}", r"\boxed{0.7}")
TOWER = ("$5$", r"\boxed{9^{9^9}}")
CANARY = "hf_this_is_a_secret"

HOSTILE = [
    r"\boxed{9^{9^9}}",
    r"\boxed{9^{9^{9^9}}}",
    r"\boxed{2^{10^9}}",
    r"\boxed{2^{10^{12}}}",
    r"\boxed{10^{10^{10}}}",
    r"\boxed{1000000!}",
    r"\boxed{((20!)!)!}",  # aborts the process where gmpy2 is installed
    r"\boxed{9!!!!}",
    r"\boxed{\binom{10^9}{5\cdot 10^8}}",
    r"\boxed{\sum_{n=1}^{10^9} \frac{1}{n}}",
    r"\boxed{\prod_{n=1}^{10^7} n}",
    r"\boxed{\int_0^1 e^{\sin(x^5)\cos(x)}dx}",
    r"\boxed{(x+1)^{5000}}",
    r"\boxed{\lim_{x\to 0}\frac{\sin x}{x^{x^x}}}",
    "9**9**9**9",
    "2**10000000000 + 1",
    "$10^{10000000000}+1$",
    "1e999999999",
    "$" + "{" * 1000 + "1" + "}" * 1000 + "$",
    "$" + "(" * 200 + "1" + ")" * 200 + "$",
    r"\sqrt{" * 300 + "2" + "}" * 300,
    r"\boxed{\frac{" * 200,
    "$ " * 500_000,
    r"\[" * 500_000,
    "1 " * 500_000,
    "9" * 1_000_000 + "+1",
    "x" * 1_000_000,
    r"\boxed{" + "x+" * 1500 + "1}",
    "\x00" * 100,
    "\ud800",
    r"\boxed{\input{/etc/passwd}}",
    r"\boxed{\write18{touch CANARY_FILE}}",
    "__import__('os').system('touch CANARY_FILE')",
    "$__import__('os').system('touch CANARY_FILE')$",
    "\\boxed{__import__('pathlib').Path('CANARY_FILE').touch()}",
    "1+__import__('os').system('touch CANARY_FILE')",
    "(lambda: open('CANARY_FILE', 'w'))()",
]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Verifier]:
    with pytest.MonkeyPatch.context() as patch, Verifier(seconds=0.6, workers=8) as sandbox:
        patch.setenv("HF_TOKEN", CANARY)
        assert sandbox.verify([HALF, NOT_HALF]) == ["right", "wrong"]
        yield sandbox


def server_of(sandbox: Verifier) -> int:
    assert sandbox._server is not None
    return sandbox._server.pid


def test_verdicts_say_what_happened(sandbox: Verifier) -> None:
    pairs = [HALF, NOT_HALF, ("", "5"), ("no formula here", "5"), ("$5$", ""), ("$5$", "no idea")]
    assert sandbox.verify(pairs) == ["right", "wrong", "unparsable", "unparsable", "wrong", "wrong"]
    assert sandbox.verify(pairs[::-1]) == sandbox.verify(pairs)[::-1], "the order must not matter"


def test_without_pairs_no_server_starts() -> None:
    sandbox = Verifier()
    assert sandbox.verify([]) == []
    assert sandbox._server is None


def test_hostile_answers_are_bounded_and_the_next_answer_is_right(sandbox: Verifier, tmp_path: Path) -> None:
    canary = tmp_path / "ran"
    hostile = [text.replace("CANARY_FILE", str(canary)) for text in HOSTILE]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdicts = sandbox.verify([("$5$", text) for text in hostile])
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert len(verdicts) == len(hostile)
    assert set(verdicts) <= set(get_args(Verdict)) - {"right", "unparsable"}
    assert verdicts[0] == "timeout", "a tower of powers cannot be evaluated"
    assert sys.platform != "linux" or grown < 50 * 1024, f"this process grew by {grown} KiB"
    assert not canary.exists(), "an answer was executed"
    assert sandbox.verify([HALF, NOT_HALF]) == ["right", "wrong"]


@pytest.mark.slow
def test_more_than_200_hostile_answers_are_bounded() -> None:
    wrapped = ["{}", "${}$", r"\boxed{{{}}}", r"\frac{{{}}}{{2}}", "The answer is {}.", "{}+x"]
    pairs = [("$5$", wrapper.format(text)) for text in HOSTILE for wrapper in wrapped]
    assert len(pairs) > 200
    with Verifier(seconds=0.3, workers=8) as sandbox:
        assert sandbox.verify([("$5$", "5")]) == ["right"]
        verdicts = sandbox.verify(pairs)
        assert sandbox.verify([("$5$", "5")]) == ["right"]
    assert len(verdicts) == len(pairs)
    assert set(verdicts) <= set(get_args(Verdict)) - {"right", "unparsable"}


def test_hostile_references_are_ungraded_and_not_wrong(sandbox: Verifier) -> None:
    assert sandbox.verify([(r"\boxed{9^{9^9}}", "$5$"), ("???", "$5$")]) == ["timeout", "unparsable"]


def test_a_harmless_answer_beside_a_hostile_one_gets_its_verdict(sandbox: Verifier) -> None:
    assert sandbox.verify([HALF, TOWER, NOT_HALF, HALF]) == ["right", "timeout", "wrong", "right"]


def test_many_threads_get_their_own_verdicts(sandbox: Verifier) -> None:
    questions = [[HALF, NOT_HALF][number % 2 :] for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(sandbox.verify, questions))
    assert verdicts == [["right", "wrong"][number % 2 :] for number in range(8)]


def test_the_sandbox_is_silent_and_leaves_an_outer_timer_alone(
    sandbox: Verifier, capfd: pytest.CaptureFixture[str]
) -> None:
    """math-verify's own timeouts cancel any alarm of the process that calls it."""
    handler = signal.getsignal(signal.SIGALRM)
    signal.setitimer(signal.ITIMER_REAL, 3600)
    try:
        sandbox.verify([HALF, TOWER])
        remaining, _ = signal.getitimer(signal.ITIMER_REAL)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert remaining > 0
    assert signal.getsignal(signal.SIGALRM) is handler
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_server_does_not_inherit_secrets(sandbox: Verifier) -> None:
    sandbox.verify([HALF])
    environment = Path(f"/proc/{server_of(sandbox)}/environ").read_bytes()
    assert b"PYTHONHASHSEED=0" in environment
    assert CANARY.encode() not in environment
    assert CANARY in os.environ["HF_TOKEN"]


def test_an_interrupted_call_does_not_answer_the_next_one(sandbox: Verifier) -> None:
    """Late verdicts would be read as those of the next answers, all shifted."""

    class AlarmError(Exception):
        pass

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise AlarmError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(AlarmError):
            sandbox.verify([TOWER] * 8)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert sandbox.verify([HALF, NOT_HALF]) == ["right", "wrong"]


@pytest.mark.parametrize(("dead", "verdict"), [(0, "right"), (1, "right"), (2, "died")])
def test_a_server_that_ends_is_replaced_once(dead: int, verdict: Verdict, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may have been killed by the system, and not by the answer."""
    servers: list[socket.socket] = []

    def start(sandbox: Verifier) -> socket.socket:
        sandbox._socket, server = socket.socketpair()
        servers.append(server)
        if len(servers) <= dead:
            server.close()
        else:
            server.sendall(b'["right"]\n')
        return sandbox._socket

    monkeypatch.setattr(Sandbox, "_start", start)
    with Verifier() as sandbox:
        assert sandbox.verify([HALF]) == [verdict]
    assert len(servers) == min(dead + 1, 2)
    for server in servers:
        server.close()


@pytest.mark.skipif(sys.platform != "linux", reason="waits by pidfd")
def test_a_forked_copy_has_its_own_server_that_dies_with_it(sandbox: Verifier) -> None:
    """As in a DataLoader's worker: two processes on one socket would read each other's verdicts."""
    sandbox.verify([HALF])
    pipe, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            verdicts = sandbox.verify([NOT_HALF, HALF])
            os.write(theirs, f"{server_of(sandbox)} {' '.join(verdicts)}".encode())
            signal.pause()
        finally:
            os._exit(1)
    os.close(theirs)
    server, *verdicts = os.read(pipe, 100).decode().split()
    assert verdicts == ["wrong", "right"]
    assert int(server) != server_of(sandbox)
    ended = os.pidfd_open(int(server))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert select.select([ended], [], [], 60)[0], "the server outlives the process that started it"
    assert sandbox.verify([HALF, NOT_HALF]) == ["right", "wrong"]
    os.close(pipe)
    os.close(ended)


@pytest.mark.parametrize("executable", ["/bin/false", "/nonexistent/python"])
def test_a_sandbox_that_cannot_start_says_so(executable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(FaultError, match=r"the sandbox for math_verify did not start .*import math_verify"):
        Verifier().verify([HALF])


def compare_with(work: Callable[[str, str], Verdict], *, memory: int = resource.RLIM_INFINITY) -> list[Verdict]:
    """Run the server's part in this process, with other work than math-verify's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        requests = [("", "first"), ("", "second"), ("", "third")]
        return cast(list[Verdict], module._call_all(theirs, work, requests, 0.5, memory, 2))


def test_each_way_to_fail_has_its_name_and_spares_the_others() -> None:
    def work(_reference: str, answer: str, failing: Callable[[], object]) -> Verdict:
        if answer == "second":
            failing()
        return "right"

    def fail(failing: Callable[[], object]) -> list[Verdict]:
        return compare_with(lambda reference, answer: work(reference, answer, failing))

    assert fail(lambda: os.kill(os.getpid(), signal.SIGKILL)) == ["right", "died", "right"]
    assert fail(lambda: os._exit(0)) == ["right", "died", "right"]
    assert fail(lambda: 1 / 0) == ["right", "error", "right"]
    assert fail(lambda: bytearray(1 << 62)) == ["right", "memory", "right"]
    assert fail(signal.pause) == ["right", "timeout", "right"]


def test_nothing_is_compared_once_the_other_end_is_gone() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, pytest.raises(ConnectionResetError):
        module._call_all(theirs, in_this_process, [HALF], 0.5, resource.RLIM_INFINITY, 1)


def test_a_worker_has_little_memory_and_no_files(tmp_path: Path) -> None:
    def work(_reference: str, answer: str) -> Verdict:
        limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE)]
        try:
            (tmp_path / answer).write_text("written")
        except OSError:
            return "right" if limits == [0, 0] else "wrong"
        return "wrong"

    assert compare_with(work) == ["right"] * 3
    if sys.platform == "linux":
        assert (
            compare_with(lambda _reference, _answer: "right" if bytearray(1 << 40) else "wrong", memory=1 << 40)
            == ["memory"] * 3
        )


FORMS = [
    r"\boxed{\frac{A}{B}}",
    r"\boxed{Ax^2+Bx-C}",
    r"\boxed{(A,B)}",
    r"\boxed{A\sqrt{B}}",
    r"\boxed{\{A,B,C\}}",
    r"\boxed{x=A}",
    r"\boxed{\log_{A}(B)}",
    r"\boxed{\frac{A\pi}{B}}",
    r"\boxed{[-A,B)}",
    r"\boxed{\begin{pmatrix}A\\B\end{pmatrix}}",
    r"\boxed{\text{A and B}}",
    r"The final answer is $Ax+B$. I hope it is correct.",
    r"so it is A/B",
    r"A%",
]


def harmless(count: int) -> list[tuple[str, str]]:
    """Return formulas of every kind with answers: about half equal, a few of these in another form, the others not."""
    draw = random.Random(0)
    pairs = [HALF, (r"\boxed{x^2+1}", r"\boxed{1+x^2}"), (r"$2\sqrt{3}$", r"$\sqrt{12}$"), (r"$\{1,2\}$", r"$\{2,1\}$")]
    for number in range(count - len(pairs)):
        form, (a, b, c) = FORMS[number % len(FORMS)], map(str, draw.sample(range(2, 30), 3))
        answer = form.replace("A", a if draw.random() < 0.5 else c).replace("B", b).replace("C", c)
        pairs.append((form.replace("A", a).replace("B", b).replace("C", c), answer))
    return pairs


def in_this_process(reference: str, answer: str) -> Verdict:
    from math_verify import parse, verify  # type: ignore[attr-defined, unused-ignore]

    return "right" if verify(parse(reference), parse(answer)) else "wrong"


def test_harmless_answers_get_the_verdicts_of_math_verify_in_this_process(sandbox: Verifier) -> None:
    for pair in harmless(4 + len(FORMS))[::2]:
        assert sandbox.verify([pair]) == [in_this_process(*pair)], pair


@pytest.mark.slow
def test_200_harmless_answers_get_the_verdicts_of_math_verify_in_this_process() -> None:
    pairs = harmless(200)
    with Verifier(seconds=10.0) as sandbox:
        verdicts = sandbox.verify(pairs)
    assert verdicts == [in_this_process(*pair) for pair in pairs]
    assert 60 < verdicts.count("right") < 160, "the table must hold both kinds"
