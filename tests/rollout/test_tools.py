"""Tools in play: calls as templates write them, results behind the very ids that were sampled, malformed calls."""

import json
import re
from pathlib import Path

import pytest
from helpers.episodes import Scripted, played
from helpers.tools import Calculator, Counter, Described, call, calling
from helpers.trained_tokenizers import TRL, renderer_of, tokenizer, user

from bcft.data.examples import make_examples, trajectory_examples
from bcft.data.readers import demonstration
from bcft.environments.base import environment_factory
from bcft.environments.tools import toolbox
from bcft.errors import Preempted, UsageError
from bcft.policy.chat_template import Renderer
from bcft.policy.tool_calls import CallReader
from bcft.rollout.episode import Attempt
from bcft.testing import check_environment
from bcft.types import IGNORED, Problem, Trajectory

KNOWN = (
    "qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_think", "qwen3_5_nothink", "llama3_1", "llama3_2",
    "gptoss", "lfm2_v2", "lfm2_2_5", "nemotron_3_nano", "gemma4_v5",
)  # fmt: skip
"""Templates with a response template in TRL."""
STOPS = {"gptoss": "<|call|>", "gemma4_v5": "<|tool_response>"}
"""What ends a call where it is not what ends an answer, as in the models' generation_config.json."""
PROBLEM = Problem("p", [user("What is 40 + 2?")], {"answer": "42"})
ADD = call("add", a=40, b=2)
ADDED = {"role": "tool", "name": "add", "content": "42"}


def written(renderer, said, tools=()):
    """Return the ids of a message as the template writes it behind a user's, with its stop token."""
    given = {"tools": list(tools)} if tools else {}
    return tuple(renderer.rows([renderer.texts([user("?")], said, given)])[0][1])


def play_with(renderer, *script, make=Calculator, problem=PROBLEM, **changes):
    """Return the trajectory of a policy that says the script: messages as the template writes them, or texts."""
    said = [written(renderer, words) if isinstance(words, dict) else words for words in script]
    actions = [(words, "stop_token") if isinstance(words, tuple) else words for words in said]
    engine = Scripted(renderer, say=lambda key: actions[key[5]])
    make = environment_factory(make, {})
    (trajectory,) = played([Attempt(problem, 1, 0)], make, renderer, engine, max_new_tokens=500, **changes)
    return trajectory


def with_stop(name):
    """Return the renderer of a template whose calls may end in a token of their own."""
    made = tokenizer("bytes", TRL[name])
    if name in STOPS:
        made.add_tokens([STOPS[name]], special_tokens=True)
    return Renderer(made, [made.convert_tokens_to_ids(STOPS[name])] if name in STOPS else [])


def qwen():
    return renderer_of("qwen3_instruct_2507", "bytes")


# Calls and results


@pytest.mark.parametrize("name", KNOWN)
def test_a_call_is_read_and_its_result_follows_the_ids_that_were_sampled(name):
    renderer = with_stop(name)
    said = calling(ADD) | ({"reasoning_content": "I add."} if name.startswith("nemotron") else {})
    answer = {key: said[key] for key in said if key != "tool_calls"} | {"content": "It is 42."}
    trajectory = play_with(renderer, said, answer)
    first, second = trajectory.turns
    assert trajectory.ended == "done", trajectory.error
    assert first.said["tool_calls"] == [ADD]
    assert first.observation == (ADDED,)
    assert "42" in renderer.tokenizer.decode(second.ids)
    assert not second.rewritten
    assert (second.said["content"], second.success, second.reward) == ("It is 42.", "yes", 1.0)
    schemas = toolbox(Calculator(), "").schemas
    assert trajectory.tools == schemas
    assert list(first.ids) == renderer.prompts([PROBLEM.prompt], [{"tools": list(schemas)}])[0]


