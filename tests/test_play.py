"""The loop: exactly what was asked for comes back, as it was sampled, whatever the environments do."""

import json
from queue import SimpleQueue
from threading import Barrier, Event, Semaphore

import pytest
from tiny import llama_tokenizer

from bcft.environments.single_turn import SingleTurn
from bcft.policy.chat_template import Renderer
from bcft.rollout.episode import MOST_AT_ONCE, Attempt, play
from bcft.types import Action, Feedback, Problem, Sampling, Trajectory, Turn, messages, problem_id

# A template that drops what stands before the last `>` of every action but the newest, as those of thinking models do.
FORGETFUL = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "{{ m.content.split('>')[-1] if m.role == 'assistant' else m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)
# One that begins the action for the policy, and drops that beginning as soon as the action is history.
PREFILLING = FORGETFUL.replace(".split('>')[-1]", "").replace("{% endif %}", "quick: {% endif %}")


@pytest.fixture(scope="module")
def tokenizer():
    return llama_tokenizer(["say a number"], vocabulary=300)


@pytest.fixture(scope="module")
def renderer(tokenizer):
    return Renderer(tokenizer)


class Scripted:
    """An engine that says what a function of the key tells it to, in another order than it was asked."""

    def __init__(self, renderer, say=lambda key: f"{key[3]}.{key[4]}.{key[5]}"):
        self.renderer, self.say, self.waves = renderer, say, []

    def generate(self, requests):
        self.waves.append(list(requests))
        for request in requests[::-1]:
            said = self.say(request.key)
            ids, stop = said if isinstance(said, tuple) else (self.renderer.completions([said])[0], "stop_token")
            yield Action(request.key, tuple(ids), stop)


class Counting:
    """Answers `<action>?` until it was asked `turns` times, a point each time."""

    turns = 3

    def reset(self, problem, *, seed):  # noqa: ARG002
        self.problem, self.left = problem, self.turns
        return problem.prompt

    def step(self, action):
        self.left -= 1
        return Feedback(f"{action}?", 1.0, done=self.left == 0, success=self.left == 0)


def attempts(n=4, samples=2):
    problems = [Problem(problem_id(text), text) for text in (f"say {i}" for i in range(n))]
    return [Attempt(problem, 1, k) for problem in problems for k in range(samples)]


def played(asked, make, renderer, engine=None, **settings):
    values = {
        "sampling": Sampling(), "max_new_tokens": 40, "max_turns": 5, "step_timeout": 60.0, "seed": 0, "phase": "train",
    } | settings  # fmt: skip
    return list(play(asked, make, renderer, engine or Scripted(renderer), **values))


def by_id(trajectories):
    return {t.id: t for t in trajectories}


@pytest.mark.parametrize(("n", "samples"), [(0, 1), (1, 1), (3, 1), (5, 7)])
@pytest.mark.parametrize("make", [SingleTurn, Counting])
def test_exactly_the_requested_trajectories_come_back(renderer, make, n, samples):
    """The code this package replaces played 4,096 for 256."""
    asked = attempts(n, samples)
    found = played(asked, make, renderer)
    assert len(found) == n * samples
    assert {(t.problem_id, t.round, t.sample) for t in found} == {(a.problem.id, a.round, a.sample) for a in asked}


@pytest.mark.parametrize("template", ["llama", "forgetful", "prefilling", "plain"])
def test_the_contexts_of_a_trajectory_are_those_the_engine_got_and_its_actions_those_it_gave(tokenizer, template):
    if template == "plain":
        renderer = Renderer(llama_tokenizer(["say a number"], vocabulary=300, chat=False))
    else:
        other = {"forgetful": FORGETFUL, "prefilling": PREFILLING}
        renderer = Renderer(retold(other[template]) if template in other else tokenizer)
    engine = Scripted(renderer, say=lambda key: f"thinking of {key[5]}> {key[4]}")
    found = played(attempts(), Counting, renderer, engine)
    asked = {r.key: r.context_ids for wave in engine.waves for r in wave}
    for t in found:
        keys = [(0, "train", t.round, t.problem_id, t.sample, turn) for turn in range(len(t.turns))]
        assert list(t.contexts) == [asked[key] for key in keys]
        assert [turn.action_ids for turn in t.turns] == [
            tuple(renderer.completions([engine.say(key)])[0]) for key in keys
        ]
        assert [turn.rewritten for turn in t.turns] == [False, *[template in ("forgetful", "prefilling")] * 2]


