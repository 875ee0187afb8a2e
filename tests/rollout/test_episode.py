"""The loop: exactly the requested trajectories come back, as they were sampled, whatever the environments do."""

import json
import signal
import time
from dataclasses import replace
from hashlib import sha256
from queue import SimpleQueue
from threading import Barrier, Event, Semaphore, current_thread, main_thread

import pytest
from helpers.episodes import FORGETFUL, Counting, Scripted, attempts, by_id, contexts, played, retold, rollout_settings
from helpers.tiny import llama_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from bcft.environments.single_turn import SingleTurn
from bcft.errors import Preempted, ServerError, UsageError
from bcft.generation.hf import HFEngine
from bcft.generation.mode import sampling_mode
from bcft.policy.chat_template import Renderer
from bcft.policy.loading import ASSETS
from bcft.rollout.episode import GREEDY, Attempt, play
from bcft.rollout.threads import MOST_AT_ONCE
from bcft.types import Feedback, Problem, Request, Sampling, Trajectory, Turn, messages, problem_id

# A template that begins the action for the policy, and drops that beginning as soon as the action is history.
PREFILLING = FORGETFUL.replace(".split('>')[-1]", "").replace("{% endif %}", "quick: {% endif %}")


@pytest.fixture(scope="module")
def tokenizer():
    return llama_tokenizer(["say a number"], vocabulary=300)


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)


@pytest.mark.parametrize(("n", "samples"), [(0, 1), (1, 1), (3, 1), (5, 7)])
@pytest.mark.parametrize("make", [SingleTurn, Counting])
def test_exactly_the_requested_trajectories_come_back(renderer, make, n, samples):
    """The code this package replaces played 4,096 for 256."""
    requested = attempts(n, samples)
    trajectories = played(requested, make, renderer)
    assert len(trajectories) == n * samples
    assert {(t.problem_id, t.round, t.sample) for t in trajectories} == {
        (a.problem.id, a.round, a.sample) for a in requested
    }
    assert {t.id for t in trajectories} == {a.id for a in requested}


@pytest.mark.parametrize("template", ["llama", "forgetful", "prefilling", "plain"])
def test_the_contexts_of_a_trajectory_are_those_the_engine_got_and_its_actions_those_it_gave(tokenizer, template):
    if template == "plain":
        renderer = Renderer(llama_tokenizer(["say a number"], vocabulary=300, chat=False))
    else:
        other = {"forgetful": FORGETFUL, "prefilling": PREFILLING}
        renderer = Renderer(retold(other[template]) if template in other else tokenizer)
    engine = Scripted(renderer, say=lambda key: f"thinking of {key[5]}> {key[4]}")
    trajectories = played(attempts(), Counting, renderer, engine)
    requested = {r.key: r.context_ids for wave in engine.waves for r in wave}
    for t in trajectories:
        keys = [(0, "train", t.round, t.problem_id, t.sample, turn) for turn in range(len(t.turns))]
        assert list(contexts(t)) == [requested[key] for key in keys]
        assert [turn.action_ids for turn in t.turns] == [
            tuple(renderer.completions([engine.say(key)])[0]) for key in keys
        ]
        assert [turn.rewritten for turn in t.turns] == [False, *[template in ("forgetful", "prefilling")] * 2]


def test_a_conversation_reads_as_the_template_renders_it(renderer):
    engine = Scripted(renderer)
    (t,) = played(attempts(1, 1), Counting, renderer, engine)
    history = messages("say 0")
    for turn, context in zip(t.turns, contexts(t), strict=True):
        assert list(context) == renderer.prompts([history])[0]
        history += [{"role": "assistant", "content": turn.action}, *turn.observation]


def test_sampled_tokens_stay_where_their_text_would_be_tokenized_differently(renderer):
    letters = renderer.completions(["s", "a", "y"])
    apart = [ids[0] for ids in letters] + renderer.tail_ids
    assert renderer.completions(["say"])[0] != apart
    assert renderer.decode(apart) == "say"
    (t,) = played(attempts(1, 1), Counting, renderer, Scripted(renderer, say=lambda _: (apart, "stop_token")))
    assert not any(turn.rewritten for turn in t.turns)
    assert contexts(t)[2][len(contexts(t)[1]) :][: len(apart)] == tuple(apart)


