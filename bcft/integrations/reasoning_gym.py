r"""The problems of the package `reasoning-gym`: `reasoning-gym:chain_sum`, one of its generators or its `composite`.

A generator makes item i from `Random(seed + i)`, so two near seeds give the same stream, shifted. The splits are ranges
of indices of one seed instead; a problem whose text came before is left out, first in test, then in dev, then in
training. An item is known by its index, and made again to be graded: its metadata need not survive JSON.

An answer is what stands behind the marker that `answer_format` names, in the last turn of the assistant. The
generator's own `score_answer` grades it.
"""

import dataclasses
import difflib
import importlib
import json
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Literal

from bcft.errors import BcftError, DataError, UsageError
from bcft.integrations.reasoning_gym_items import BLOCK, Items, items_of, reason
from bcft.rewards.base import Answers, Reward, reference
from bcft.types import Message, Problem, problem_id, show

PREFIX = "reasoning-gym:"
INSTALL = "pip install 'bcft[reasoning-gym]'"
AnswerFormat = Literal["text", "number", "tag", "hash", "boxed"]
Split = Literal["test", "dev", "train"]
FIRST: dict[Split, int] = {"test": 0, "dev": 2_000, "train": 4_000}
"""The index of each split's first item; a split ends where the next begins, the last one where the generator ends."""
TRAIN_PROBLEMS = 2_000
"""How many training problems there are unless the slice of `dataset_train_split` has an end."""
PATIENCE = 1_000
"""Items in succession without a new text, or that cannot be made, after which a split ends."""
SUFFIXES: dict[AnswerFormat, str] = {
    "text": "",
    "number": "",
    "tag": "Give the final answer between <answer> and </answer>.",
    "hash": "End with the final answer after ####.",
    "boxed": r"Put the final answer in \boxed{}.",
}
"""What a prompt ends with, unless `prompt_suffix` says otherwise: it asks for the marker. A frozen text."""
_TAG = re.compile(r"<answer>\s?(.*?)\s?</answer>", re.DOTALL)
"""As in reasoning-gym's own `extract_answer`."""
_MINUS = str.maketrans("−–", "--")
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-−–])?(?:(?:\d{1,3}(?:,\d{3}){1,100}(?!\d)|\d+)(?:\.\d+)?|(?<![\w.)])\.\d+)(?:[eE][-+−–]?\d{1,3}(?!\w))?"
)
"""A minus behind a digit, a letter or a bracket subtracts, and a point behind one ends a sentence."""
_BOX = re.compile(r"\\boxed\s*\{")
_THOUSANDS = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3}){1,100}(?:\.[0-9]*)?")
_DECIMAL = re.compile(r"[-+]?(?:(?:0|[1-9][0-9]{0,300})(?:\.[0-9]{0,300})?|\.[0-9]{1,300})")


@dataclass(frozen=True)
class Source:
    """The keys of a recipe that say which problems there are and how they are asked."""

    generator: str
    arguments: str
    """`dataset_args` as JSON, with the seed."""
    answer_format: AnswerFormat
    prompt_suffix: str | None

    @property
    def name(self) -> str:
        """As a recipe names it."""
        return f"{PREFIX}{self.generator}"

    @property
    def items(self) -> Items:
        """The generator's items."""
        return items_of(self.generator, self.arguments)

    def prompt(self, question: str) -> str:
        """Return a question with its suffix."""
        suffix = SUFFIXES[self.answer_format] if self.prompt_suffix is None else self.prompt_suffix
        return f"{question}\n\n{suffix}" if suffix else question


# What a recipe names


def checked_source(
    name: str, arguments: Mapping[str, Any], *, answer_format: AnswerFormat, prompt_suffix: str | None
) -> Source:
    """Return the source of a recipe's keys, whose generator has been made once.

    Raises UsageError when the package is missing, the generator unknown, or an argument unknown or invalid.
    """
    generator = name.removeprefix(PREFIX)
    known = _package(name).factory.DATASETS
    if generator not in known:
        raise UsageError(f"dataset_name: reasoning-gym has no generator {generator!r}{_nearest(generator, known)}")
    seeded = {"seed": 0} | dict(arguments)
    if not isinstance(seeded["seed"], int) or seeded["seed"] < 0:
        raise UsageError(f"dataset_args: seed: wants an integer >= 0, not {show(seeded['seed'])}")
    if generator == "composite":
        _check_parts(seeded.get("datasets"), known)
    else:
        _check_keys(generator, seeded, known)
    source = Source(generator, json.dumps(seeded, sort_keys=True), answer_format, prompt_suffix)
    try:
        source.items.dataset  # noqa: B018 - made here
    except BcftError:  # asked to stop
        raise
    except Exception as error:  # whatever a configuration's own checks raise
        given = json.dumps(dict(arguments))
        raise UsageError(f"dataset_args: {name} does not accept {given}: {reason(error)}") from error
    return source


def _package(name: str) -> Any:
    """Return the package. Raises UsageError with what to install."""
    try:
        if find_spec("reasoning_gym") is None:
            raise UsageError(f"dataset_name: {name} needs the package reasoning-gym: {INSTALL}")
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise UsageError(f"dataset_name: {name}: reasoning-gym is incomplete ({error}): {INSTALL}") from error


