"""Play with templates and tokenizers of all kinds: the problem's arguments, lost observations, no turn rewritten."""

import pytest
from helpers.episodes import Counting, Scripted, played
from helpers.trained_tokenizers import KINDS, TRL, renderer_of, tokenizer

from bcft.policy.chat_template import Renderer
from bcft.rollout.episode import Attempt
from bcft.types import Feedback, Problem

NO_THOUGHT = {"enable_thinking": False}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama2", "mistral_v03", "zephyr", "smollm2", "llama3_2", "qwen2_5", "gemma3"])
def test_a_later_turn_is_not_rewritten_for_a_space_or_a_line_break(name, kind):
    renderer = renderer_of(name, kind)

    class AsRendered(Scripted):
        """A policy that writes exactly as its template does."""

        def generate(self, requests):
            lead, tail = renderer.texts("?", "x")[1].split("x")
            for request in requests:
                text = f"{lead}It is {request.key[5]}.{tail}"
                yield from Scripted(renderer, say=lambda _, text=text: (ids(text), "stop_token")).generate([request])

    def ids(text):
        return renderer.rows([(renderer.texts("?", "x")[0], text)])[0][1]

    (trajectory,) = played([Attempt(Problem("p", "What is 6?"), 1, 0)], Counting, renderer, AsRendered(renderer))
    assert [turn.rewritten for turn in trajectory.turns] == [False] * 3
    assert [turn.action.strip(" ") for turn in trajectory.turns] == [f"It is {number}." for number in range(3)]
    context = [token for turn in trajectory.turns for token in (*turn.ids, *turn.action_ids)]
    conversation = [{"role": "user", "content": "What is 6?"}, *trajectory.messages]
    whole, last = renderer.texts(conversation[:-1], conversation[-1]["content"])
    shown = renderer.tokenizer(whole + last, add_special_tokens=False)["input_ids"]
    assert renderer.tokenizer.decode(context) == renderer.tokenizer.decode(shown)


@pytest.mark.parametrize("kind", KINDS)
def test_a_problems_template_arguments_decide_what_its_attempts_read(kind):
    renderer = Renderer(tokenizer(kind, TRL["qwen3"]))
    plain = Problem("p", "What is 6?")
    without = Problem("q", "What is 6?", {"chat_template_kwargs": NO_THOUGHT})
    first, second = (
        played([Attempt(problem, 1, 0)], Counting, renderer)[0] for problem in (plain, without)
    )  # fmt: skip
    both = played([Attempt(plain, 1, 0), Attempt(without, 1, 0)], Counting, renderer)
    assert sorted(both, key=lambda t: t.problem_id) == [first, second]
    assert list(first.turns[0].ids) == renderer.prompts(["What is 6?"])[0]
    assert list(second.turns[0].ids) == renderer.prompts(["What is 6?"], [NO_THOUGHT])[0]
    assert first.turns[0].ids != second.turns[0].ids
    last = renderer.tokenizer.decode(second.turns[-1].ids)
    assert last.rstrip(" ").endswith("<think>\n\n</think>\n\n")


class Telling(Counting):
    """An environment that answers as a tool."""

    def step(self, action):
        feedback = super().step(action)
        return Feedback([{"role": "tool", "content": "the words"}], feedback.reward, feedback.done, feedback.success)


@pytest.mark.parametrize("name", ["phi3", "cohere2", "gemma4", "diffusion_gemma", "phi3_5"])
def test_an_observation_that_the_template_loses_is_an_error_of_its_attempt(name):
    (trajectory,) = played([Attempt(Problem("p", "What is 6?"), 1, 0)], Telling, renderer_of(name, "bytes"))
    assert trajectory.ended == "error"
    assert "does not render the tool's text 'the words'" in trajectory.error


@pytest.mark.parametrize("name", ["qwen2_5", "llama3_1", "lfm2", "qwen3", "gemma4_v2"])
def test_observations_of_a_tool_are_played_where_the_template_has_the_role(name):
    (trajectory,) = played([Attempt(Problem("p", "What is 6?"), 1, 0)], Telling, renderer_of(name, "bytes"))
    assert trajectory.ended == "done"
    assert "the words" in renderer_of(name, "bytes").tokenizer.decode(trajectory.turns[1].ids)


def test_the_words_of_a_channel_are_the_action_and_every_turn_is_as_the_template_renders_it():
    renderer = renderer_of("gptoss", "bytes")
    thought = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>It is 6.<|return|>"
    ids = tuple(renderer.tokenizer(thought, add_special_tokens=False)["input_ids"])
    engine = Scripted(renderer, say=lambda _: (ids, "stop_token"))
    (trajectory,) = played([Attempt(Problem("p", "What is 6?"), 1, 0)], Counting, renderer, engine)
    assert [turn.action for turn in trajectory.turns] == ["It is 6."] * 3
    assert [turn.rewritten for turn in trajectory.turns] == [False, True, True]
    assert "hm" not in renderer.tokenizer.decode(trajectory.turns[-1].ids)