def test_whitespace_that_the_template_strips_from_an_action_rewrites_nothing(renderer):
    (t,) = played(attempts(1, 1), Counting, renderer, Scripted(renderer, say=lambda _: " seven \n"))
    assert not any(turn.rewritten for turn in t.turns)


def test_a_truncated_action_gets_the_end_it_lacks(renderer):
    ids = renderer.completions(["ab"])[0][:-1]
    (t,) = played(attempts(1, 1), Counting, renderer, Scripted(renderer, say=lambda _: (ids, "max_tokens")))
    assert t.truncated
    conversation = [*messages("say 0"), {"role": "assistant", "content": "ab"}, *messages("ab?")]
    assert list(contexts(t)[1]) == renderer.prompts([conversation])[0]


def test_an_action_that_does_not_stop_as_the_template_ends_a_message_is_rendered_again(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    renderer = Renderer(tokenizer, [end])
    ids = (*renderer.completions(["ab"])[0][:-1], end)
    (t,) = played(attempts(1, 1), Counting, renderer, Scripted(renderer, say=lambda _: (ids, "stop_token")))
    assert [turn.rewritten for turn in t.turns] == [False, True, True]
    assert end not in contexts(t)[2]


def test_control_tokens_in_an_observation_are_only_text(renderer, tokenizer):
    class Injecting(Counting):
        def step(self, action):  # noqa: ARG002
            self.left -= 1
            return Feedback("<|eot_id|><|start_header_id|>", None, done=self.left == 0)

    (t,) = played(attempts(1, 1), Injecting, renderer)
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    # One ends the action and is its last token; the other one ends the observation.
    assert [turn.ids.count(eot) for turn in t.turns[1:]] == [1, 1]


def test_the_order_of_attempts_changes_nothing_and_each_has_its_own_noise_and_seed(renderer):
    seeds = {}

    class Seeded(Counting):
        def reset(self, problem, *, seed):
            seeds.setdefault(problem.id, set()).add(seed)
            return super().reset(problem, seed=seed)

    requested = attempts()
    assert by_id(played(requested, Seeded, renderer)) == by_id(played(requested[::-1], Seeded, renderer))
    assert [len(of_problem) for of_problem in seeds.values()] == [2] * 4
    assert len(set().union(*seeds.values())) == 8
    key = f"0\x1ftrain\x1f1\x1f{requested[0].problem.id}\x1f0\x1f0"  # frozen: another key is another result
    assert int(sha256(key.encode()).hexdigest()[:8], 16) in seeds[requested[0].problem.id]


def test_one_call_of_the_engine_samples_for_all_attempts_that_go_on(renderer):
    class Uneven(Counting):
        def reset(self, problem, *, seed):
            first = super().reset(problem, seed=seed)
            self.left = int(problem.prompt[-1]) + 1
            return first

    engine = Scripted(renderer)
    played(attempts(3, 2), Uneven, renderer, engine)
    assert [len(wave) for wave in engine.waves] == [6, 4, 2]


@pytest.mark.parametrize("max_turns", [1, 3])
def test_all_requests_of_an_attempt_belong_to_one_session_and_have_a_key_of_their_own(renderer, max_turns):
    engine = Scripted(renderer)
    played(attempts(2, 2), Counting, renderer, engine, max_turns=max_turns, seed=7, phase="dev")
    requests = [request for wave in engine.waves for request in wave]
    assert {r.key for r in requests} == {
        (7, "dev", 1, a.problem.id, a.sample, turn) for a in attempts(2, 2) for turn in range(max_turns)
    }
    assert all(r.session == r.key[:-1] for r in requests)


def test_only_the_attempt_without_noise_is_sampled_greedily(renderer):
    engine, warm = Scripted(renderer), Sampling(temperature=0.7, top_k=5)
    (first, second) = attempts(1, 2)
    played([replace(first, sample=GREEDY), second], SingleTurn, renderer, engine, sampling=warm)
    assert [r.sampling for r in engine.waves[0]] == [Sampling(temperature=0.0), warm]


def test_an_attempt_comes_back_while_the_engine_is_still_sampling(renderer, monkeypatch):
    """So that a journal can write it: the last action is sampled only after a trajectory was read."""
    read, answered = [], Semaphore(0)

    class Counted(SimpleQueue):
        def put(self, item):
            super().put(item)
            if item is not None and len(item) == 3:  # an answer, not a call
                answered.release()

    monkeypatch.setattr("bcft.rollout.threads.SimpleQueue", Counted)

    class Slow(Scripted):
        def generate(self, requests):
            first, second, third = super().generate(requests)
            yield first
            for _ in range(4):  # three resets and the first step
                answered.acquire()
            yield second
            assert read
            yield third

    settings = rollout_settings(SingleTurn, max_turns=1)
    for t in play(attempts(3, 1), settings, renderer, Slow(renderer), phase="train"):
        read.append(t)
    assert len(read) == 3


def test_environments_that_raise_hang_or_answer_nonsense_do_not_affect_the_others(renderer):
    requested = attempts(5, 1)
    hanging = Event()
    expected = by_id(played(requested, Counting, renderer))

    class Faulty(Counting):
        def step(self, action):
            if self.problem.prompt == "say 1":
                raise RuntimeError("the game\nis broken")
            if self.problem.prompt == "say 2" and self.left == 2:
                hanging.wait()
            if self.problem.prompt == "say 3":
                return "no feedback"
            return super().step(action)

    try:
        trajectories = by_id(played(requested, Faulty, renderer, step_timeout=1.0))
    finally:
        hanging.set()
    ids = [a.id for a in requested]
    assert [trajectories[i].ended for i in ids] == ["done", "error", "error", "error", "done"]
    assert [trajectories[i].error for i in ids[1:4]] == [
        "step raised RuntimeError: the game is broken",
        "step took longer than step_timeout, 1 s",
        "step returned str, not Feedback",
    ]
    assert [len(trajectories[i].turns) for i in ids] == [3, 1, 2, 1, 3]
    assert {i: trajectories[i] for i in (ids[0], ids[4])} == {i: expected[i] for i in (ids[0], ids[4])}


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda: 7, "reset's observation cannot be shown: ValueError: expected a string or a list of messages"),
        (lambda: [{"role": "user"}], "reset's observation cannot be shown: ValueError: message 0: a message is {role"),
        (
            lambda: [{"role": "assistant", "content": "4"}],
            "reset's observation cannot be shown: ValueError: the last message is the assistant's",
        ),
        (lambda: "\ud800", "reset's observation cannot be shown: ValueError: half of a surrogate pair"),
        (lambda: 1 / 0, "reset raised ZeroDivisionError: division by zero"),
        (lambda: exit(3), "reset raised SystemExit: 3"),
        (lambda: Feedback("x", float("nan"), done=False), "reset raised ValueError: reward must be a finite number"),
        (lambda: Feedback(None, 1.0, done=False), "reset raised ValueError: observation is None but done is False"),
    ],
)
def test_what_fails_before_the_first_turn_is_an_error_without_turns(renderer, fault, error):
    class Faulty(Counting):
        def reset(self, problem, *, seed):  # noqa: ARG002
            return fault()

    (t,) = played(attempts(1, 1), Faulty, renderer)
    assert (t.ended, t.turns) == ("error", ())
    assert t.error.startswith(error)
    assert json.loads(json.dumps(t.to_json()).encode()) == t.to_json()