def test_what_the_policy_reads_is_the_templates_rendering_of_the_messages():
    renderer = qwen()
    trajectory = play_with(renderer, calling(ADD, content="I add."), calling(call("add", a=41)), "So it is 42.")
    whole = [token for turn in trajectory.turns for token in (*turn.ids, *turn.action_ids)]
    messages = [*PROBLEM.prompt, *trajectory.messages]
    shown = "".join(renderer.texts(messages[:-1], messages[-1], {"tools": list(trajectory.tools)}))
    assert renderer.tokenizer.decode(whole) == shown


def test_a_call_in_another_spelling_is_not_rewritten():
    """The template would write spaces that the policy did not sample."""
    renderer = qwen()
    text = '<tool_call>\n{"name":"add","arguments":{"b":2,"a":40}}\n</tool_call>'
    trajectory = play_with(renderer, text, "So it is 42.")
    first, second = trajectory.turns
    assert (first.action, first.said, second.rewritten) == (text, calling(ADD), False)
    assert first.action_ids == tuple(renderer.completions([text])[0])


def test_results_carry_no_loss_and_the_sampled_ids_do():
    (example,) = trajectory_examples(play_with(qwen(), calling(ADD), "It is 42."), PROBLEM, reward=1.0, source="self")
    first, second = play_with(qwen(), calling(ADD), "It is 42.").turns
    assert example.input_ids == first.ids + first.action_ids + second.ids + second.action_ids
    assert [label for label in example.labels if label != IGNORED] == [*first.action_ids, *second.action_ids]


def test_results_come_in_the_order_of_the_calls_also_asynchronous_ones():
    script = (calling(call("look"), call("increment", step=2), call("look", unit="steps")), "Done.")
    trajectory = play_with(qwen(), *script, make=Counter)
    told = [(message["name"], message["content"]) for message in trajectory.turns[0].observation]
    assert told[1] == ("increment", "2")
    assert [name for name, _ in told] == ["look", "increment", "look"]
    assert told[2][1] == "It is 2 steps."


def test_a_tool_may_be_a_json_schema_with_the_name_of_a_method():
    assert play_with(qwen(), calling(ADD), "It is 42.", make=Described).turns[0].observation == (ADDED,)


def test_after_a_call_the_environment_may_answer_as_a_user():
    trajectory = play_with(qwen(), calling(ADD), "Hm...", calling(ADD), "It is 42.")
    assert [m["role"] for t in trajectory.turns for m in t.observation] == ["tool", "user", "tool"]
    assert [turn.graded for turn in trajectory.turns] == [False, False, False, True]


# What a policy may do wrong


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ('<tool_call>\n{"name": "add", "arguments": {"a": 40,}}\n</tool_call>', "Malformed tool call: .*double quotes"),
        ('<tool_call>\n{"name": "add", "arguments": {"a"', "Malformed tool call: .*delimiter"),
        ("<tool_call>\n[1]\n</tool_call>", "Malformed tool call: a tool call is"),
        ("<tool_call>" + "[" * 3_000, "Malformed tool call: "),
        ('<tool_call>\n{"name": 7, "arguments": {}}\n</tool_call>', "Malformed tool call: a tool call is"),
        ('<tool_call>\n{"name": "add", "arguments": [40]}\n</tool_call>', "the arguments of add are an object"),
        (calling(call("subtract", a=1)), "'error': 'Tool subtract not found.'"),
        (calling(call("reset", a=1)), "'error': 'Tool reset not found.'"),
        (calling(call("add", c=1)), "unexpected keyword argument 'c'"),
        (calling(call("add", a=-1)), "'error': 'a must not be negative'"),
    ],
)
def test_a_wrong_call_is_answered_and_the_attempt_goes_on(said, expected):
    trajectory = play_with(qwen(), said, "It is 42.")
    (observation,) = trajectory.turns[0].observation
    assert observation["role"] == "tool"
    assert re.search(expected, observation["content"])
    assert (trajectory.ended, trajectory.success, trajectory.turns[1].rewritten) == ("done", "yes", False)


