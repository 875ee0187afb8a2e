"""Every generator of reasoning-gym through our path: problems, oracle answers, splits that do not overlap.

The generators are all that the installed package has; `NO_ANSWER` and `NEVER_MADE` name the exceptions.
"""

import inspect
import re
import subprocess
import sys

import pytest

from bcft import collect, evaluate, refilter, sft
from bcft.config.loader import load
from bcft.data.loading import load_splits
from bcft.errors import UsageError
from bcft.integrations import reasoning_gym_items as items
from bcft.integrations.reasoning_gym import checked_source, extract, stated
from bcft.rewards.base import described
from bcft.runs.storage import read_jsonl
from bcft.selection.scoring import Scorer

package = pytest.importorskip("reasoning_gym")
NAMES = sorted(set(package.factory.DATASETS) - {"composite"})
NO_ANSWER = {
    "boxnet": "its answer is null: a plan, which the scorer plays",
    "graph_color": "its answer is null: any proper coloring is right",
    "propositional_logic": "its answer is null: any conclusion that follows is right",
    "rubiks_cube": "its answer is null: any moves that solve the cube are right",
    "rush_hour": "its answer is null: any moves that free the car are right",
}
"""Generators that publish no oracle answer."""
FEW = 4


def splits_of(name, *, dev=FEW, test=FEW, train=FEW, **keys):
    """Return the splits of a generator, and their scorer."""
    recipe = {"model_name_or_path": "bcft:tiny-math", "dataset_name": f"reasoning-gym:{name}"}
    recipe |= {"eval_dev_problems": dev, "eval_test_problems": test, "dataset_train_split": f"train[:{train}]"}
    config = load("filtered", None, recipe | keys)
    splits = load_splits(config.data, config.evaluation, demonstrations=False)
    problems = [d.problem for d in splits.held_out]
    return splits, Scorer.of(config.selection, problems, environment=None, own=splits.reward)


def texts(part):
    return [d.problem.prompt for d in part]


@pytest.fixture(autouse=True)
def closed_sandboxes():
    """A sandbox is kept for each generator: hundreds of them would fill the memory."""
    yield
    items.close()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "knight_swap")) for name in NAMES]
)
def test_a_generator_gives_problems_that_its_oracle_answers_solve(name):
    splits, scorer = splits_of(name, answer_format="tag")
    parts = [texts(part) for part in (splits.train, splits.dev, splits.test)]
    assert [len(part) for part in parts] == [FEW] * 3
    assert len({text for part in parts for text in part}) == 3 * FEW
    every = [d.problem for d in (*splits.train, *splits.held_out)]
    replies = [d.completion[-1]["content"] if d.completion else "" for d in (*splits.train, *splits.held_out)]
    note = scorer.check(every)
    if name in NO_ANSWER:
        assert note == f"reasoning-gym: {name} publishes no oracle answers to check"
        return
    assert note == f"reasoning-gym: {3 * FEW} of {3 * FEW} oracle answers score 1.0"
    graded = scorer.success(completions=replies[:2], index=[p.columns["index"] for p in every[:2]])
    assert graded == [1.0, 1.0], "as it grades a policy's answers"
    assert scorer.success(completions=["no tag"], index=[every[0].columns["index"]]) == [0.0]


def test_the_named_exceptions_and_lists_are_generators():
    assert {*NO_ANSWER, *items.COMPARING, *items.UNSEEDED} <= set(NAMES)


def test_no_scorer_that_evaluates_text_or_plays_moves_runs_in_this_process():
    """A scorer of a later version may evaluate what this one compares: the source of each is searched."""
    evaluates = re.compile(r"\b(eval|exec|parse_expr|sympify|Fraction|loads|prod|pow|factorial)\(|\bwhile\b")
    inside = [name for name in NAMES if not items.Items(name, '{"seed": 0}').graded_outside]
    for name in inside:
        assert not evaluates.search(inspect.getsource(package.factory.DATASETS[name][0].score_answer)), name
    assert {"chain_sum", "gcd", "sudoku"} <= set(inside)
    assert not {"countdown", "rush_hour", "codeio", "spiral_matrix", "bitwise_arithmetic"} & set(inside)


