"""Filtered behavior cloning before its first round: checks, the policy, the sanity check, the base's evaluation."""

import shutil
import time
from collections.abc import Collection

from bcft.algorithms.learner import Learner
from bcft.algorithms.run import Run
from bcft.algorithms.scales import check_scales
from bcft.data.checks import check_prompts, without_special_tokens
from bcft.data.examples import replay_examples
from bcft.data.weights import scaled
from bcft.errors import FaultError
from bcft.evaluation.divergence import REFERENCE
from bcft.evaluation.held_out import UNFINISHED, forget
from bcft.evaluation.results import Measured, stored
from bcft.policy.loading import check_disk, check_model, load_policy, longest_row, with_adapter
from bcft.policy.precision import choose_precision
from bcft.reporting.sanity_check import PROBLEMS, SanityCheck, sanity_check
from bcft.rollout.sample import journal_path, play_journaled
from bcft.runs.disk import copies_of_rounds
from bcft.runs.distributed import barrier, connect, rank
from bcft.runs.drift import GRADING, discard_attempts, remeasures, retrains
from bcft.runs.history import History
from bcft.runs.progress import Progress
from bcft.training.checks import check_training
from bcft.types import TrainingExample


def start(run: Run, history: History) -> tuple[Learner, list[TrainingExample]]:
    """Load the policy as it was after the last committed round, and record what the run depends on.

    Returns the learner, and the demonstrations to replay. What can be refused without weights is refused before they
    are loaded.
    """
    config, splits, session = run.config, run.splits, run.session
    with Progress(session.label("checking references and prompts")):
        notes = [run.scorer.check(list(run.problems.values()))]
        replay, note = _check(run, history)
    notes.append(note)
    if drift := session.directory.drift:
        connect(cpu=choose_precision(history.base_model, config.model).device == "cpu")
        barrier()  # every process has read what another recipe left
        if rank() == 0:
            discard_stale(history, drift)
        barrier()  # none loads what is deleted
    # Which round is the best is not known before the base is evaluated: it needs the weights before training first.
    at = history.weights_round_after(history.last) if "eval" in history.records[0] else 0
    with Progress(session.label("loading the model")):
        loaded = load_policy(history.weights_path(at), config.model)
        policy = with_adapter(loaded, config.model, seed=config.training.seed)
    learner = Learner(config, policy, session.path)
    if policy is not loaded and rank() == 0:  # a new adapter is saved as round 0
        learner.save(history.path(0) / "model", {})
    session.say(f"model: {history.base_model} on {policy.precision.why}")
    session.say(f"data: {len(run.problems):,} problems to attempt, {splits.held_out_words}")
    session.say(f"evaluation: {run.budget.plan}")
    if config.environment.environment:
        session.say(f"environment: {config.environment.environment}, at most {config.environment.max_turns} turns")
    functions = run.scorer.described
    for note in filter(None, (policy.note, *notes, session.directory.changed_functions(functions))):
        session.say(note)
    barrier()  # every process has read the directory before it is written
    attempted = [d.problem for d in (*splits.train, *splits.held_out)]
    session.directory.record(attempted, splits.digest, functions=functions)
    return learner, replay


def _check(run: Run, history: History) -> tuple[list[TrainingExample], str]:
    """Refuse what can be refused without weights; return the demonstrations to replay, and a note about them."""
    config, splits = run.config, run.splits
    check_training(config.training)
    check_scales(run)
    renderer = check_model(history.base_model, config.model).renderer
    problems = [*run.problems.values(), *(d.problem for d in splits.held_out)]
    check_prompts(problems, renderer, special_tokens=config.data.special_tokens)
    demonstrations, note = without_special_tokens(splits.replay, renderer, special_tokens=config.data.special_tokens)
    limit = longest_row(history.base_model, config.model, config.data.max_length)
    replay = replay_examples(demonstrations, renderer, max_length=limit, train_on=config.data.train_on)
    weighted, weights_note = scaled(replay, config.training)
    check_disk(
        run.session.path,
        history.base_model,
        config.model,
        config.training,
        copies=copies_of_rounds(config.rounds),
        optimizer=not config.rounds.reset_optimizer,
    )
    return list(weighted), "; ".join(filter(None, (note, weights_note)))