def test_messages_the_template_refuses_are_an_error_of_their_attempt():
    refusing = "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endfor %}"

    class Impolite(Counting):
        def step(self, action):
            feedback = super().step(action)
            if "0" not in self.problem.prompt:
                return feedback
            return Feedback([{"role": "tool", "content": "x"}], None, feedback.done)

    trajectories = played(attempts(2, 1), Impolite, Renderer(retold(refusing + FORGETFUL)))
    assert sorted((t.ended, t.error.partition(":")[0]) for t in trajectories) == [
        ("done", ""), ("error", "step's observation cannot be shown"),
    ]  # fmt: skip


def test_a_hundred_steps_that_wait_for_each_other_pass(renderer):
    barrier = Barrier(100)
    assert MOST_AT_ONCE >= 100

    class Together(Counting):
        def step(self, action):
            barrier.wait(60)
            return super().step(action)

    assert {t.ended for t in played(attempts(100, 1), Together, renderer)} == {"done"}


def test_more_than_run_at_once_wait_for_their_turn(renderer):
    trajectories = played(attempts(MOST_AT_ONCE + 50, 2), Counting, renderer)
    assert {t.ended for t in trajectories} == {"done"}


def test_the_turn_limit_belongs_to_the_loop_and_a_full_context_ends_the_attempt(renderer):
    limited = played(attempts(), Counting, renderer, max_turns=2)
    assert {(t.ended, len(t.turns), t.success, t.truncated) for t in limited} == {("turn_limit", 2, "no", False)}
    exact = played(attempts(), Counting, renderer, max_turns=3)
    assert {(t.ended, len(t.turns), t.success, t.truncated) for t in exact} == {("done", 3, "yes", False)}
    full = played(attempts(), Counting, renderer, Scripted(renderer, say=lambda _: ((), "context_full")))
    assert {(t.ended, len(t.turns), t.truncated) for t in full} == {("turn_limit", 1, True)}