def test_oracle_answers_that_are_numbers_survive_the_form_number():
    """As exponents in power_function, and with commas in number_format."""
    survived = set()
    for name in sorted(set(NAMES) - items.UNSEEDED - {"futoshiki"}):
        source = checked_source(f"reasoning-gym:{name}", {}, answer_format="number", prompt_suffix=None)
        answers = {index: source.items.answer(index) or "" for index in range(4_000, 4_010)}
        numbers = {index: answer for index, answer in answers.items() if number(answer) is not None}
        extracted = {index: extract(stated(answer, "number"), "number") for index, answer in numbers.items()}
        assert [number(text) for text in extracted.values()] == [number(text) for text in numbers.values()], name
        assert source.items.scores(list(extracted.items()), trusted=True) == [1.0] * len(numbers), name
        survived |= {name} if numbers else set()
    assert len(survived) > 25
    assert {"chain_sum", "decimal_arithmetic", "number_format", "power_function"} <= survived


def number(answer):
    try:
        return float(answer.replace(",", ""))
    except ValueError:
        return None


@pytest.mark.parametrize("name", ["chain_sum", "isomorphic_strings", "codeio", "list_functions"])
def test_the_data_are_the_same_in_every_process(name):
    """Also where items depend on Python's hash seed or on a global generator."""
    code = (
        "from bcft.config.loader import load; from bcft.data.loading import load_splits\n"
        f"c = load('filtered', None, {{'model_name_or_path': 'bcft:tiny-math', 'dataset_name': 'reasoning-gym:{name}',"
        " 'eval_dev_problems': 5, 'eval_test_problems': 5, 'dataset_train_split': 'train[:30]'})\n"
        "print(load_splits(c.data, c.evaluation, demonstrations=False).digest)"
    )
    command, environment = [sys.executable, "-c", code], {"PYTHONHASHSEED": "1"}
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert other.strip() == splits_of(name, dev=5, test=5, train=30)[0].digest


def test_splits_do_not_depend_on_how_many_problems_are_asked_for():
    few, many = (splits_of("chain_sum", dev=n, test=n, train=n)[0] for n in (5, 20))
    for part in ("train", "dev", "test"):
        assert texts(getattr(few, part)) == texts(getattr(many, part))[:5]
    assert texts(splits_of("chain_sum", dataset_train_split="train[5:20]")[0].train) == texts(many.train)[5:]


def test_a_generator_of_few_problems_never_repeats_one():
    """Two terms of one digit: 200 problems, which 6,000 indices repeat many times."""
    arguments = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    splits, _ = splits_of("chain_sum", dev=40, test=50, train=1000, dataset_args=arguments)
    parts = [texts(part) for part in (splits.train, splits.dev, splits.test)]
    assert [len(part) for part in parts] == [110, 40, 50]
    assert len({text for part in parts for text in part}) == 200
    with pytest.raises(UsageError, match=r"eval_test_problems: 500: the 2,000 items .* give 200 different problems"):
        splits_of("chain_sum", dev=40, test=500, dataset_args=arguments)


def test_a_generator_that_ends_gives_what_it_has():
    """gsm_symbolic draws its templates when it is made: it has `SIZE` items."""
    assert items.Items("gsm_symbolic", '{"seed": 0}').answer(items.SIZE) is None
    assert items.Items("gsm_symbolic", '{"seed": 0}').answer(items.SIZE - 1)
    assert items.Items("chain_sum", '{"seed": 0}').answer(items.SIZE)


def test_near_seeds_shift_the_stream():
    """Why the splits are ranges of one seed: with seeds 0 and 1 they would be the same problems."""
    a, b = (package.create_dataset("chain_sum", size=10, seed=seed) for seed in (0, 1))
    assert [a[i + 1]["question"] for i in range(9)] == [b[i]["question"] for i in range(9)]


# Grading


@pytest.mark.parametrize(
    ("reply", "reward", "partial"),
    [("{}", 1.0, 1.0), (" {}\n", 1.0, 1.0), ("{}.0", 1.0, 1.0), ("{}.", 1.0, 1.0), ("It is {}", 0.0, 0.2), ("", 0, 0)],
)
def test_success_is_a_full_score_or_the_same_number(reply, reward, partial):
    splits, _ = splits_of("chain_sum")
    problem = splits.train[0].problem
    text, index = reply.format(problem.columns["answer"]), problem.columns["index"]
    assert splits.reward(completions=[text], index=[index]) == [reward]
    (score,) = splits.reward(completions=[text], index=[index], partial_scores=True)
    assert score >= partial
    assert (score == 1.0) == (reward == 1.0)


def test_the_scorers_own_score_is_the_partial_one():
    splits, _ = splits_of("chain_sum")
    index, answer = splits.train[0].problem.columns["index"], splits.train[0].problem.columns["answer"]
    expected = package.create_dataset("chain_sum", seed=0).score_answer(answer=f"= {answer}!", entry={"answer": answer})
    assert 0 < expected < 1
    assert splits.reward(completions=[f"= {answer}!"], index=[index], partial_scores=True) == [expected]


