"""Environments written for TRL's GRPO: they run as they are, and as in TRL's own loop."""

import json

import pytest
from helpers.episodes import Scripted, played
from helpers.functions import Coin
from helpers.tiny import llama_tokenizer, save_llama, write_jsonl
from helpers.tools import Calculator, Counter, call, calling
from helpers.trained_tokenizers import TRL, renderer_of, tokenizer, user

from bcft import collect, refilter, sft
from bcft.environments.base import environment_factory
from bcft.environments.grid_walk import GridWalk
from bcft.environments.tools import toolbox
from bcft.errors import DataError, UsageError
from bcft.integrations.trl_environment import Pool, TRLEnvironment, is_trl_environment
from bcft.policy.chat_template import DATE, Renderer
from bcft.policy.tool_calls import CallReader
from bcft.rewards.base import described
from bcft.rollout.episode import Attempt
from bcft.runs.storage import read_jsonl
from bcft.selection.functions import check_columns
from bcft.selection.scoring import _completion_ids
from bcft.testing import check_environment
from bcft.types import Problem, messages

PROMPT = [{"role": "system", "content": "Count."}, user("Use the tools.")]


class Stepping:
    """An environment for TRL with a tool named `step`."""

    def reset(self, **kwargs):
        """Do nothing."""

    def step(self, size: int) -> int:
        """Step.

        Args:
            size: How far.
        """
        return size


class Owing(Counter):
    """Adds content parts to the prompt."""

    def reset(self, **kwargs):
        super().reset(**kwargs)
        return [{"type": "text", "text": " Count"}, {"type": "text", "text": " well."}]


class Failing(Counter):
    """Fails at the second reset."""

    resets = 0

    def reset(self, **kwargs):
        type(self).resets += 1
        if self.resets == 2:
            raise OSError("the server is down")
        return super().reset(**kwargs)


def by_reading_environments(environments, **kwargs):  # noqa: ARG001
    """Return what TRL's pages compute in a reward function."""
    return [environment.counter for environment in environments]


@pytest.mark.parametrize(
    ("made", "expected"),
    [(Counter(), True), (Stepping(), True), (GridWalk(), False), (Coin(), False), (Calculator(), False), ({}, False)],
)
def test_an_environment_for_trl_is_known_by_its_methods(made, expected):
    assert is_trl_environment(made) is expected


def test_one_of_bcfts_without_a_step_is_not_taken_for_one_of_trls():
    lacking = type("Lacking", (), {"reset": Coin.reset, "look": Counter.look})
    with pytest.raises(UsageError, match="makes a Lacking, which has no step"):
        environment_factory(lacking, {})


@pytest.mark.parametrize(
    ("make", "prompt", "expected"),
    [
        (Counter, PROMPT, [PROMPT[0], user("Use the tools. Reach 3.")]),
        (Counter, "Use the tools.", "Use the tools. Reach 3."),
        (Owing, PROMPT, [PROMPT[0], user("Use the tools. Count well.")]),
        (Owing, "Use the tools.", [user("Use the tools. Count well.")]),
        (Stepping, PROMPT, PROMPT),
    ],
)
def test_what_reset_returns_is_added_to_the_last_message(make, prompt, expected):
    problem = Problem("p", prompt, {"target": 3})
    first = environment_factory(make, {})().reset(problem, seed=0)
    assert messages(first) == messages(expected)
    assert problem.prompt == prompt


def test_instances_are_made_once_and_reset_for_each_attempt():
    Counter.made = 0
    renderer = renderer_of("qwen3_instruct_2507", "bytes")
    make = environment_factory(Counter, {})
    attempts = [Attempt(Problem(f"p{i}", PROMPT, {"target": i}), 1, 0) for i in range(8)]
    for several in range(0, 8, 4):
        trajectories = played(attempts[several : several + 4], make, renderer, Scripted(renderer, say=lambda _: "No."))
        assert [t.error for t in trajectories] == [""] * 4
    assert Counter.made <= 4


def test_an_instance_whose_reset_failed_is_not_used_again():
    pool = Pool(Failing)
    problem = Problem("p", PROMPT)
    for _ in range(2):
        one = TRLEnvironment(pool)
        try:
            one.reset(problem, seed=0)
        except OSError:
            failed = one._inner
        one.close()
    assert TRLEnvironment(pool)._inner is not failed


def test_a_changed_class_is_another_environment():
    assert described(environment_factory(Counter, {})) != described(environment_factory(Owing, {}))
    assert described(environment_factory(Counter, {})) == described(environment_factory("helpers.tools.Counter", {}))


def test_a_reward_that_reads_environments_is_refused_with_the_remedy():
    with pytest.raises(DataError, match=r"needs environments, .* method get_reward"):
        check_columns([by_reading_environments], [Problem("p", PROMPT)], row="row")