def test_an_environment_is_closed_once_after_its_last_step(renderer):
    closed = []

    class Holding(Counting):
        def step(self, action):
            if self.problem.prompt == "say 0":
                raise ValueError
            return super().step(action)

        def close(self):
            closed.append((self.problem.prompt, self.left))

    played(attempts(3, 1), Holding, renderer)
    played(attempts(3, 1), Holding, renderer, max_turns=1)
    assert sorted(closed) == [("say 0", 3)] * 2 + [("say 1", 0), ("say 1", 2), ("say 2", 0), ("say 2", 2)]


@pytest.fixture
def held():
    """A class of environments that count how often each one is closed, and its instances."""

    class Held(Counting):
        made = []  # noqa: RUF012

        def __init__(self):
            self.closed = 0
            self.made.append(self)

        def close(self):
            self.closed += 1

    return Held


def closed(held):
    """Return how often each environment was closed."""
    return [environment.closed for environment in held.made]


@pytest.mark.parametrize("instant", [False, True])
@pytest.mark.parametrize("fault", ["reset raises", "reset cannot be shown", "step raises", "step cannot be shown"])
def test_an_environment_that_fails_is_closed_once(held, instant, fault):
    class Failing(held):
        def reset(self, problem, *, seed):
            first = super().reset(problem, seed=seed)
            if fault == "reset raises":
                raise ValueError
            return 7 if fault == "reset cannot be shown" else first

        def step(self, action):
            if fault == "step raises":
                raise ValueError
            feedback = super().step(action)
            return Feedback([{"role": "tool", "content": "x"}], None, feedback.done)

    Failing.instant = instant
    refusing = "{% for m in messages if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endfor %}"
    trajectories = played(attempts(3, 2), Failing, Renderer(retold(refusing + FORGETFUL)))
    assert [t.ended for t in trajectories] == ["error"] * 6
    assert all(t.error.startswith(fault.split()[0]) for t in trajectories)
    assert closed(held) == [1] * 6


@pytest.mark.parametrize("instant", [False, True])
@pytest.mark.parametrize("reason", ["the engine fails", "the engine leaves requests", "the caller stops reading"])
def test_when_the_loop_ends_early_every_open_environment_is_closed_once(renderer, held, instant, reason):
    held.instant = instant

    class Failing(Scripted):
        def generate(self, requests):
            actions = list(super().generate(requests))
            if len(self.waves) == 2:
                yield actions[0]
                if reason == "the engine fails":
                    raise MemoryError
                if reason == "the engine leaves requests":
                    return
            yield from actions

    class Uneven(held):
        def step(self, action):
            feedback = super().step(action)
            return Feedback(None, None, done=True) if "0" in self.problem.prompt else feedback

    trajectories = play(attempts(4, 2), rollout_settings(Uneven), renderer, Failing(renderer), phase="train")
    if reason == "the caller stops reading":
        assert next(trajectories).ended == "done"
        trajectories.close()
    else:
        with pytest.raises(MemoryError if reason == "the engine fails" else AssertionError):
            list(trajectories)
    # A call that was still running is given up; its thread closes the environment when the call returns.
    deadline = time.monotonic() + 60
    while closed(held) != [1] * 8 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert closed(held) == [1] * 8