def _check_parts(parts: Any, known: Mapping[str, Any]) -> None:
    """Raise UsageError for anything but a list of `{name, weight, config}`."""
    if not isinstance(parts, list) or not parts:
        raise UsageError("dataset_args: datasets: composite wants a list of {name, weight, config}")
    for part in parts:
        if not isinstance(part, Mapping) or not {"name"} <= part.keys() <= {"name", "weight", "config"}:
            raise UsageError(f"dataset_args: datasets: wants {{name, weight, config}}, not {show(part)}")
        name, config = part["name"], part.get("config") or {}
        if not isinstance(name, str) or name not in known or name == "composite":
            near = _nearest(str(name), known)
            raise UsageError(f"dataset_args: datasets: reasoning-gym has no generator {name!r}{near}")
        if not isinstance(config, Mapping):
            raise UsageError(f"dataset_args: datasets: config of {name}: wants a mapping, not {show(config)}")
        _check_keys(name, config, known)


def _check_keys(generator: str, arguments: Collection[str], known: Mapping[str, Any]) -> None:
    """Raise UsageError for an argument that the generator's configuration does not have."""
    fields = [field.name for field in dataclasses.fields(known[generator][1]) if field.name != "size"]
    for key in arguments:
        if key == "size":
            raise UsageError("dataset_args: size: dataset_train_split says how many problems there are: train[:2000]")
        if key not in fields:
            hint = _nearest(key, fields) or f"; there are {', '.join(fields)}"
            raise UsageError(f"dataset_args: {generator} has no argument {key!r}{hint}")


def _nearest(word: str, words: Collection[str]) -> str:
    near = difflib.get_close_matches(word, list(words), n=1)
    return f"; did you mean {near[0]}?" if near else ""


# Problems

Row = tuple[dict[str, Any], str]
"""The columns of a problem, and its place."""


def problems(source: Source, *, test: int, dev: int, train: slice) -> dict[Split, list[Row]]:
    """Return the rows of each split: at most so many problems, all different; a slice of train takes some of them.

    A row has `prompt`, `completion` and `answer` if the generator publishes an answer, and `index`.
    Raises DataError when there are too few different problems; UsageError when more are asked for than a range holds.
    """
    seen: set[str] = set()
    stop = (train.start or 0) + TRAIN_PROBLEMS if train.stop is None else train.stop
    rows: dict[Split, list[Row]] = {
        "test": _distinct(source, range(FIRST["test"], FIRST["dev"]), test, seen),
        "dev": _distinct(source, range(FIRST["dev"], FIRST["train"]), dev, seen),
        "train": _distinct(source, range(FIRST["train"], sys.maxsize), stop, seen)[train],
    }
    if len(seen) < test + dev + stop and not (rows["train"] and bool(rows["dev"]) == bool(dev)):
        raise DataError(
            f"{source.name}: {len(seen)} different problems are too few for {test} test, {dev} dev and some training "
            f"problems: widen dataset_args, or lower eval_test_problems and eval_dev_problems"
        )
    return rows


def _distinct(source: Source, indices: range, n: int, seen: set[str]) -> list[Row]:
    """Return the first n rows whose texts are not in `seen`, and add them; fewer where the generator has no more.

    Raises UsageError where it may have more, but the range ends.
    """
    rows: list[Row] = []
    repeated = failed = index = 0
    for index, item in source.items.between(indices.start, indices.stop, wanted=n) if n else ():
        if isinstance(item, str):
            failed += 1
            if failed == BLOCK and not rows:
                raise UsageError(f"dataset_args: {source.name} cannot make problems with {source.arguments}: {item}")
            if failed == PATIENCE:
                break
            continue
        failed = 0
        prompt = source.prompt(item["question"])
        if (identity := problem_id(prompt)) not in seen:
            seen.add(identity)
            rows.append(_row(source, index, prompt, item["answer"]))
            repeated = -1
        repeated += 1
        if len(rows) == n or repeated == PATIENCE:
            break
    if len(rows) < n and index == indices.stop - 1:  # not the generator ran out, but the range
        key = "eval_test_problems" if indices.start == FIRST["test"] else "eval_dev_problems"
        raise UsageError(
            f"{key}: {n:,}: the {len(indices):,} items of {source.name} that they are made of give {len(rows):,} "
            f"different problems: ask for fewer, or widen dataset_args"
        )
    return rows


def _row(source: Source, index: int, prompt: str, answer: str | None) -> Row:
    published = {"completion": stated(answer, source.answer_format), "answer": answer} if answer else {}
    return {"prompt": prompt, **published, "index": index}, f"{source.name} index {index}"


# Answers


def stated(answer: str, answer_format: AnswerFormat) -> str:
    r"""Return a reply that states an answer and nothing else.

    >>> stated("43", "hash")
    '#### 43'
    """
    forms = {"text": "{}", "number": "{}", "tag": "<answer>{}</answer>", "hash": "#### {}", "boxed": r"\boxed{{{}}}"}
    return forms[answer_format].format(answer)


