"""Runs of `bcft.filtered` that die by SIGKILL and are started again; a script, so that it imports once and forks.

    PYTHONPATH=tests python -m helpers.killed DIRECTORY RECIPE_OR_- KEYS_JSON [POINT ...]

One run is left alone. For each point given, or each in POINTS, a child runs until it is killed there, another runs the
same to its end, and what they leave is hashed. Prints a JSON object: `digests`, point -> hash of all that must not
depend on kills, where that of `another seed` shows that the hash can differ; `asked`: how many attempts the paid reward
was asked for in the run left alone.
"""

import hashlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.functions import odd

from bcft import filtered
from bcft.algorithms import filtered_bc, learner, rounds
from bcft.evaluation import held_out
from bcft.rollout import sample
from bcft.selection import scoring, store
from bcft.training import trainer

# What a run imports when it needs it: children do not import it again.
import bcft.generation.hf  # noqa: F401 isort: skip
import peft  # noqa: F401 isort: skip

POINTS: dict[str, tuple[Any, str, str, int]] = {
    "before any rollout": (filtered_bc, "start", "after", 1),
    "in the sanity check, between score batches": (store.ScoreStore, "add", "after", 1),
    "after the sanity check": (filtered_bc, "try_first_problems", "after", 1),
    "after playing the base's test": (held_out, "play_journaled", "after", 1),
    "after grading the base's test": (held_out, "write_jsonl", "before", 1),
    "after the evaluation of the base": (filtered_bc, "evaluate_base", "after", 1),
    "after a chunk": (sample.Journal, "append", "after", 3),
    "in a chunk": (sample.Journal, "append", "torn", 3),
    "before the rollouts are sealed": (sample, "seal", "before", 2),
    "after the rollouts are sealed": (sample, "seal", "after", 2),
    "between score batches": (store.ScoreStore, "add", "after", -12),
    "in storing answers": (store.ScoreStore, "add", "torn score", -12),
    "after scoring": (filtered_bc, "score_round", "after", 2),
    "before the selection is sealed": (rounds, "seal", "before", 2),
    "after the selection": (filtered_bc, "select_round", "after", 2),
    "in training": (trainer.BCTrainer, "training_step", "after", 4),
    "after training": (trainer, "fit", "after", 2),
    "in saving": (learner, "save_policy", "after", -1),
    "after saving": (filtered_bc, "train_round", "after", 2),
    "after playing an evaluation": (held_out, "play_journaled", "after", -2),
    "between two files of an evaluation": (held_out, "write_json", "before", -2),
    "before the next round": (filtered_bc, "evaluate_round", "after", 1),
    "after evaluation": (filtered_bc, "evaluate_round", "after", 2),
    "before the round is committed": (rounds, "commit_round", "before", 2),
    "after the round is committed": (rounds, "commit_round", "after", 1),
    "before the test": (filtered_bc, "conclude", "before", 1),
    "in writing the best round": (rounds, "save_policy", "after", -1),
    "before the run is committed": (rounds, "write_best", "inside", 1),
}
"""Name -> whose function dies, when, and at which of its calls; -1 is the last call of a whole run, -2 that before."""
UNSTORED = "in storing answers"
"""The one moment at which an answer can be lost: the function has given it, and it is not on the disk yet."""


def paid(completions: list[str], **_: Any) -> list[float]:
    """Answer differently each time, and put every answer on the bill: a file beside the run."""
    bill = Path(os.environ["BILL"])
    before = bill.stat().st_size if bill.exists() else 0
    with bill.open("a") as file:
        file.write("." * len(completions))
    return [float((before + number) * 7919 % 101) for number in range(len(completions))]