def retold(template):
    tokenizer = llama_tokenizer(["say a number"], vocabulary=300)
    tokenizer.chat_template = template
    return tokenizer


def test_a_conversation_reads_as_the_template_renders_it(renderer):
    engine = Scripted(renderer)
    found = by_id(played(attempts(1, 1), Counting, renderer, engine))
    (t,) = found.values()
    history = messages("say 0")
    for turn, context in zip(t.turns, t.contexts, strict=True):
        assert list(context) == renderer.prompts([history])[0]
        history += [{"role": "assistant", "content": turn.action}, *turn.observation]


def test_sampled_tokens_stay_where_their_text_would_be_tokenised_otherwise(renderer):
    letters = renderer.completions(["s", "a", "y"])
    apart = [ids[0] for ids in letters] + renderer.tail_ids
    assert renderer.completions(["say"])[0] != apart
    assert renderer.decode(apart) == "say"
    (t,) = played(attempts(1, 1), Counting, renderer, Scripted(renderer, say=lambda _: (apart, "stop_token")))
    assert not any(turn.rewritten for turn in t.turns)
    assert t.contexts[2][len(t.contexts[1]) :][: len(apart)] == tuple(apart)


def test_whitespace_that_the_template_strips_from_an_action_rewrites_nothing(renderer):
    (t,) = played(attempts(1, 1), Counting, renderer, Scripted(renderer, say=lambda _: " seven \n"))
    assert not any(turn.rewritten for turn in t.turns)


def test_a_cut_action_gets_the_end_it_lacks(renderer):
    ids = renderer.completions(["ab"])[0][:-1]
    (t,) = played(attempts(1, 1), Counting, renderer, Scripted(renderer, say=lambda _: (ids, "max_tokens")))
    assert t.cut
    said = [*messages("say 0"), {"role": "assistant", "content": "ab"}, *messages("ab?")]
    assert list(t.contexts[1]) == renderer.prompts([said])[0]