def discard_stale(history: History, drift: Collection[str]) -> None:
    """Delete what another recipe left and this one would read: of an unfinished round and of evaluations.

    drift: the keys that differ. What none of them touches stays; committed rounds stay. Before any round is committed
    the adapter that training starts from goes too, unless only grading differs. It happens before the new recipe is
    recorded: an interruption in between leaves a directory that still differs.
    """
    unfinished = history.path(history.last + 1)
    discard_attempts(unfinished, drift)
    if retrains(drift):
        shutil.rmtree(unfinished / "model", ignore_errors=True)
    if not history.last and not GRADING.issuperset(drift):
        shutil.rmtree(history.path(0) / "model", ignore_errors=True)
    stale = [unfinished] if retrains(drift) or remeasures(drift) else []
    if remeasures(drift):
        stale += [history.path(0), *history.directory.glob("round_*/test")]
        (history.path(0) / REFERENCE).unlink(missing_ok=True)
        for measured in history.directory.glob("round_*/scale_*"):
            shutil.rmtree(measured)
    for file in [file for directory in stale for file in directory.glob("evaluation.json*")]:
        file.unlink()


def try_first_problems(run: Run, learner: Learner, history: History) -> SanityCheck | None:
    """Play and score the first problems of round 1, and check that there is something to learn.

    Attempts and answers stay in the round's journal. It costs little, so it comes before the evaluation of the base: a
    reward function that raises does it here. How long they took says how long evaluation will take. None once a round
    is committed. Raises FaultError when nothing can be learned from the attempts.
    """
    run.clock.lap()
    if history.last:
        return None
    config, directory = run.config, history.path(1)
    resumed = journal_path(directory).exists()
    attempts = run.attempts(1)[: PROBLEMS * config.sampling.num_generations]
    start = time.perf_counter()
    with run.clock.phase("rollout"):
        trajectories = play_journaled(
            learner.policy,
            attempts,
            run.rollouts,
            directory=directory,
            clock=run.clock,
            label=run.session.label("sanity check, roll out"),
        )
    with run.clock.phase("score"):
        scores = run.score(trajectories, directory, step=0, during="sanity check")
    seconds = time.perf_counter() - start
    check = sanity_check(
        scores,
        run.problems,
        answers=run.scorer.answers,
        environment=config.environment.environment,
        max_completion_length=config.sampling.max_completion_length,
    )
    run.session.say("\n".join(check.lines))
    _refuse(check.reason)
    if run.budget.evaluated and not resumed:  # an attempt that is in the journal took no time now
        run.session.say(f"evaluation: {run.budget.expected(seconds, attempts=len(attempts))}")
    return check


def evaluate_base(run: Run, learner: Learner, history: History, check: SanityCheck | None) -> tuple[Measured, Measured]:
    """Evaluate the policy as it is, on test and on dev, unless its results are there; start the history with dev.

    What it says on its attempts at dev is written too, since later rounds are compared with it. check: of the first
    problems. Raises FaultError when dev says too that there is nothing to learn.
    """
    directory = history.path(0)
    test, dev, recorded = stored(directory / "test"), stored(directory), (directory / REFERENCE).is_file()
    missing = not (test and dev and recorded)
    begun = bool(test or dev) or any((place / UNFINISHED).exists() for place in (directory / "test", directory))
    if missing and history.last:  # another recipe, whose evaluations are missing, continues with these rounds
        learner.restore(history.weights_path(0))
    with run.clock.left_out():
        start = time.perf_counter()
        test = test or run.measure(learner, directory / "test", "test", during="base", step=0)
        dev = dev or run.measure(learner, directory, "dev", during="base", step=0, keep=True)
        seconds = time.perf_counter() - start
        if not recorded:
            run.record_base(learner, directory)
        if rank() == 0:
            forget(directory)
    if not begun and not history.last and run.budget.evaluated:
        run.session.say(f"evaluation: {run.budget.time(seconds)}")
    history.start(dev.summary)
    if missing and history.last:
        learner.restore(history.weights_path(history.weights_round_after(history.last)))
    if check:
        _refuse(check.reason_on_dev(dev.summary, require_success=run.config.selection.require_success))
    return test, dev


def _refuse(reason: str) -> None:
    if reason:
        raise FaultError(f"nothing can be learned: {reason}")