@pytest.mark.parametrize(
    ("name", "answer", "reward"),
    [
        ("countdown", "9**9**9**9", None),
        ("coin_flip", "1e999999999", None),
        ("rush_hour", "A+999999999999", None),
        ("n_queens", "[1] * 10 ** 12", 0.0),
        ("simple_integration", "x**" * 3000 + "x", 0.0),
        ("string_insertion", "().__class__", 0.0),
        ("bitwise_arithmetic", "9**9**9**9", 0.0),
        ("prime_factorization", "hello", 0.0),
        ("game_of_life", "{}", 0.0),
        ("boxnet", "0", 0.0),
    ],
)
def test_an_answer_that_hangs_is_ungraded_one_that_raises_scores_0_and_the_next_is_graded(
    name, answer, reward, monkeypatch
):
    monkeypatch.setattr(items, "SCORING_SECONDS", 2.0)
    splits, _ = splits_of(name, dev=1, test=1, train=2)
    problem = splits.train[0].problem
    index, oracle = problem.columns["index"], problem.columns.get("answer")
    rewards = splits.reward(completions=[answer, oracle or "no"], index=[index] * 2)
    assert rewards == [reward, 1.0 if oracle else 0.0]


def test_an_answer_that_fills_the_memory_is_not_right_and_the_next_is_graded(monkeypatch):
    """The scorer itself may take the end of its memory for a wrong answer."""
    monkeypatch.setattr(items, "SCORING_SECONDS", 2.0)
    splits, _ = splits_of("puzzle24", dev=1, test=1, train=2)
    index, oracle = (splits.train[0].problem.columns[key] for key in ("index", "answer"))
    wrong, right = splits.reward(completions=["factorial(factorial(factorial(9)))", oracle], index=[index] * 2)
    assert wrong in (None, 0.0)
    assert right == 1.0


def test_a_scorers_eval_reads_values_and_runs_nothing(tmp_path):
    canary = tmp_path / "ran"
    splits, _ = splits_of("spiral_matrix", dev=1, test=1, train=1)
    index = splits.train[0].problem.columns["index"]
    for answer in (f"__import__('pathlib').Path({str(canary)!r}).touch()", f"open({str(canary)!r}, 'w')"):
        assert splits.reward(completions=[answer], index=[index]) == [0.0]
    assert not canary.exists()
    numbers = splits.train[0].problem.columns["answer"].split()
    (partial,) = splits.reward(completions=[str(list(map(int, numbers)))], index=[index], partial_scores=True)
    assert partial == 0.1, "a list is read all the same"


def test_a_composite_mixes_its_generators_and_each_grades_its_own():
    parts = [{"name": "chain_sum", "weight": 2, "config": {"max_terms": 3}}, {"name": "countdown"}, {"name": "gcd"}]
    parts.append({"name": "basic_arithmetic"})  # it evaluates the problems that it makes
    splits, scorer = splits_of("composite", train=30, dataset_args={"datasets": parts})
    prompts = texts(splits.train)
    for words in ("State the final answer", "Find the Greatest Common Divisor"):
        assert any(words in prompt for prompt in prompts)
    assert scorer.check([d.problem for d in splits.train]) == "reasoning-gym: 30 of 30 oracle answers score 1.0"
    asked = {key: [d.problem.columns[key] for d in splits.train] for key in ("answer", "index")}
    assert splits.reward(completions=asked["answer"], index=asked["index"]) == [1.0] * 30, "in the sandbox"


def test_a_reward_is_known_by_its_generator_and_its_arguments():
    names = [described(splits_of("chain_sum", dataset_args={"seed": seed})[0].reward) for seed in (0, 1)]
    assert names[0] != names[1]
    assert "chain_sum" in names[0]