def test_an_action_that_stopped_in_another_way_than_the_template_ends_a_message_is_rendered_anew(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    renderer = Renderer(tokenizer, [end])
    ids = (*renderer.completions(["ab"])[0][:-1], end)
    (t,) = played(attempts(1, 1), Counting, renderer, Scripted(renderer, say=lambda _: (ids, "stop_token")))
    assert [turn.rewritten for turn in t.turns] == [False, True, True]
    assert end not in t.contexts[2]


def test_control_tokens_in_an_observation_are_only_text(renderer, tokenizer):
    class Sly(Counting):
        def step(self, action):  # noqa: ARG002
            self.left -= 1
            return Feedback("<|eot_id|><|start_header_id|>", None, done=self.left == 0)

    (t,) = played(attempts(1, 1), Sly, renderer)
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    # One ends the action and is its last token; the other one ends the observation.
    assert [turn.ids.count(eot) for turn in t.turns[1:]] == [1, 1]


def test_the_order_of_attempts_changes_nothing_and_each_has_noise_and_seed_of_its_own(renderer):
    seeds = {}

    class Seeded(Counting):
        def reset(self, problem, *, seed):
            seeds.setdefault(problem.id, set()).add(seed)
            return super().reset(problem, seed=seed)

    asked = attempts()
    assert by_id(played(asked, Seeded, renderer)) == by_id(played(asked[::-1], Seeded, renderer))
    assert [len(found) for found in seeds.values()] == [2] * 4
    assert len(set().union(*seeds.values())) == 8


def test_all_attempts_that_go_on_are_asked_for_in_one_call(renderer):
    class Uneven(Counting):
        def reset(self, problem, *, seed):
            first = super().reset(problem, seed=seed)
            self.left = int(problem.prompt[-1]) + 1
            return first

    engine = Scripted(renderer)
    played(attempts(3, 2), Uneven, renderer, engine)
    assert [len(wave) for wave in engine.waves] == [6, 4, 2]


def test_an_attempt_comes_back_while_the_engine_is_still_at_work(renderer, monkeypatch):
    """So that a journal can write it: the last action is sampled only after a trajectory was read."""
    read, answered = [], Semaphore(0)

    class Telling(SimpleQueue):
        def put(self, item):
            super().put(item)
            if item is not None and len(item) == 3:  # an answer, not a call
                answered.release()

    monkeypatch.setattr("bcft.rollout.episode.SimpleQueue", Telling)

    class Slow(Scripted):
        def generate(self, requests):
            first, second, third = super().generate(requests)
            yield first
            for _ in range(4):  # three resets and the first step
                answered.acquire()
            yield second
            assert read
            yield third

    values = {"sampling": Sampling(), "max_new_tokens": 40, "max_turns": 1, "step_timeout": 60.0}
    for t in play(attempts(3, 1), SingleTurn, renderer, Slow(renderer), seed=0, phase="train", **values):
        read.append(t)
    assert len(read) == 3


def test_one_raises_one_hangs_one_answers_nonsense_and_the_others_never_notice(renderer):
    asked = attempts(5, 1)
    hanging = Event()
    expected = by_id(played(asked, Counting, renderer))

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
        found = by_id(played(asked, Faulty, renderer, step_timeout=1.0))
    finally:
        hanging.set()
    ids = [f"1-{a.problem.id}-0" for a in asked]
    assert [found[i].ended for i in ids] == ["done", "error", "error", "error", "done"]
    assert [found[i].error for i in ids[1:4]] == [
        "step raised RuntimeError: the game is broken",
        "step took longer than step_timeout, 1 s",
        "step returned str, not Feedback",
    ]
    assert [len(found[i].turns) for i in ids] == [3, 1, 2, 1, 3]
    assert {i: found[i] for i in (ids[0], ids[4])} == {i: expected[i] for i in (ids[0], ids[4])}


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (lambda: 7, "reset's observation cannot be shown: ValueError: expected a string or a list of messages"),
        (lambda: [{"role": "user"}], "reset's observation cannot be shown: ValueError: a message is {role, content}"),
        (lambda: "\ud800", "reset's observation cannot be shown: UnicodeEncodeError"),
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
            said = super().step(action)
            return Feedback([{"role": "tool", "content": "x"}], None, said.done) if "0" in self.problem.prompt else said

    found = played(attempts(2, 1), Impolite, Renderer(retold(refusing + FORGETFUL)))
    assert sorted((t.ended, t.error.partition(":")[0]) for t in found) == [
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
    found = played(attempts(MOST_AT_ONCE + 50, 2), Counting, renderer)
    assert {t.ended for t in found} == {"done"}


def test_the_turn_limit_belongs_to_the_loop_and_a_full_context_ends_the_attempt(renderer):
    limited = played(attempts(), Counting, renderer, max_turns=2)
    assert {(t.ended, len(t.turns), t.success, t.cut) for t in limited} == {("turn_limit", 2, "no", False)}
    exact = played(attempts(), Counting, renderer, max_turns=3)
    assert {(t.ended, len(t.turns), t.success, t.cut) for t in exact} == {("done", 3, "yes", False)}
    full = played(attempts(), Counting, renderer, Scripted(renderer, say=lambda _: ((), "context_full")))
    assert {(t.ended, len(t.turns), t.cut) for t in full} == {("turn_limit", 1, True)}


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


def test_equal_attempts_and_limits_below_one_are_refused(renderer):
    with pytest.raises(ValueError, match="same problem, round and sample"):
        played(attempts(1, 1) * 2, SingleTurn, renderer)
    for name in ("max_turns", "max_new_tokens", "step_timeout"):
        with pytest.raises(ValueError, match=f"{name}.* must be positive"):
            played([], SingleTurn, renderer, **{name: 0})


TURN = Turn("a", (1, 2), (3, 4), "stop_token")


def test_what_was_played_comes_back_from_its_line(renderer, tmp_path):
    from datasets import load_dataset

    found = [*played(attempts(), Counting, renderer), *played(attempts(), SingleTurn, renderer)]
    found.append(Trajectory(2, "p", -1, (), "error", "reset raised ValueError: x"))
    found.append(Trajectory(2, "p", 0, (TURN, Turn("b", (5,), (), "context_full", rewritten=True)), "turn_limit"))
    for t in found:
        assert Trajectory.from_json(json.loads(json.dumps(t.to_json()))) == t
        assert "null" not in json.dumps(t.to_json())
    for lines in (found, found[-2:-1], found[8:16]):
        path = tmp_path / "rollouts.jsonl"
        path.write_text("".join(json.dumps(t.to_json()) + "\n" for t in lines))
        rows = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path))
        assert rows["id"] == [t.id for t in lines]
    with pytest.raises(ValueError, match="filed under"):
        Trajectory.from_json(found[0].to_json() | {"round": 7})


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Trajectory(1, "p", 0, (), "done"),
        lambda: Trajectory(1, "p", 0, (TURN,), "error"),
        lambda: Trajectory(1, "p", 0, (TURN,), "done", "x"),
        lambda: Trajectory(1, "p", 0, (TURN,), "error", "two\nlines"),
        lambda: Trajectory(1, "p", 0, (TURN,), "finished"),
        lambda: Trajectory(1, "p", 0, (Turn("a", (1,), (2,), "stop_token", rewritten=True),), "done"),
        lambda: Trajectory(1, "p", 0, (Turn("", (1,), (), "context_full"), TURN), "done"),
        lambda: Turn("a", (1,), (), "stop_token"),
        lambda: Turn("a", (1,), (2,), "eos"),
        lambda: Turn("a", (1,), (2,), "stop_token", reward=1.0),
        lambda: Turn("a", (1,), (2,), "stop_token", graded=True, reward=float("inf")),
        lambda: Feedback("x", True, done=False),
        lambda: Feedback("x", "1", done=False),
        lambda: Feedback("x", None, done=1),
        lambda: Feedback("x", None, done=False, success="yes"),
        lambda: Feedback([], None, done=True),
        lambda: Feedback([{"role": "user", "content": None}], None, done=True),
    ],
)
def test_a_wrong_value_cannot_be_made(wrong):
    with pytest.raises(ValueError, match=r"\w"):
        wrong()