def test_both_kinds_of_environments_with_tools_pass_the_check():
    problems = [Problem("p", PROMPT, {"target": 3}), Problem("q", "What is 40 + 2?", {"answer": "42"})]
    check_environment(Counter, problems)
    check_environment(Calculator, problems)


class Random(Calculator):
    """Has a tool that draws from the global generator."""

    def add(self, a: int, b: int = 1) -> float:
        """Add two numbers, more or less.

        Args:
            a: The first number.
            b: The second number.
        """
        import random

        return a + b + random.random()


def test_the_check_calls_the_tools():
    with pytest.raises(AssertionError, match="two attempts with the same seed and actions differ"):
        check_environment(Random, [Problem("p", PROMPT)])


# TRL's own loop

SCRIPTS = {
    3: [calling(call("increment", step=3)), "Done."],
    5: [calling(call("increment", step=2), content="First two."), calling(call("increment", step=3)), "It is 5."],
    7: [calling(call("fly", to="7")), calling(call("increment", step=-1)), calling(call("increment")), "I give up."],
    9: ["It is 9."],
    11: [calling(call("increment", step=5), call("increment", step=6)), "It is 11."],
    13: [calling(call("look", unit="steps")), "It is 0."],
}
"""Target -> what the policy says, whatever it reads."""
TEMPLATES = {
    **dict.fromkeys(("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_5_nothink"), "<|im_end|>"),
    "llama3_2": "<|eot_id|>",
}
"""Template -> its EOS token."""


def _policy(name):
    made = tokenizer("bytes", TRL[name], eos=TEMPLATES[name])
    made.pad_token = "<unk>"
    made.padding_side = "left"
    return Renderer(made)


def _script(renderer, target):
    """Return the ids of what the policy says, as the template writes it; empty for what Llama's cannot say."""
    said = [{"role": "assistant", "content": words} if isinstance(words, str) else words for words in SCRIPTS[target]]
    # Llama writes one call, and no text beside it.
    besides = any(len(m.get("tool_calls", [])) > 1 or ("tool_calls" in m and m["content"]) for m in said)
    if besides and renderer.tokenizer.eos_token == "<|eot_id|>":
        return []
    return [tuple(renderer.rows([renderer.texts([user("?")], words)])[0][1]) for words in said]