# What is refused


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("chain_sun", {}, "reasoning-gym has no generator 'chain_sun'; did you mean chain_sum?"),
        ("chain_sum", {"max_term": 3}, "chain_sum has no argument 'max_term'; did you mean max_terms?"),
        ("chain_sum", {"x": 3}, "chain_sum has no argument 'x'; there are min_terms, max_terms"),
        ("chain_sum", {"max_terms": 1}, 'does not accept {"max_terms": 1}: max_terms must be >= min_terms'),
        ("chain_sum", {"max_terms": "a"}, "does not accept"),
        ("chain_sum", {"max_terms": 3.5}, "cannot make problems with"),
        ("chain_sum", {"size": 10}, "dataset_train_split says how many"),
        ("chain_sum", {"seed": -1}, "seed: wants an integer >= 0, not -1"),
        ("composite", {}, "composite wants a list of {name, weight, config}"),
        ("composite", {"datasets": [{"name": "gdc"}]}, "no generator 'gdc'; did you mean gcd?"),
        ("composite", {"datasets": [{"name": "gcd", "wieght": 1}]}, "wants {name, weight, config}"),
        ("composite", {"datasets": [{"name": "gcd"}, {"name": "gcd"}]}, "Duplicate dataset names"),
        ("composite", {"datasets": [{"name": "gcd", "config": {"x": 1}}]}, "gcd has no argument 'x'"),
    ],
)
def test_a_mistake_is_told_in_one_line(name, arguments, message):
    with pytest.raises(UsageError) as caught:
        splits_of(name, dataset_args=arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_of_a_recipe_become_tuples_where_the_generator_has_them():
    splits, _ = splits_of("basic_arithmetic", dataset_args={"operators": ["+"], "allow_negation": False})
    assert not any(sign in text for text in texts(splits.train) for sign in "*/")


# Whole runs


@pytest.mark.slow
def test_what_collect_keeps_is_a_dataset_with_the_same_held_out_problems(tmp_path):
    """A tiny policy learns the form from the oracle answers; its own rows are trained, graded and measured alike."""
    arguments = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "seed": 3}
    shared = {
        "dataset_args": arguments, "answer_format": "hash", "prompt_suffix": "Go.", "learning_rate": 3e-3,
        "eval_dev_problems": 10, "eval_test_problems": 10, "eval_test_samples": 2, "max_completion_length": 16,
    }  # fmt: skip
    name, few = "reasoning-gym:chain_sum", {"dataset_train_split": "train[:60]"}
    everything = {"require_success": "false", "keep_quantile": 0.0}
    model = {"model_name_or_path": "bcft:tiny-math"}
    paths = {part: str(tmp_path / part) for part in ("form", "rows", "again", "own")}
    quiet = {"quiet": True}
    sft.run(None, **model, dataset_name=name, output_dir=paths["form"], num_train_epochs=8, **shared, **few, **quiet)
    collect.run(
        None, model_name_or_path=paths["form"], dataset_name=name, output_dir=paths["rows"], prompts_per_round=12,
        **without(shared, "learning_rate", "eval_test_samples"), **everything, **few, **quiet,
    )  # fmt: skip
    (tmp_path / "refilter.yaml").write_text("model_name_or_path: bcft:tiny-math\ndataset_name: bcft:arithmetic\n")
    refilter.run(
        tmp_path / "refilter.yaml", rollouts=paths["rows"], output_dir=paths["again"],
        reward_args={"partial_scores": True}, **everything, **quiet,
    )  # fmt: skip
    rows, again = (read_jsonl(tmp_path / part / "scores.jsonl") for part in ("rows", "again"))
    assert [row["success"] for row in rows] == [row["success"] for row in again]
    assert {row["reward"] for row in rows} <= {0.0, 1.0}
    for kept in (paths["rows"], paths["again"]):
        keys = {"model_name_or_path": paths["form"], "dataset_name": kept}
        config = load("sft", None, keys | {"eval_dev_problems": 10, "eval_test_problems": 10})
        splits = load_splits(config.data, config.evaluation)
        whole, _ = splits_of("chain_sum", dev=10, test=10, train=60, **dict(list(shared.items())[:3]))
        assert (splits.dev, splits.test) == (whole.dev, whole.test)
        assert splits.reward is not None
    result = sft.run(
        None, model_name_or_path=paths["form"], dataset_name=paths["rows"], output_dir=paths["own"], max_steps=1,
        **without(shared, "dataset_args", "answer_format", "prompt_suffix"), **quiet,
    )  # fmt: skip
    assert result["final"]["n"] == 10
    # Index i of seed 4003 is index 4000 + i of seed 3: its test problems are training problems of the run.
    keys = without(shared, "learning_rate") | {"dataset_args": arguments | {"seed": 4003}}
    with pytest.raises(
        UsageError, match=r"dataset_args: \d+ of the test problems, .* were training problems of .*form"
    ):
        evaluate.run(None, model_name_or_path=paths["form"], dataset_name=name, **keys, **few, **quiet)


def without(keys, *names):
    return {key: value for key, value in keys.items() if key not in names}
