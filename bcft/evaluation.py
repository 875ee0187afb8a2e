"""Held-out evaluation: one function for every model, split and command, so that figures can be compared.

Greedy decoding gives one attempt a problem, sampling several. An attempt is solved when it stopped by itself and
the success function says so; what cannot be graded is counted and never solved. Attempts are keyed by their
identity, so two models answer the same problems with the same noise and comparisons are paired.
"""

import dataclasses
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from bcft.config import Recipe
from bcft.data import REFERENCES, Splits
from bcft.errors import DataError
from bcft.generation.hf import HFEngine, sampling_mode
from bcft.journal import read_json, read_jsonl, write_json, write_jsonl
from bcft.model import Policy
from bcft.processes import rank, world_size
from bcft.rewards import Reward, answer_key, ask, extract_answer, import_function, math_reward
from bcft.statistics import Paired, majority, mcnemar, mean_interval, paired, pass_at_k, verdict, wilson
from bcft.types import IGNORED, Action, Demonstration, Message, Request, Row, Sampling

HARDER_SAMPLES = 4

GREEDY = -1
"""The `sample` of an attempt without noise."""


@dataclass(frozen=True)
class Evaluation:
    """Every attempt of an evaluation, one mapping each, and what follows from them.

    attempts: `problem_id, sample` (-1: greedy)`, prompt, completion, answer, success: yes|no|unknown, stop, tokens`.
    """

    attempts: tuple[Mapping[str, Any], ...]

    @cached_property
    def problems(self) -> dict[str, list[Mapping[str, Any]]]:
        """The attempts of each problem, greedy first, then by sample."""
        found: dict[str, list[Mapping[str, Any]]] = {}
        for attempt in sorted(self.attempts, key=lambda a: (a["problem_id"], a["sample"])):
            found.setdefault(attempt["problem_id"], []).append(attempt)
        return found

    @cached_property
    def greedy(self) -> dict[str, bool]:
        """Whether the greedy attempt solved each problem."""
        return {key: attempts[0]["success"] == "yes" for key, attempts in self.problems.items()}

    @cached_property
    def sampled(self) -> dict[str, list[bool]]:
        """Whether each sampled attempt solved its problem."""
        return {key: [a["success"] == "yes" for a in attempts[1:]] for key, attempts in self.problems.items()}

    @property
    def rates(self) -> list[float]:
        """The share of sampled attempts that solved each problem."""
        return [sum(solved) / len(solved) for solved in self.sampled.values() if solved]

    def summary(self) -> dict[str, Any]:
        """Return `{n, stop_rate, ungraded, greedy, sampled}` as the files hold it, intervals at 95 %.

        Without success function there is neither `greedy` nor `sampled`, without samples no `sampled`.
        """
        n, solved = len(self.problems), sum(self.greedy.values())
        found: dict[str, Any] = {
            "n": n,
            "stop_rate": sum(a["stop"] == "stop_token" for a in self.attempts) / max(len(self.attempts), 1),
            "ungraded": sum(a["success"] == "unknown" for a in self.attempts),
        }
        if found["ungraded"] == len(self.attempts):
            return found
        found["greedy"] = {"success": solved / n, "ci95": list(wilson(solved, n))}
        samples = min((len(solved) for solved in self.sampled.values()), default=0)
        if samples:
            k = max(samples // 2, 1)
            votes = [
                majority([answer_key(extract_answer(a["completion"])) for a in self.problems[key][1:]], solved, k)
                for key, solved in self.sampled.items()
            ]
            low, high = mean_interval(self.rates)
            found["sampled"] = {
                "n": samples,
                "k": k,
                "pass@1": sum(self.rates) / n,
                "ci95": [low, high],
                "pass@k": sum(pass_at_k(len(s), sum(s), k) for s in self.sampled.values()) / n,
                "maj@k": sum(votes) / n,
            }
        return found


def compare(base: Evaluation, other: Evaluation) -> dict[str, Any]:
    """Return `{delta, ci95, p_value, greedy_p_value, conclusion}` of other against base, problem by problem.

    The verdict is the paired difference of sampled pass@1; without samples, of greedy. With samples of both there are
    `pass@k_delta` and `pass@k_ci95` as well: a policy that narrows loses there first.
    """
    greedy = [(base.greedy[key], other.greedy[key]) for key in base.greedy]
    before, after = base.rates, other.rates
    if not before:
        before, after = [float(a) for a, _ in greedy], [float(b) for _, b in greedy]
    difference = paired(before, after)
    wide = _wide(base, other)
    return {
        "delta": difference.delta,
        "ci95": [difference.low, difference.high],
        "p_value": difference.p_value,
        "greedy_p_value": mcnemar(sum(a and not b for a, b in greedy), sum(b and not a for a, b in greedy)),
        "conclusion": verdict(difference),
        **({"pass@k_delta": wide.delta, "pass@k_ci95": [wide.low, wide.high]} if wide else {}),
    }


def _wide(base: Evaluation, other: Evaluation) -> Paired | None:
    """Return the paired difference of pass@k, k half of the fewest samples of any problem; None without samples."""
    counts = [len(solved) for found in (base, other) for solved in found.sampled.values()]
    if not min(counts, default=0):
        return None
    k = max(min(counts) // 2, 1)
    before, after = (
        [pass_at_k(len(found.sampled[key]), sum(found.sampled[key]), k) for key in base.sampled]
        for found in (base, other)
    )
    return paired(before, after)


def evaluate(
    policy: Policy,
    demonstrations: Sequence[Demonstration],
    *,
    success: Reward | None,
    sampling: Sampling,
    samples: int,
    max_new_tokens: int,
    seed: int,
    phase: str,
    label: str,
) -> Evaluation:
    """Attempt every problem once greedily and `samples` times with `sampling`; judge the attempts.

    phase: `dev` or `test`, part of the noise's identity; label: what the progress bar says; none without.
    """
    contexts = policy.renderer.prompts([d.problem.prompt for d in demonstrations])
    requests = [
        Request(
            key=(seed, phase, 0, d.problem.id, sample, 0),
            context_ids=tuple(context),
            sampling=Sampling(temperature=0.0) if sample == GREEDY else sampling,
            stop_ids=policy.renderer.stop_ids,
            max_new_tokens=max_new_tokens,
        )
        for d, context in zip(demonstrations, contexts, strict=True)
        for sample in range(GREEDY, samples)
    ]
    actions = _generate(policy, requests, label=label)
    texts = [policy.renderer.decode(actions[request.key].ids) for request in requests]
    asked = [d for d in demonstrations for _ in range(GREEDY, samples)]
    verdicts = judge_success(success, asked, texts)
    return Evaluation(
        tuple(
            {
                "problem_id": d.problem.id,
                "sample": request.key[4],
                "prompt": policy.renderer.text(d.problem.prompt),
                "completion": text,
                "answer": _reference(d),
                "success": "no" if solved == "yes" and actions[request.key].stop != "stop_token" else solved,
                "stop": actions[request.key].stop,
                "tokens": len(actions[request.key].ids),
            }
            for d, request, text, solved in zip(asked, requests, texts, verdicts, strict=True)
        )
    )


@dataclass(frozen=True)
class Measured:
    """An evaluation and its summary, with harder problems and held-out loss; both empty without problems."""

    evaluation: Evaluation
    summary: Mapping[str, Any]


def measure(
    recipe: Recipe,
    splits: Splits,
    policy: Policy,
    *,
    success: Reward | None,
    split: str,
    rows: Sequence[Row],
    directory: Path,
    quiet: bool,
) -> Measured:
    """Evaluate a policy on `dev` or `test` as the recipe says and write the result into a directory.

    success: as `success_function` returns it; rows: held-out demonstrations as rows, for their loss; may be empty. The
    directory's name is what progress shows.
    """
    problems = splits.test if split == "test" else splits.dev
    samples = recipe["eval_test_samples" if split == "test" else "eval_dev_samples"] if success else 0
    if not problems:
        return Measured(Evaluation(()), {})

    def attempt(which: Sequence[Demonstration], most: int, name: str) -> Evaluation:
        """Evaluate some problems by the recipe, with at most so many samples each."""
        return evaluate(
            policy,
            which,
            success=success,
            sampling=Sampling(**{f.name: recipe[f.name] for f in dataclasses.fields(Sampling)}),
            samples=min(samples, most),
            max_new_tokens=recipe["max_completion_length"],
            seed=recipe["seed"],
            phase=split,
            label=name,
        )

    label = "" if quiet else directory.name
    evaluation = attempt(problems, samples, label)
    summary = evaluation.summary()
    if splits.harder and split == "test":
        summary["harder"] = attempt(splits.harder, HARDER_SAMPLES, label and f"{label}, harder").summary()
    if rows:
        summary["loss"] = held_out_loss(policy, rows)
    if rank() == 0:
        write_jsonl(directory / "evaluation.jsonl", evaluation.attempts)
        write_json(directory / "evaluation.json", summary)
    return Measured(evaluation, summary)


def stored(directory: Path) -> Measured | None:
    """Return what `measure` wrote into a directory, None if it did not get to the end."""
    if not (directory / "evaluation.json").is_file():
        return None
    attempts = tuple(read_jsonl(directory / "evaluation.jsonl"))
    return Measured(Evaluation(attempts), read_json(directory / "evaluation.json"))


def success_function(recipe: Recipe, splits: Splits, rewards: Sequence[Reward] = ()) -> Reward | None:
    """Return what says whether an attempt solved its problem: `success_func`, else the first reward function.

    rewards: functions that take the place of the recipe's `reward_funcs`. None where `success_func` is '', and where
    `math_reward` is nobody's wish but the default's and would find no reference answers.

    Raises DataError when `math_reward` does not accept a held-out reference answer as its own solution.
    """
    name = recipe["success_func"]
    if name == "":
        return None
    if name is None and rewards:
        function = rewards[0]
    else:
        key = "reward_funcs" if name is None else "success_func"
        function = import_function(name or recipe["reward_funcs"][0], key=key)
    if function is math_reward:
        if not splits.reference and not {"success_func", "reward_funcs"} & recipe.given:
            return None
        check_references(splits.held_out)
    return function


def check_references(demonstrations: Sequence[Demonstration]) -> None:
    """Grade each reference answer against itself: one that is not its own solution would make every attempt wrong.

    Raises DataError with the first that `math_reward` does not accept.
    """
    texts = [_reference(d) for d in demonstrations]
    graded = math_reward(prompts=texts, completions=texts, answer=texts)
    refused = [d for d, value in zip(demonstrations, graded, strict=True) if value != 1.0]
    if refused:
        more = f" (nor those of {len(refused) - 1} more rows)" if len(refused) > 1 else ""
        raise DataError(
            f"{refused[0].problem.where}: math_reward does not accept the reference {_reference(refused[0])[-60:]!r} "
            f"as its own solution{more}: mend or remove it, or name other reward functions"
        )


def judge_success(success: Reward | None, asked: Sequence[Demonstration], texts: Sequence[str]) -> list[str]:
    """Return `yes`, `no` or `unknown` for each attempt; the function gets TRL's arguments, in the prompt's form."""
    if success is None or not asked:
        return ["unknown"] * len(asked)
    chat = [not isinstance(d.problem.prompt, str) for d in asked]
    completions: list[str | list[Message]] = [
        [{"role": "assistant", "content": text}] if as_messages else text
        for text, as_messages in zip(texts, chat, strict=True)
    ]
    values = ask(success, [d.problem for d in asked], completions)
    return ["unknown" if value is None else "yes" if value >= 1.0 else "no" for value in values]


@torch.no_grad()
def held_out_loss(policy: Policy, rows: Sequence[Row]) -> float:
    """Return the mean negative log-likelihood of the supervised tokens of held-out rows, in nats."""
    total, count = 0.0, 0
    with sampling_mode(policy.model, autocast=policy.precision.autocast):
        for batch in _batches(sorted(rows, key=lambda row: len(row.input_ids)), most_tokens=2048):
            width = len(batch[-1].input_ids)
            device = policy.model.device
            ids = torch.tensor([(*r.input_ids, *[0] * (width - len(r.input_ids))) for r in batch], device=device)
            labels = torch.tensor([(*r.labels, *[IGNORED] * (width - len(r.labels))) for r in batch], device=device)
            mask = torch.tensor([[1] * len(r.labels) + [0] * (width - len(r.labels)) for r in batch], device=device)
            logits = policy.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
            )
            total, count = total + float(loss), count + int((labels[:, 1:] != IGNORED).sum())
    return total / max(count, 1)


def _generate(policy: Policy, requests: Sequence[Request], *, label: str) -> dict[tuple[str | int, ...], Action]:
    """Run the engine on this process's share of the requests and gather everybody's actions."""
    # Whole problems go to one process, so that their samples share a prefill.
    problems = list(dict.fromkeys(request.context_ids for request in requests))
    mine = set(problems[rank() :: world_size()])
    share = [request for request in requests if request.context_ids in mine]
    engine = HFEngine(policy.model, pad_id=policy.renderer.tokenizer.pad_token_id)
    with sampling_mode(policy.model, autocast=policy.precision.autocast):
        actions = list(_watched(engine.generate(share), total=len(share), label=label if rank() == 0 else ""))
    return {action.key: action for action in gather(policy, actions)}


def gather(policy: Policy, items: list[Any]) -> list[Any]:
    """Return the items of all processes, by process; every process must call it."""
    if world_size() == 1:
        return items
    from accelerate import PartialState
    from accelerate.utils import gather_object

    PartialState(cpu=policy.precision.device == "cpu")
    return list(gather_object(items))


def _watched(actions: Iterable[Action], *, total: int, label: str) -> Iterable[Action]:
    """Show attempts done, tokens a second and time left; nothing without a label."""
    tokens, start = 0, time.perf_counter()
    with tqdm(total=total, desc=label, unit="attempt", disable=not (label and sys.stderr.isatty()), leave=False) as bar:
        for action in actions:
            tokens += len(action.ids)
            bar.update()
            if bar.n % 64 == 0:
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
            yield action
    if label:
        seconds = time.perf_counter() - start
        print(f"{label}: {total:,} attempts in {seconds:.0f} s, {tokens / seconds:,.0f} tokens/s", flush=True)


def _batches(rows: Sequence[Row], *, most_tokens: int) -> Iterable[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(row.input_ids) > most_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _reference(demonstration: Demonstration) -> str:
    columns = demonstration.problem.columns
    return str(next((columns[name] for name in REFERENCES if name in columns), ""))
