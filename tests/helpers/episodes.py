"""Shared by tests of episodes: scripted engines, small environments, templates that rewrite earlier messages."""

from helpers.tiny import llama_tokenizer

from bcft.rollout.episode import Attempt, play
from bcft.types import Action, Feedback, Problem, RolloutSettings, Sampling, problem_id

# A template that drops everything before the last `>` of every action but the newest, as those of thinking models do.
FORGETFUL = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>"
    "{{ m.content.split('>')[-1] if m.role == 'assistant' and not loop.last else m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)


def retold(template):
    """Return a tokenizer with another chat template."""
    tokenizer = llama_tokenizer(["say a number"], vocabulary=300)
    tokenizer.chat_template = template
    return tokenizer


class Scripted:
    """An engine that says what a function of the key returns; actions come in the reverse order of the requests."""

    def __init__(self, renderer, say=lambda key: f"{key[3]}.{key[4]}.{key[5]}"):
        self.renderer, self.say, self.waves = renderer, say, []

    def generate(self, requests):
        self.waves.append(list(requests))
        for request in requests[::-1]:
            script = self.say(request.key)
            ids, stop = script if isinstance(script, tuple) else (self.renderer.completions([script])[0], "stop_token")
            yield Action(request.key, tuple(ids), stop)


class Counting:
    """An environment that answers `<action>?` and gives a point, `turns` times."""

    turns = 3

    def reset(self, problem, *, seed):  # noqa: ARG002
        self.problem, self.left = problem, self.turns
        return problem.prompt

    def step(self, action):
        self.left -= 1
        return Feedback(f"{action}?", 1.0, done=self.left == 0, success=self.left == 0)


def attempts(n=4, samples=2):
    """Return attempts of round 1: `samples` at each of the problems `say 0`, `say 1` and so on."""
    problems = [Problem(problem_id(text), text) for text in (f"say {i}" for i in range(n))]
    return [Attempt(problem, 1, k) for problem in problems for k in range(samples)]


def rollout_settings(make, **changes):
    """Return settings of five turns and 40 tokens, with changes."""
    values = {"sampling": Sampling(), "max_new_tokens": 40, "max_turns": 5, "step_timeout": 60.0, "seed": 0} | changes
    return RolloutSettings(make, **values)


def played(requested, make, renderer, engine=None, *, phase="train", **changes):
    """Return the trajectories of attempts in the order they finish; the engine is `Scripted` by default."""
    settings = rollout_settings(make, **changes)
    return list(play(requested, settings, renderer, engine or Scripted(renderer), phase=phase))


def by_id(trajectories):
    """Return trajectories by their ids."""
    return {t.id: t for t in trajectories}


def contexts(trajectory):
    """Return the ids that the policy read before each action."""
    whole = []
    for turn in trajectory.turns:
        before = whole[-1] + trajectory.turns[len(whole) - 1].action_ids if whole and not turn.rewritten else ()
        whole.append(before + turn.ids)
    return tuple(whole)