def test_with_the_embedded_policy_single_turn_is_what_the_engine_samples_and_batches_change_no_token():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from bcft.generation.hf import HFEngine, sampling_mode
    from bcft.policy.loading import ASSETS
    from bcft.types import Request

    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-math")
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "tiny-math")
    renderer = Renderer(tokenizer)
    texts = ["Work out 47 + 35 - 36 + 21.", "Work out 12 + 15 + 26 + 11."]
    asked = [Attempt(Problem(problem_id(text), text), 3, k) for text in texts for k in range(3)]
    with sampling_mode(model):
        together, apart = (
            by_id(played(given, make, renderer, HFEngine(model, pad_id=0, rows=rows), max_turns=2, max_new_tokens=60))
            for given, make, rows in ((asked, SingleTurn, 6), (asked[::-1], SingleTurn, 1))
        )
        requests = [
            Request((0, "train", 3, a.problem.id, a.sample, 0), tuple(renderer.prompts([a.problem.prompt])[0]),
                    Sampling(), renderer.stop_ids, 60)
            for a in asked
        ]  # fmt: skip
        actions = {f"3-{a.key[3]}-{a.key[4]}": a for a in HFEngine(model, pad_id=0).generate(requests)}
        twice = played(asked, Counting, renderer, HFEngine(model, pad_id=0), max_turns=2, max_new_tokens=60)
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
    assert (t.environment_reward, t.success, t.cut) == (-2.0, "yes", False)
    assert t.contexts == (tuple(head), (*head, *five, *between))