def test_a_call_that_is_cut_off_is_answered_behind_the_end_that_it_lacks():
    renderer = qwen()
    ids = written(renderer, calling(ADD))[:-6]
    engine = Scripted(renderer, say=lambda key: (ids, "max_tokens") if key[5] == 0 else "It is 42.")
    (trajectory,) = played([Attempt(PROBLEM, 1, 0)], Calculator, renderer, engine)
    assert trajectory.turns[1].ids[0] == renderer.tail_ids[0]
    assert "Malformed tool call" in trajectory.turns[0].observation[0]["content"]
    assert trajectory.truncated


def test_a_template_that_wants_a_call_before_a_tools_result_gets_the_fault_as_a_user():
    renderer = with_stop("gptoss")
    text = "<|channel|>commentary to=functions.add<|channel|>commentary json<|message|>{40<|call|>"
    ids = tuple(renderer.tokenizer(text, add_special_tokens=False)["input_ids"])
    trajectory = play_with(renderer, ids, "<|channel|>final<|message|>It is 42.")
    assert trajectory.turns[0].observation[0]["role"] == "user"


# The reward of the whole


@pytest.mark.parametrize(
    ("script", "changes", "reward"),
    [
        ((calling(call("increment", step=3)), "Done."), {}, 1.0),
        ((calling(call("increment", step=3)),), {"max_turns": 1}, 1.0),
        (("<tool_call>\n{\n</tool_call>",), {"max_turns": 1}, 0.0),
        (("I know.",), {}, 0.0),
    ],
)
def test_the_reward_of_the_whole_is_asked_once_whatever_ended_the_attempt(script, changes, reward):
    trajectory = play_with(qwen(), *script, make=Counter, **changes)
    assert (trajectory.environment_reward, trajectory.error) == (reward, "")
    assert [turn.graded for turn in trajectory.turns] == [False] * (len(script) - 1) + [True]


def test_the_reward_of_the_whole_adds_to_that_of_the_last_action():
    class Tipped(Calculator):
        async def get_reward(self):
            return 0.5

    assert play_with(qwen(), calling(ADD), "It is 42.", make=Tipped).environment_reward == 1.5


# Files and other tokenizers


def test_a_trajectory_with_calls_is_the_same_from_its_file_and_holds_no_null():
    class Lenient(Calculator):
        def add(self, a: int | None = None) -> int:
            """Add.

            Args:
                a: A number.
            """
            return a or 0

    trajectory = play_with(qwen(), calling(call("add", a=None)), calling(ADD), "It is 42.", make=Lenient)
    assert trajectory.turns[0].said == calling(call("add", a=None))
    line = json.dumps(trajectory.to_json())
    assert ": null" not in line.replace('{\\"a\\": null}', "")
    assert Trajectory.from_json(json.loads(line)) == trajectory
    (example,) = trajectory_examples(trajectory, PROBLEM, reward=1.0, source="self")
    assert type(example).from_json(json.loads(json.dumps(example.to_json()))) == example


def test_a_kept_row_with_calls_trains_another_tokenizer_on_its_messages():
    trajectory = play_with(qwen(), calling(ADD), "It is 42.")
    (example,) = trajectory_examples(trajectory, PROBLEM, reward=1.0, source="self")
    row = demonstration(json.loads(json.dumps(example.to_json())), "kept.jsonl:1")
    other = renderer_of("llama3_2", "bytes")
    (made,), _ = make_examples([row], other, max_length=10_000)
    text = other.tokenizer.decode(made.input_ids)
    assert '{"name": "add", "parameters": {"a": 40, "b": 2}}<|eot_id|>' in text
    assert '"description": "Add two numbers."' in text
    said = other.tokenizer.decode([label for label in made.labels if label != IGNORED])
    assert said == '{"name": "add", "parameters": {"a": 40, "b": 2}}<|eot_id|>It is 42.<|eot_id|>'


