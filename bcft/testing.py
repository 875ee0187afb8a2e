"""Tools for tests of users' environments and reward functions: checks, a scripted policy and a tiny model."""

import copy
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from bcft.environments.base import Closing, environment_factory
from bcft.environments.tools import Toolbox, reward_of, toolbox
from bcft.policy.chat_template import Renderer
from bcft.rewards.base import Reward, ask, name_of
from bcft.types import Action, Environment, Feedback, Message, Problem, Request, messages
from bcft.types.calls import ToolCall, tool_name

ACTIONS = ("", "1", "yes", "½ 𝔘 <|eot_id|>", "word " * 2000)
"""Actions of a policy: an empty one, short ones, control tokens as text, a very long one."""
_VALUES = {"integer": 1, "number": 0.5, "boolean": True, "array": [], "object": {}, "null": None}
"""Type in a tool's schema -> an argument; any other gets a text."""


def check_environment(
    make: Callable[[], Environment],
    problems: Iterable[Problem],
    *,
    actions: Sequence[str] = ACTIONS,
    max_turns: int = 20,
) -> None:
    """Check that `make` returns an environment, also one for TRL: on every problem, with `actions` repeated in turn.

    Its tools are called at first, each without arguments and with some of the types in its schema.

    max_turns: most turns of an attempt, as in the loop. Raises AssertionError with the broken promise, and the
    UsageError of a recipe that names such an environment.
    """
    make = environment_factory(make, {})
    checked = 0
    for problem in problems:
        before = copy.deepcopy((problem.prompt, dict(problem.columns)))
        first = _attempt(make(), problem, 0, actions, max_turns)
        _require(
            _attempt(make(), problem, 0, actions, max_turns) == first,
            f"{problem.id}: two attempts with the same seed and actions differ: draw from `seed` alone, in reset",
        )
        _require(
            _beside_another(make, problem, actions, max_turns) == first,
            f"{problem.id}: an attempt differs when another is played beside it: keep its state in the object",
        )
        _require(
            _in_a_thread(partial(_attempt, make(), problem, 0, actions, max_turns)) == first,
            f"{problem.id}: an attempt differs in another thread than the one that made its environment",
        )
        _require(
            (problem.prompt, dict(problem.columns)) == before,
            f"{problem.id}: the problem was changed: copy before you change it, because other attempts read it",
        )
        checked += 1
    _require(checked, "give at least one problem to check with")


def check_reward(function: Reward, problems: Sequence[Problem]) -> None:
    """Check that a reward function takes TRL's arguments and that a completion's grade depends on nothing else.

    The token ids of a completion are its bytes here.

    Raises AssertionError with the broken promise, and the errors of `bcft.rewards.base.ask` for a wrong return value.
    """
    _require(problems, "give at least one problem to check with")
    for action in ACTIONS:
        chat = [not isinstance(problem.prompt, str) for problem in problems]
        completions: list[str | Sequence[Message]] = [
            [{"role": "assistant", "content": action}] if as_messages else action for as_messages in chat
        ]
        ids = list(action.encode())
        grades = ask(function, problems, completions, completion_ids=[ids] * len(problems))
        again = ask(function, problems, completions, completion_ids=[ids] * len(problems))
        _require(grades == again, f"{name_of(function)} graded {action[:20]!r} as {grades[:3]}, then as {again[:3]}")
        alone = [
            ask(function, [problem], [completion], completion_ids=[ids])[0]
            for problem, completion in zip(problems, completions, strict=True)
        ]
        _require(
            grades == alone,
            f"{name_of(function)} grades {action[:20]!r} as {grades[:3]} together, but as {alone[:3]} one by one",
        )


def _attempt(environment: Any, problem: Problem, seed: int, actions: Sequence[str], max_turns: int) -> list[Any]:
    """Return all answers of an environment in an attempt."""
    answers: list[Any] = [_reset(environment, problem, seed), *_results(environment)]
    for turn in range(max_turns):
        answers.append(_step(environment, actions[turn % len(actions)], problem))
        if answers[-1].done:
            break
    answers.append(_reward(environment, problem))
    _close(environment)
    return answers