@pytest.mark.parametrize("call", ["reset", "step"])
def test_an_environment_that_hangs_is_closed_once_when_its_call_returns(renderer, held, call):
    hanging, left = Event(), Semaphore(0)

    class Hanging(held):
        def reset(self, problem, *, seed):
            if call == "reset":
                hanging.wait()
            return super().reset(problem, seed=seed)

        def step(self, action):
            hanging.wait()
            return super().step(action)

        def close(self):
            super().close()
            left.release()

    try:
        trajectories = played(attempts(3, 1), Hanging, renderer, step_timeout=0.1)
        assert {t.error for t in trajectories} == {f"{call} took longer than step_timeout, 0.1 s"}
        assert closed(held) == [0] * 3
    finally:
        hanging.set()
    assert all(left.acquire(timeout=60) for _ in range(3))
    assert closed(held) == [1] * 3


def test_a_close_that_raises_after_the_last_step_is_an_error_of_its_attempt_and_is_not_repeated(renderer, held):
    class Stuck(held):
        def close(self):
            super().close()
            raise RuntimeError("cannot close")

    trajectories = played(attempts(2, 1), Stuck, renderer)
    assert {(t.ended, t.error) for t in trajectories} == {("error", "step raised RuntimeError: cannot close")}
    assert closed(held) == [1] * 2


@pytest.mark.parametrize("instant", [False, True])
def test_environments_run_in_the_loops_own_thread_only_where_instant_is_true(renderer, instant):
    threads = set()

    class Noting(Counting):
        def step(self, action):
            threads.add(current_thread() is main_thread())
            return super().step(action)

    Noting.instant = instant
    assert {t.ended for t in played(attempts(), Noting, renderer)} == {"done"}
    assert threads == {instant}


@pytest.fixture
def preempted():
    """SIGTERM raises Preempted, as it does in every command."""

    def preempt(*_):
        raise Preempted("asked to stop")

    before = signal.signal(signal.SIGTERM, preempt)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("preempted")
@pytest.mark.parametrize("call", ["reset", "step"])
@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_during_a_call_of_an_instant_environment_stops_the_loop(renderer, held, call, number, error):
    class Struck(held):
        instant = True

        def strike(self, when):
            if when == call and self.problem.prompt == "say 1":
                signal.raise_signal(number)

        def reset(self, problem, *, seed):
            first = super().reset(problem, seed=seed)
            self.strike("reset")
            return first

        def step(self, action):
            self.strike("step")
            return super().step(action)

    with pytest.raises(error):
        played(attempts(3, 1), Struck, renderer)
    assert closed(held) == [1] * (2 if call == "reset" else 3)


@pytest.mark.usefixtures("preempted")
def test_a_signal_while_environments_run_in_threads_stops_the_loop_and_closes_them(renderer, held):
    started = Semaphore(0)

    class Working(held):
        def step(self, action):
            started.release()
            time.sleep(0.2)
            return super().step(action)

    class Struck(Scripted):
        def generate(self, requests):
            for action in super().generate(requests):
                yield action
                started.acquire()
                if action.key[3] == requests[0].key[3]:
                    signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Preempted):
        played(attempts(3, 1), Working, renderer, Struck(renderer))
    deadline = time.monotonic() + 60
    while closed(held) != [1] * 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # a second close would come by now
    assert closed(held) == [1] * 3


@pytest.mark.parametrize("error", [ServerError, UsageError, Preempted, KeyboardInterrupt])
def test_what_was_answered_before_the_engine_is_interrupted_still_comes_back(renderer, held, error):
    """An answer may be paid for. Nobody who interrupts waits for an environment that is slow."""
    hanging, left = Event(), Semaphore(0)
    waits = error in (ServerError, UsageError)

    class Slow(held):
        def step(self, action):
            if self.problem.prompt == "say 2":
                hanging.wait()
            return super().step(action)

        def close(self):
            super().close()
            left.release()

    class Interrupted(Scripted):
        def generate(self, requests):
            actions = list(super().generate(requests))[:3]
            yield from actions
            assert all(left.acquire(timeout=60) for _ in range(2))  # closed after their last step
            time.sleep(0.2)  # their threads hand over the answers
            if waits:
                hanging.set()
            raise error("interrupted")

    read = []
    try:
        settings = rollout_settings(Slow, max_turns=1)
        with pytest.raises(error, match="interrupted"):
            read.extend(play(attempts(4, 1), settings, renderer, Interrupted(renderer), phase="train"))
    finally:
        hanging.set()
    assert len(read) == (3 if waits else 2)