# The documentation


def test_the_snippet_of_the_documentation_plays_and_passes_the_check():
    page = (Path(__file__).parents[2] / "recipes" / "README.md").read_text(encoding="utf-8")
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "self.tools" in code)
    names = {"__name__": "snippet"}
    exec(compile(code, "recipes/README.md", "exec"), names)
    check_environment(names["Calculator"], [PROBLEM])
    trajectory = play_with(qwen(), calling(ADD), "It is 42.", make=names["Calculator"])
    assert (trajectory.turns[0].observation, trajectory.success) == ((ADDED,), "yes")


# What is refused


@pytest.mark.parametrize(
    ("name", "expected"), [("gemma3", "renders no tool calls"), ("qwen3_training", "is not known")]
)
def test_a_template_that_cannot_play_with_tools_is_refused_before_anything_is_played(name, expected):
    with pytest.raises(UsageError, match=f"it has tools, .*{expected}.*: set chat_template_path"):
        play_with(renderer_of(name, "bytes"), "It is 42.")


def test_a_template_whose_calls_end_in_no_stop_token_of_the_model_is_refused_by_name():
    """The policy would be sampled on and on behind its call."""
    with pytest.raises(UsageError, match="ends a call in no stop token: add what ends a call to eos_token_id"):
        play_with(renderer_of("gptoss", "bytes"), "It is 42.")


@pytest.mark.parametrize("raised", [Preempted("asked to stop"), KeyboardInterrupt(), MemoryError("none left")])
def test_what_is_meant_for_the_run_is_no_result_of_a_tool(raised):
    """A signal arrives in the main thread, so also in a tool of an instant environment."""

    class Struck(Calculator):
        instant = True

        def add(self, a: int, b: int = 1) -> int:  # noqa: ARG002
            """Add.

            Args:
                a: A number.
                b: A number.
            """
            raise raised

    if isinstance(raised, MemoryError):
        trajectory = play_with(qwen(), calling(ADD), "It is 42.", make=Struck)
        assert (trajectory.ended, trajectory.error) == ("error", "step raised MemoryError: none left")
        return
    with pytest.raises(type(raised)):
        play_with(qwen(), calling(ADD), "It is 42.", make=Struck)


def test_a_tokenizers_own_response_template_is_used():
    made = tokenizer("bytes", TRL["qwen3_training"])
    known = CallReader(renderer_of("qwen3", "bytes"))._response_template
    made.response_template = known
    assert play_with(Renderer(made), calling(ADD), "It is 42.").turns[0].said["tool_calls"] == [ADD]
    assert getattr(renderer_of("qwen3", "bytes").tokenizer, "response_template", None) is None


def test_a_row_and_its_environment_do_not_both_have_tools():
    problem = Problem("p", "What is 40 + 2?", {"tools": list(toolbox(Calculator(), "").schemas)})
    assert "both the row and the environment have tools" in play_with(qwen(), "42", problem=problem).error


def _offering(*tools):
    return type("Offering", (Calculator,), {"__init__": lambda self: setattr(self, "tools", list(tools))})


def undocumented(a: int) -> int:
    return a


def untyped(a):
    """Return it.

    Args:
        a: A number.
    """
    return a


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ((undocumented,), "undocumented has no schema: .*no docstring"),
        ((untyped,), "untyped has no schema: .*missing a type hint"),
        (({"type": "function", "function": {"name": "fly"}},), "'fly' is no method"),
        (("add",), "nor a function"),
        ((Calculator().add, Calculator().add), "add: given twice"),
    ],
)
def test_a_tool_without_a_schema_is_refused_when_the_recipe_is_read(tools, expected):
    with pytest.raises(UsageError, match=f"environment: Offering: tools: .*{expected}"):
        environment_factory(_offering(*tools), {})