def _trls(renderer, rows, directory):
    """Return what TRL's GRPOTrainer plays with the scripts: for each row prompt ids, messages, ids and reward."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    scripts = {row["target"]: _script(renderer, row["target"]) for row in rows}
    seen = {}

    class ScriptedTrainer(GRPOTrainer):
        """Says the scripts instead of sampling."""

        def _generate_single_turn(self, prompt_ids, *_, **__):
            return [list(self._next(ids)) for ids in prompt_ids], None

        def _next(self, ids):
            text = renderer.tokenizer.decode(ids)
            target = next(target for target in scripts if f"Reach {target}." in text)
            turn = text.count(renderer.opening_text) - 1
            if not turn:
                self.prompt_ids[target] = tuple(ids)
            return scripts[target][turn]

    def spy(completions, completion_ids, environments, target, **_):
        for said, ids, environment, key in zip(completions, completion_ids, environments, target, strict=True):
            seen[key] = (said, tuple(ids), float(environment.counter == environment.target))
        return [0.0] * len(completions)

    model = AutoModelForCausalLM.from_pretrained(
        save_llama(directory, renderer.tokenizer, hidden=8, layers=1, positions=8192)
    )
    arguments = GRPOConfig(
        output_dir=str(directory / "run"), use_cpu=True, bf16=False, report_to="none", max_completion_length=4000,
        per_device_train_batch_size=2 * len(rows), num_generations=2, chat_template_kwargs={"date_string": DATE},
    )  # fmt: skip
    trainer = ScriptedTrainer(
        model, spy, arguments, Dataset.from_list(rows), processing_class=renderer.tokenizer, environment_factory=Counter
    )
    trainer.prompt_ids = {}
    trainer._generate_and_score_completions([row for row in rows for _ in range(2)])
    return {key: (trainer.prompt_ids[key], *rest) for key, rest in seen.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_episode_is_that_of_trls_own_loop(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    renderer = _policy(name)
    rows = [{"prompt": PROMPT, "start": 0, "target": target} for target in SCRIPTS if _script(renderer, target)]
    theirs = _trls(renderer, rows, tmp_path)
    problems = [Problem(str(row["target"]), PROMPT, {"target": row["target"], "start": 0}) for row in rows]
    engine = Scripted(renderer, say=lambda key: (_script(renderer, int(key[3]))[key[5]], "stop_token"))
    make = environment_factory(Counter, {})
    trajectories = played([Attempt(p, 1, 0) for p in problems], make, renderer, engine, max_new_tokens=500)
    assert len(trajectories) == len(rows) >= 4
    for trajectory in trajectories:
        prompt_ids, said, ids, reward = theirs[int(trajectory.problem_id)]
        assert list(trajectory.messages) == said
        assert trajectory.turns[0].ids == prompt_ids
        assert tuple(_completion_ids(trajectory)) == ids
        assert (trajectory.environment_reward, trajectory.ended) == (reward, "done")


# A run


SMALL = {"eval_test_problems": 4, "eval_test_samples": 1, "eval_dev_problems": 2, "max_length": 2048}


@pytest.mark.slow
def test_demonstrations_with_calls_teach_a_policy_that_plays_collects_and_trains_on_its_own(tmp_path):
    schemas = list(toolbox(environment_factory(Counter, {})(), "").schemas)
    words = "Given the following functions, please respond with a JSON for a function call with its proper arguments"
    said = '{"name": "increment", "parameters": {"step": 1}} Done. Count, number 7. Reach 1.'
    texts = [json.dumps(schema, indent=4) for schema in schemas] + [words, said, TRL["llama3_2"]]
    model = save_llama(tmp_path / "tiny", llama_tokenizer(texts, vocabulary=800), hidden=64, positions=2048)
    first = [{"prompt": [user(f"Count, number {i}.")], "target": 1} for i in range(40)]
    answers = [
        calling(call("increment", step=1)), {"role": "tool", "name": "increment", "content": "1"},
        {"role": "assistant", "content": "Done."},
    ]  # fmt: skip
    shown = [{"messages": [user(f"Count, number {i}. Reach 1."), *answers], "tools": schemas} for i in range(40)]
    demonstrations = write_jsonl(tmp_path / "shown.jsonl", shown)
    steps = {"max_steps": 100, "learning_rate": 5e-3, "per_device_train_batch_size": 4, **SMALL}
    sft.run(None, model_name_or_path=model, dataset_name=demonstrations, output_dir=str(tmp_path / "sft"), **steps)

    keys = {"model_name_or_path": str(tmp_path / "sft"), "dataset_name": write_jsonl(tmp_path / "rows.jsonl", first)}
    play = {"environment": "helpers.tools.Counter", "max_turns": 4, "max_completion_length": 60, "prompts_per_round": 8}
    collect.run(None, output_dir=str(tmp_path / "played"), num_generations=2, keep_quantile=0.0, **keys, **play)
    lines = read_jsonl(tmp_path / "played" / "rollouts.jsonl")
    assert {line["ended"] for line in lines} <= {"done", "turn_limit"}
    won = [line for line in lines if line["turns"][-1]["reward"] == 1.0 and len(line["turns"]) == 2]
    assert won
    assert {line["turns"][0]["observation"][0]["content"] for line in won} == {"1"}
    assert all(line["tools"] == schemas for line in lines)

    rule = {"require_success": "false", "min_reward": 1.0, "keep_quantile": 0.0}
    kept_at = tmp_path / "kept"
    refilter.run(None, rollouts=str(tmp_path / "played"), output_dir=str(kept_at), **keys, **rule)
    kept = read_jsonl(kept_at / "kept.jsonl")
    assert {row["id"] for row in kept} <= {line["id"] for line in lines if line["turns"][-1]["reward"] == 1.0}
    assert [m["role"] for m in kept[0]["completion"]] == ["assistant", "tool", "assistant"]
    assert kept[0]["completion"][0]["tool_calls"] == [call("increment", step=1)]
    one = {"dataset_name": str(kept_at), "max_steps": 1, **SMALL}
    sft.run(None, output_dir=str(tmp_path / "again"), model_name_or_path=str(tmp_path / "sft"), **one)
    other = save_llama(tmp_path / "qwen", _policy("qwen2_5").tokenizer, hidden=16, positions=4096)
    sft.run(None, output_dir=str(tmp_path / "other"), model_name_or_path=other, **one)


def test_a_reader_knows_calls_only_where_there_are_tools():
    """TRL reads the calls of every completion; without tools an action is its text."""
    renderer = renderer_of("qwen3_instruct_2507", "bytes")
    text = '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
    ids = renderer.completions([text])[0]
    assert CallReader(renderer).read([1], ids, []).message["tool_calls"] == [call("add")]
    engine = Scripted(renderer, say=lambda _: text)
    (trajectory,) = played([Attempt(Problem("p", PROMPT), 1, 0)], GridWalkLike, renderer, engine)
    assert trajectory.turns[0].message is None


class GridWalkLike(Coin):
    """An environment without tools that ends at once."""

    def step(self, action):
        feedback = super().step(action)
        return type(feedback)(None, feedback.reward, done=True)