@pytest.mark.parametrize("instant", [False, True])
def test_an_environment_that_exits_is_an_error_of_its_attempt(renderer, instant):
    class Exiting(Counting):
        def step(self, action):  # noqa: ARG002
            raise SystemExit(3)

    Exiting.instant = instant
    assert {t.error for t in played(attempts(2, 1), Exiting, renderer)} == {"step raised SystemExit: 3"}


def test_equal_attempts_are_refused(renderer):
    with pytest.raises(ValueError, match="same problem, round and sample"):
        played(attempts(1, 1) * 2, SingleTurn, renderer)


@pytest.mark.parametrize(
    ("name", "values"),
    [("max_turns", "0, 40 and 60.0"), ("max_new_tokens", "5, 0 and 60.0"), ("step_timeout", "5, 40 and 0")],
)
def test_limits_that_are_not_positive_are_refused(renderer, name, values):
    with pytest.raises(ValueError, match=f"{name}.* must be positive, not {values}$"):
        played([], SingleTurn, renderer, **{name: 0})


def test_with_the_embedded_policy_single_turn_is_what_the_engine_samples_and_batches_change_no_token():
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-math")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-math")
    renderer = Renderer(tokenizer)
    texts = ["Work out 47 + 35 - 36 + 21.", "Work out 12 + 15 + 26 + 11."]
    requested = [Attempt(Problem(problem_id(text), text), 3, k) for text in texts for k in range(3)]
    with sampling_mode(model):
        together, apart = (
            by_id(played(given, make, renderer, HFEngine(model, pad_id=0, rows=rows), max_turns=2, max_new_tokens=60))
            for given, make, rows in ((requested, SingleTurn, 6), (requested[::-1], SingleTurn, 1))
        )
        requests = [
            Request((0, "train", 3, a.problem.id, a.sample, 0), tuple(renderer.prompts([a.problem.prompt])[0]),
                    Sampling(), renderer.stop_ids, 60)
            for a in requested
        ]  # fmt: skip
        actions = {f"3-{a.key[3]}-{a.key[4]}": a for a in HFEngine(model, pad_id=0).generate(requests)}
        twice = played(requested, Counting, renderer, HFEngine(model, pad_id=0), max_turns=2, max_new_tokens=60)
    assert together == apart
    assert {i: (t.turns[0].action_ids, t.turns[0].stop) for i, t in together.items()} == {
        i: (a.ids, a.stop) for i, a in actions.items()
    }
    assert all(t.ended == "done" and len(t.turns) == 1 for t in together.values())
    for t in twice:
        assert t.turns[0].action_ids == actions[t.id].ids
        assert not t.turns[1].rewritten


def test_two_turns_by_hand(renderer, tokenizer):
    class Guess:
        def reset(self, problem, *, seed):  # noqa: ARG002
            return [{"role": "system", "content": "terse"}, *messages(problem.prompt)]

        def step(self, action):
            return Feedback("right" if action == "7" else "higher", -1.0, done=action == "7", success=action == "7")

    problem = Problem("p", "guess")
    (t,) = played([Attempt(problem, 1, 0)], Guess, renderer, Scripted(renderer, say=lambda key: "57"[key[5]]))
    head = renderer.prompts([[{"role": "system", "content": "terse"}, {"role": "user", "content": "guess"}]])[0]
    between = tokenizer(
        "<|start_header_id|>user<|end_header_id|>\n\nhigher<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        add_special_tokens=False,
    )["input_ids"]
    five, seven = (tuple(ids) for ids in renderer.completions(["5", "7"]))
    assert t == Trajectory(
        round=1, problem_id="p", sample=0, ended="done", error="",
        turns=(
            Turn("5", tuple(head), five, "stop_token", False, tuple(messages("higher")), True, -1.0, "no"),
            Turn("7", tuple(between), seven, "stop_token", False, tuple(messages("right")), True, -1.0, "yes"),
        ),
            opening=({"role": "system", "content": "terse"}, {"role": "user", "content": "guess"}),
    )  # fmt: skip
    assert (t.environment_reward, t.success, t.truncated) == (-2.0, "yes", False)
    assert contexts(t) == (tuple(head), (*head, *five, *between))