def extract(reply: str, answer_format: AnswerFormat) -> str:
    r"""Return what stands behind the last marker of a reply, stripped; '' if there is none.

    >>> extract("4 + 39 = 43 <answer> 43 </answer>", "tag")
    '43'
    """
    if answer_format == "text":
        return reply.strip()
    if answer_format == "number":
        numbers = [match[0] for match in _NUMBER.finditer(reply)]
        return numbers[-1].translate(_MINUS).replace(",", "") if numbers else ""
    if answer_format == "hash":
        return reply.rpartition("####")[2].strip() if "####" in reply else ""
    if answer_format == "tag":
        return next((match[1].strip() for match in reversed([*_TAG.finditer(reply)])), "")
    for match in reversed([*_BOX.finditer(reply)]):
        depth = 1
        for end in range(match.end(), len(reply)):
            depth += {"{": 1, "}": -1}.get(reply[end], 0)
            if not depth:
                return reply[match.end() : end].strip()
    return ""


def answer_key(answer: str) -> str:
    """Return a text that equal answers share: '43', '43.0' and '+43' are one answer, and so are '.5' and '0.5'."""
    number = _decimal(answer)
    return answer if number is None else str(number)


def _decimal(text: str) -> Fraction | None:
    """Return a number that is written in digits; None for other texts, leading zeros and exponents included."""
    text = text.translate(_MINUS)
    text = text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
    return Fraction(text.rstrip(".")) if _DECIMAL.fullmatch(text) else None


def is_solved(score: float, answer: str, oracle: str | None) -> bool:
    """Return whether an answer is right: a score of 1.0, or a partial one for the oracle answer's number as 43.0."""
    if score >= 1.0:
        return True
    number = _decimal(answer)
    return score > 0.0 and number is not None and oracle is not None and number == _decimal(oracle.strip())


def reward_function(source: Source) -> Reward:
    """Return the reward function of a source's problems. Its description names the generator and its arguments."""
    generator, arguments, answer_format = source.generator, source.arguments, source.answer_format
    package = _version()

    def reasoning_gym_score(
        completions: Sequence[str | Sequence[Message]], index: Sequence[int | None], *, partial_scores: bool = False
    ) -> list[float | None]:
        """Grade answers: 1.0 right, 0.0 wrong, or in between with `partial_scores`.

        None for another's problem, and for an answer on which the sandbox had to give up.
        """
        _ = package  # part of the description: another version grades by its own rules
        items = items_of(generator, arguments)
        items.make(at for at in index if at is not None)
        answers = [extract(reply_of(completion), answer_format) for completion in completions]
        asked = [(at, text) for at, text in zip(index, answers, strict=True) if at is not None and text]
        scores = dict(zip(asked, items.scores(asked), strict=True))
        rewards: list[float | None] = []
        for at, answer in zip(index, answers, strict=True):
            score = None if at is None else scores.get((at, answer), 0.0)
            if at is None or score is None:
                rewards.append(None)
            elif is_solved(score, answer, items.answer(at)):
                rewards.append(1.0)
            else:
                rewards.append(score if partial_scores else 0.0)
        return rewards

    reasoning_gym_score.answers = Answers(  # type: ignore[attr-defined] # of a function
        extract=partial(extract, answer_format=answer_format),
        key=answer_key,
        check=partial(_check_answers, source),
    )
    return reasoning_gym_score


def _version() -> str:
    try:
        return version("reasoning-gym")
    except PackageNotFoundError:  # a copy without metadata
        return "unknown"


def reply_of(completion: str | Sequence[Message]) -> str:
    """Return the text of a completion, or of the last assistant message in it."""
    if isinstance(completion, str):
        return completion
    return next((message["content"] for message in reversed(completion) if message["role"] == "assistant"), "")


def _check_answers(source: Source, problems: Sequence[Problem]) -> str:
    """Grade the answers that the generator publishes; return in words how many are right.

    Raises DataError when it publishes some and none is right: no attempt could succeed.
    """
    published = [problem for problem in problems if reference(problem)]
    without = len(problems) - len(published)
    if not published:
        return f"reasoning-gym: {source.generator} publishes no oracle answers to check" if problems else ""
    answers = [extract(stated(reference(problem), source.answer_format), source.answer_format) for problem in published]
    asked = [(problem.columns["index"], answer) for problem, answer in zip(published, answers, strict=True)]
    scores = source.items.scores(asked, trusted=True)
    wrong = [problem for problem, score in zip(published, scores, strict=True) if score is None or score < 1.0]
    if len(wrong) == len(published):
        raise DataError(
            f"{wrong[0].where}: {source.name} does not accept its own oracle answer {reference(wrong[0])[-60:]!r}, nor "
            f"any other of {len(published):,}: another answer_format, or other dataset_args"
        )
    notes = [f"not that of {wrong[0].where}" if wrong else "", f"{without:,} problems publish none" if without else ""]
    right = f"reasoning-gym: {len(published) - len(wrong):,} of {len(published):,} oracle answers score 1.0"
    return "; ".join([right, *filter(None, notes)])