def run(path: Path, recipe: str, keys: dict[str, Any]) -> None:
    """Run to the end; with the key `paid`, with a reward that is paid for."""
    sample.CHUNK = scoring.BATCH = 7
    os.environ["BILL"] = str(path.with_suffix(".bill"))
    own = {key: value for key, value in keys.items() if key != "paid"}
    rewards = [paid if "paid" in keys else odd] if own.get("success_func") == "" else None
    filtered.run(None if recipe == "-" else recipe, output_dir=str(path), reward_funcs=rewards, **own)


def forked(action: Callable[[], None]) -> int:
    """Do something in a child; return how it ended: 0, an exit code, or minus a signal."""
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        try:
            action()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_counted(path: Path, recipe: str, keys: dict[str, Any]) -> None:
    """Run to the end, and name each call of a function whose last calls are points in a file beside the run."""

    def count(holder: Any, name: str) -> None:
        original = getattr(holder, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            with path.with_suffix(".calls").open("a") as file:
                file.write(f"{holder.__name__}.{name}\n")
            return original(*args, **kwargs)

        setattr(holder, name, counting)

    for holder, name in {(holder, name) for holder, name, _, times in POINTS.values() if times < 0}:
        count(holder, name)
    run(path, recipe, keys)


def die() -> None:
    """Die as by the power switch: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def killed(holder: Any, name: str, when: str, times: int, path: Path, recipe: str, keys: dict[str, Any]) -> None:
    """Run until the function is called for the given time, and die there."""
    original, left = getattr(holder, name), [times]

    def dying(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        last = left[0] == 0
        if last and when.startswith("torn"):
            journal = args[0] if when == "torn" else args[0].journal
            journal.path.parent.mkdir(parents=True, exist_ok=True)  # the torn line may be the first
            with journal.path.open("ab") as file:
                file.write(b'{"sha256": "0123", "rows": [{"id": ')
        if last and when == "inside":
            rounds.write_manifest = lambda *_, **__: die()  # type: ignore[assignment]
        if last and when != "after" and when != "inside":
            die()
        answer = original(*args, **kwargs)
        if last:
            die()
        return answer

    setattr(holder, name, dying)
    run(path, recipe, keys)


def digest(path: Path) -> str:
    """Hash what was played, scored, kept and paid in every round, the weights at the end, and the conclusion."""
    files = [*path.glob("round_*/*.jsonl"), *path.glob("round_*/evaluation.json"), *path.glob("best/*.safetensors")]
    files += [*path.glob("round_*/model/*.safetensors"), path / "metrics.json"]
    found = hashlib.sha256(str(asked(path)).encode())
    for file in sorted(files):
        found.update(str(file.relative_to(path)).encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def asked(path: Path) -> int:
    """Return for how many attempts the paid reward was asked."""
    bill = path.with_suffix(".bill")
    return bill.stat().st_size if bill.exists() else 0


def main() -> int:
    """Try the points; print what each left."""
    root, recipe, keys = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    chosen = sys.argv[4:] or list(POINTS)
    assert forked(lambda: run_counted(root / "alone", recipe, keys)) == 0
    calls = Counter((root / "alone.calls").read_text().splitlines())
    assert forked(lambda: run(root / "other", recipe, keys | {"seed": 1})) == 0
    found = {"alone": digest(root / "alone"), "another seed": digest(root / "other")}
    for number, point in enumerate(chosen):
        holder, name, when, times = POINTS[point]
        if point == UNSTORED and "paid" in keys:
            continue
        path = root / f"{number:02d}"
        if times < 0:
            times += 1 + calls[f"{holder.__name__}.{name}"]
        ended = forked(lambda: killed(holder, name, when, times, path, recipe, keys))  # noqa: B023
        assert ended == -signal.SIGKILL, f"{point}: the run was not killed but ended with {ended}"
        assert not (path / "manifest.json").exists(), f"{point}: the run is committed although it was killed"
        assert forked(lambda: run(path, recipe, keys)) == 0, f"{point}: the same command did not resume"  # noqa: B023
        found[point] = digest(path)
    print(json.dumps({"digests": found, "asked": asked(root / "alone")}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