def _beside_another(
    make: Callable[[], Environment], problem: Problem, actions: Sequence[str], max_turns: int
) -> list[Any]:
    """Return the same while another attempt with other actions is played beside it, turn by turn."""
    environment, other = make(), make()
    first, _ = _reset(environment, problem, 0), _reset(other, problem, 1)
    answers: list[Any] = [first, *_results(environment)]
    _results(other)
    other_done = False
    for turn in range(max_turns):
        other_done = other_done or _step(other, actions[-1 - turn % len(actions)], problem).done
        answers.append(_step(environment, actions[turn % len(actions)], problem))
        if other_done:
            _reset(other, problem, 2 + turn)
            other_done = False
        if answers[-1].done:
            break
    answers.append(_reward(environment, problem))
    _close(environment)
    _close(other)
    return answers


def _in_a_thread(call: Callable[[], Any]) -> Any:
    results: list[Any] = []
    errors: list[AssertionError] = []

    def work() -> None:
        try:
            results.append(call())
        except AssertionError as error:
            errors.append(error)

    thread = Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0] if results else None


def _reset(environment: Any, problem: Problem, seed: int) -> list[Message]:
    observation = environment.reset(problem, seed=seed)
    try:
        return messages(observation)
    except ValueError as error:
        raise AssertionError(f"{problem.id}: reset did not return an observation: {error}") from error


def _step(environment: Any, action: str, problem: Problem) -> Feedback:
    feedback = environment.step(action)
    if not isinstance(feedback, Feedback):
        kind = type(feedback).__name__
        raise AssertionError(f"{problem.id}: step({action[:20]!r}) returned {kind}, not bcft.types.Feedback")
    return feedback


def _results(environment: Any) -> list[Message]:
    """Return the results of its tools, each called without arguments and with made-up ones."""
    offered = toolbox(environment, type(environment).__name__)
    return messages(offered.results(_calls(offered))) if offered else []


def _calls(offered: Toolbox) -> list[ToolCall]:
    calls: list[ToolCall] = []
    for schema in offered.schemas:
        given = schema.get("function", schema).get("parameters", {}).get("properties", {})
        some = {name: _VALUES.get(str(kind.get("type")), "1") for name, kind in given.items()}
        for arguments in ({}, some):
            calls.append({"type": "function", "function": {"name": tool_name(schema), "arguments": arguments}})
    return calls


def _reward(environment: Any, problem: Problem) -> float | None:
    try:
        return reward_of(environment)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"{problem.id}: get_reward did not return a number or None: {error}") from error


def _close(environment: Any) -> None:
    if isinstance(environment, Closing):
        environment.close()


def _require(holds: Any, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


class ScriptedPolicy:
    """An engine for `play` whose actions a function decides, from an attempt's key and the text of its context.

    The key is (seed, phase, round, problem id, sample, turn).
    """

    def __init__(self, renderer: Renderer, answer: Callable[[tuple[str | int, ...], str], str]) -> None:
        self.renderer, self.answer = renderer, answer

    def generate(self, requests: Sequence[Request]) -> Iterator[Action]:
        """Yield one action for each request, in their order."""
        for request in requests:
            action = self.answer(request.key, self.renderer.tokenizer.decode(list(request.context_ids)))
            yield Action(request.key, tuple(self.renderer.completions([action])[0]), "stop_token")


_LLAMA_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<|finetune_right_pad_id|>",
]  # fmt: skip


def tiny_tokenizer(texts: Iterable[str], *, vocabulary: int = 600, chat: bool = True) -> Any:
    """Train a byte-level BPE with the control tokens of Llama 3 on texts, and return it as a transformers tokenizer.

    vocabulary: most tokens, of which 262 are bytes and control tokens; chat: with the chat template of Llama 3.2 that
    TRL ships, else with the EOS token of a base model.
    """
    # A test of an environment must not load these.
    from tokenizers import (  # noqa: PLC0415 - see above
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
        trainers,
    )
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - see above

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=_LLAMA_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>" if chat else "<|end_of_text|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    if chat:
        tokenizer.chat_template = _llama_template()
    return tokenizer


def save_tiny_model(
    directory: str | Path, tokenizer: Any, *, hidden: int = 32, layers: int = 2, positions: int = 512, seed: int = 0
) -> str:
    """Save a small random Llama with its tokenizer; return the directory as text.

    hidden: size of its states, a multiple of 8; positions: its longest context, in tokens; seed: of its weights.
    """
    # A test of an environment must not load these.
    import torch  # noqa: PLC0415 - see above
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - see above

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def _llama_template() -> str:
    """Return the Llama-3.2 template as TRL ships it, without importing trl."""
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("trl, which bcft requires, is not installed")
    return (Path(spec.origin).parent / "chat_templates" / "llama3_2.jinja").read_text(encoding="utf-8")
