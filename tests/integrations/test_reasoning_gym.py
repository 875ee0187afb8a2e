"""reasoning-gym's problems without the package: a stand-in with its interface, and what is refused before it is there.

`tests/real/test_reasoning_gym.py` holds the package itself to the same laws.
"""

import json
import signal
import sys
from dataclasses import dataclass
from random import Random
from types import ModuleType, SimpleNamespace

import pytest
from helpers.recipes import findings

from bcft import evaluate
from bcft.config.loader import load
from bcft.data.loading import load_splits
from bcft.data.sources import own_reward
from bcft.errors import DataError, FaultError, Preempted, UsageError
from bcft.integrations import reasoning_gym, reasoning_gym_items
from bcft.rewards.base import answers_of, described, solved
from bcft.rewards.sandbox import FAILURES
from bcft.selection.scoring import Scorer

KEYS = {
    "model_name_or_path": "bcft:tiny-math", "dataset_name": "reasoning-gym:sums", "dataset_train_split": "train[:30]",
    "eval_dev_problems": 10, "eval_test_problems": 20,
}  # fmt: skip


@dataclass
class Config:
    """The configuration of `Sums`."""

    largest: int = 99
    words: tuple[str, ...] = ("Add",)
    oracle: bool = True
    right: bool = True
    fails_from: int = 1 << 40
    seed: int | None = None
    size: int = 500

    def validate(self):
        assert self.largest > 0, "largest must be\npositive"


class ProceduralDataset:
    """The package's base class, whose scorer compares texts."""

    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])


class Sums(ProceduralDataset):
    """A generator as the package's own are: item i depends on seed + i."""

    during = staticmethod(lambda: None)
    """Called while an item is made or an answer is graded."""

    def __init__(self, config):
        config.validate()
        self.config = config

    def __getitem__(self, index):
        if index >= self.config.fails_from or index == 4001:
            raise ValueError(f"no item {index}")
        self.during()
        draw = Random(self.config.seed + index)
        a, b = draw.randint(0, self.config.largest), draw.randint(0, self.config.largest)
        answer = str(a + b + (not self.config.right)) if self.config.oracle else None
        question = f"{self.config.words[0]} {a} and {b}."
        return {"question": question, "answer": answer, "metadata": {"sum": a + b, "seen": []}}

    def score_answer(self, answer, entry):
        self.during()
        assert not entry["metadata"]["seen"], "each answer gets an entry of its own"
        entry["metadata"]["seen"].append(answer)
        if answer == str(entry["metadata"]["sum"]):
            return 1.0
        if answer == "nan":
            return float("nan")
        if answer == "2":
            raise ValueError(answer)
        return 0.5 if str(entry["metadata"]["sum"]) in answer else 0.0


@pytest.fixture(autouse=True)
def package(monkeypatch):
    """Put a stand-in with one generator in the place of the package."""
    fake = ModuleType("reasoning_gym")
    fake.dataset = SimpleNamespace(ProceduralDataset=ProceduralDataset)
    fake.factory = SimpleNamespace(DATASETS={"sums": (Sums, Config), "composite": (Sums, Config)})
    fake.create_dataset = lambda name, **keys: fake.factory.DATASETS[name][0](Config(**keys))
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake)
    monkeypatch.setattr(reasoning_gym, "find_spec", lambda name: name)
    monkeypatch.setattr(reasoning_gym_items, "COMPARING", {"sums"})
    caches = (reasoning_gym_items.items_of, reasoning_gym_items._dataset)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def loaded(*, demonstrations=False, **keys):
    """Return the splits of a recipe and their scorer."""
    config = load("filtered", None, KEYS | keys)
    splits = load_splits(config.data, config.evaluation, demonstrations=demonstrations)
    held_out = [d.problem for d in splits.held_out]
    return splits, Scorer.of(config.selection, held_out, environment=None, own=splits.reward)


def composite(parts):
    return {"dataset_name": "reasoning-gym:composite", "dataset_args": {"datasets": parts}}


def graded(reply, *, answer_format="text", partial_scores=False, **keys):
    """Return the reward of a reply at the first training problem; {} in it stands for the sum."""
    splits, _ = loaded(answer_format=answer_format, **keys)
    problem = splits.train[0].problem
    text = reply.replace("{}", problem.columns["answer"])
    ((reward),) = splits.reward(completions=[text], index=[problem.columns["index"]], partial_scores=partial_scores)
    return reward


# What is refused


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(reasoning_gym, "find_spec", lambda _: None)
    with pytest.raises(UsageError) as caught:
        loaded()
    assert str(caught.value) == (
        "dataset_name: reasoning-gym:sums needs the package reasoning-gym: pip install 'bcft[reasoning-gym]'"
    )


def test_a_package_that_lacks_another_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(reasoning_gym, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UsageError, match=r"reasoning-gym is incomplete .*: pip install 'bcft\[reasoning-gym\]'"):
        loaded()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset_name": "reasoning-gym:sumz"}, "no generator 'sumz'; did you mean sums?"),
        ({"dataset_args": {"bargest": 3}}, "sums has no argument 'bargest'; did you mean largest?"),
        (
            {"dataset_args": {"x": 3}},
            "sums has no argument 'x'; there are largest, words, oracle, right, fails_from, seed",
        ),
        ({"dataset_args": {"largest": 0}}, '{"largest": 0}: largest must be positive'),
        ({"dataset_args": {"largest": "a"}}, "does not accept"),
        ({"dataset_args": {"largest": 2.5}}, "cannot make problems with"),
        ({"dataset_args": {"size": 3}}, "size: dataset_train_split says how many problems there are"),
        ({"dataset_args": {"seed": -1}}, "seed: wants an integer >= 0, not -1"),
        ({"dataset_args": {"seed": None}}, "seed: wants an integer >= 0, not None"),
        (composite([{"name": ["a"]}]), "reasoning-gym has no generator ['a']"),
        (composite([{"name": 3}]), "reasoning-gym has no generator 3"),
        (composite([{"name": "sums", "config": [1]}]), "config of sums: wants a mapping, not [1]"),
        (composite("sums"), "composite wants a list of {name, weight, config}"),
        (
            {"eval_test_problems": 3_000},
            "eval_test_problems: 3,000: the 2,000 items of reasoning-gym:sums that they are made of give 1,",
        ),
        ({"eval_dev_problems": 2_001}, "eval_dev_problems: 2,001: the 2,000 items"),
    ],
)
def test_a_mistake_is_told_in_one_line(keys, message):
    with pytest.raises(UsageError) as caught:
        loaded(**keys)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_split_than_train_is_refused():
    with pytest.raises(DataError, match="reasoning-gym:sums has the split train, and no 'dev'"):
        loaded(dataset_train_split="dev")


@pytest.mark.parametrize("keys", [{"dataset_args": {"seed": 1}}, {"answer_format": "tag"}, {"prompt_suffix": ""}])
def test_its_keys_need_such_a_dataset(keys):
    (key,) = keys
    (finding,) = findings(lambda: load("filtered", None, KEYS | {"dataset_name": "bcft:arithmetic"} | keys))
    assert f"{key}: has no effect without a reasoning-gym dataset" in finding


@pytest.mark.parametrize("keys", [{"answer_format": "tag"}, {"prompt_suffix": ""}, {"dataset_args": {"seed": 1}}])
def test_demonstrations_to_replay_are_asked_in_their_forms_but_have_no_arguments(keys):
    replayed = KEYS | {"dataset_name": "bcft:arithmetic", "replay_dataset": "reasoning-gym:sums"} | keys
    if "dataset_args" in keys:
        (finding,) = findings(lambda: load("filtered", None, replayed))
        assert finding.endswith("dataset_args: has no effect without a reasoning-gym dataset or a function")
        return
    config = load("filtered", None, replayed)
    replay = load_splits(config.data, config.evaluation).replay
    tag = keys == {"answer_format": "tag"}
    assert all(d.problem.prompt.endswith("</answer>.") == tag for d in replay)
    assert all(d.completion[-1]["content"].startswith("<answer>") == tag for d in replay)


@pytest.mark.parametrize("keys", [{"dataset_config": "main"}, {"dataset_test_split": "test"}])
def test_keys_of_other_datasets_are_refused(keys):
    (key,) = keys
    (finding,) = findings(lambda: load("filtered", None, KEYS | keys))
    assert finding.endswith(f"{key}: has no effect with a reasoning-gym dataset")


def test_a_files_keys_stay_where_the_caller_gives_another_dataset(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: bcft:tiny-math\ndataset_name: reasoning-gym:sums\nanswer_format: tag\n")
    assert load("sft", recipe, {"dataset_name": "runs/collected"}).data.answer_format == "tag"
    assert load("sft", recipe, {}, objects={"dataset_name": "train_dataset@0"}).data.answer_format == "text"


# Problems


def test_splits_are_ranges_of_one_stream_and_no_text_is_in_two():
    splits, _ = loaded(dataset_args={"largest": 7})  # 64 problems
    parts = {name: [d.problem for d in getattr(splits, name)] for name in ("test", "dev", "train")}
    prompts = [problem.prompt for part in parts.values() for problem in part]
    assert len(set(prompts)) == len(prompts) == 60
    for name, part in parts.items():
        first = reasoning_gym.FIRST[name]
        indices = [problem.columns["index"] for problem in part]
        assert indices == sorted(indices)
        assert first <= indices[0] <= indices[-1] < first + 2_000
    with pytest.raises(DataError, match=r"reasoning-gym:sums: 64 different problems are too few for 64 test, 10 dev"):
        loaded(dataset_args={"largest": 7}, eval_test_problems=64)


def test_more_problems_continue_fewer():
    few, many = loaded()[0], loaded(dataset_train_split="train[10:40]", eval_test_problems=25)[0]
    assert many.test[:20] == few.test
    assert many.train[:20] == few.train[10:]


def test_items_that_cannot_be_made_are_left_out():
    indices = [d.problem.columns["index"] for d in loaded(dataset_args={"fails_from": 4005})[0].train]
    assert indices == [4000, 4002, 4003, 4004]
    with pytest.raises(UsageError, match=r"cannot make problems with .*: ValueError: no item \d+"):
        loaded(dataset_args={"fails_from": 0})


def test_a_slice_without_an_end_has_as_many_problems():
    assert [len(loaded(dataset_train_split=text)[0].train) for text in ("train", "train[7:]")] == [2_000] * 2


def test_lists_become_tuples_and_the_seed_is_0():
    splits, _ = loaded(dataset_args={"words": ["Sum of"]})
    assert splits.train[0].problem.prompt.startswith("Sum of ")
    assert splits.digest == loaded(dataset_args={"words": ["Sum of"], "seed": 0})[0].digest
    assert splits.digest != loaded(dataset_args={"words": ["Sum of"], "seed": 1})[0].digest


def test_demonstrations_are_the_oracle_answers_in_the_form_that_is_asked_for():
    forms = {"text": "{}", "number": "{}", "tag": "<answer>{}</answer>", "hash": "#### {}", "boxed": r"\boxed{{{}}}"}
    for form, text in forms.items():
        splits, _ = loaded(answer_format=form, demonstrations=True)
        d = splits.train[0]
        reply = d.completion[-1]["content"]
        assert reply == text.format(d.problem.columns["answer"])
        assert reasoning_gym.extract(reply, form) == d.problem.columns["answer"]
        suffix = reasoning_gym.SUFFIXES[form]
        assert d.problem.prompt.endswith(f".\n\n{suffix}" if suffix else ".")


@pytest.mark.parametrize(("suffix", "end"), [("Go.", ".\n\nGo."), ("", "."), (None, "</answer>.")])
def test_a_suffix_of_the_recipe_takes_the_place_of_the_sentence(suffix, end):
    assert loaded(answer_format="tag", prompt_suffix=suffix)[0].test[0].problem.prompt.endswith(end)


# Answers


@pytest.mark.parametrize(
    ("form", "reply", "answer"),
    [
        ("text", " 4\n5 ", "4\n5"),
        ("tag", "<answer>1</answer> no: <answer> 2 </answer>.", "2"),
        ("tag", "<answer>1", ""),
        ("hash", "#### 1 #### 2\n3", "2\n3"),
        ("hash", "2", ""),
        ("boxed", r"\boxed{1} or \boxed {\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", r"\boxed{1} or \boxed{2", "1"),
        ("boxed", "1", ""),
        *(
            ("number", text, "43")
            for text in ("43", "It is 43.", "4 + 39 = 43", "43 apples, of course!", "**43**", "$43")
        ),
        *(("number", text, "43") for text in ("40-43", "40 – 43", "x-43", "(1)-43", "no.43", "a43", "1,43", "2..43")),
        *(("number", text, "-43") for text in ("-43", "= -43", "−43", "–43", "(-43)", "3 - -43")),
        *(("number", text, "4.5") for text in ("4.5", "4.5.", "about 4.5kg", "1.2 or 4.5")),
        *(("number", text, ".5") for text in (".5", "= .5", "0 or .5", "($.5)")),
        *(("number", text, "-.5") for text in ("-.5", "–.5", "= −.5")),
        *(("number", text, "1234") for text in ("1,234", "1,234,", "1234", "$1,234.", "12, 1,234")),
        ("number", "-1,234,567.25", "-1234567.25"),
        ("number", "12,3456", "3456"),
        ("number", "1234,567", "567"),
        ("number", "[1,2]", "2"),
        ("number", "9.36e-18", "9.36e-18"),
        ("number", "1.5E+3 m", "1.5E+3"),
        ("number", "1e999999999", "999999999"),
        ("number", "007", "007"),
        ("number", "1/2", "2"),
        *(("number", text, "") for text in ("", "no", "-", ".", ",", "...", "½")),
    ],
)
def test_the_answer_is_what_stands_behind_the_last_marker(form, reply, answer):
    assert reasoning_gym.extract(reply, form) == answer


@pytest.mark.parametrize("answer", ["0", "43", "-7", "3.25", "-0.5", "1,234", "1e+23", "8.05e-06", "0101", "12.0"])
def test_an_oracle_answer_that_is_a_number_survives_the_form_number(answer):
    extracted = reasoning_gym.extract(reasoning_gym.stated(answer, "number"), "number")
    assert float(extracted) == float(answer.replace(",", ""))
    assert extracted == answer.replace(",", "")
    if "e" not in answer and not answer.startswith("01"):
        assert reasoning_gym.answer_key(extracted) == reasoning_gym.answer_key(answer)


def test_a_megabyte_of_digits_and_signs_is_searched_for_its_last_number_in_linear_time():
    """A quadratic expression would need hours here, so this test needs no clock."""
    for text in ("9", "1,", "1,111", "1.", "-", ".", "e", "1e", "-1", "1 "):
        assert reasoning_gym.extract(text * (1_000_000 // len(text)) + " = 43", "number") == "43"


@pytest.mark.parametrize(
    ("reply", "reward"),
    [("{}", 1), ("The sum is {}.", 1), ("{} apples", 1), ("{} and 1", 0), ("-{}", 0), ("", 0), ("none", 0)],
)
def test_the_last_number_of_a_reply_is_graded(reply, reward):
    assert graded(reply, answer_format="number") == reward


@pytest.mark.parametrize(
    ("reply", "reward", "partial"),
    [
        *(("{}", 1, 1), ("{}.0", 1, 1), ("{}.", 1, 1), ("{}.5", 0, 0.5), ("about {}", 0, 0.5), ("0{}", 0, 0.5)),
        *(("nan", 0, 0), ("2", 0, 0), ("", 0, 0), ("x", 0, 0)),
    ],
)
def test_success_is_a_score_of_1_or_the_same_number(reply, reward, partial):
    assert graded(reply) == reward
    assert graded(reply, partial_scores=True) == partial


def test_the_last_turn_of_a_conversation_is_graded():
    splits, _ = loaded(answer_format="hash")
    problem = splits.train[0].problem
    said = [{"role": "assistant", "content": text} for text in ("#### x", f"#### {problem.columns['answer']}")]
    assert splits.reward(completions=[said, said[::-1], []], index=[problem.columns["index"]] * 3) == [1.0, 0.0, 0.0]


def test_a_problem_of_another_dataset_is_ungraded():
    assert loaded()[0].reward(completions=["1"], index=[None]) == [None]


def test_votes_count_equal_numbers_together():
    answers = answers_of(loaded(answer_format="tag")[0].reward)
    keys = {answers.key(answers.extract(f"<answer>{text}</answer>")) for text in ("43", "43.0", "+43", "43.")}
    assert keys == {"43"}
    assert answers.key("043") == "043"
    for one, other in ((".5", "0.5"), ("-.5", "−0.50"), ("1,234", "1234"), ("–1,234.0", "-1234")):
        assert answers.key(one) == answers.key(other)
    for one, other in (("1,23", "123"), ("12,3456", "123456"), (".", "0"), ("0,123", "123.5")):
        assert answers.key(one) != answers.key(other)


def test_references_are_checked_and_counted():
    splits, scorer = loaded()
    problems = list(splits.problems_to_attempt().values())
    assert scorer.check(problems) == "reasoning-gym: 30 of 30 oracle answers score 1.0"
    with pytest.raises(DataError, match=r"reasoning-gym:sums does not accept its own oracle answer '\d+', nor any"):
        loaded(dataset_args={"right": False})


def test_a_generator_without_answers_is_graded_all_the_same():
    splits, scorer = loaded(dataset_args={"oracle": False})
    assert "answer" not in splits.train[0].problem.columns
    problems = list(splits.problems_to_attempt().values())
    assert scorer.check(problems) == "reasoning-gym: sums publishes no oracle answers to check"
    assert scorer.measures == "success"
    first = problems[0]
    total = str(sum(int(word.strip(".")) for word in first.prompt.split() if word.strip(".").isdigit()))
    assert solved(scorer.success(completions=[total], index=[first.columns["index"]])[0])


# The reward of a recipe


def test_it_is_the_default_reward_and_has_a_name_beside_others():
    _, scorer = loaded(reward_args={"partial_scores": True})
    assert len(scorer.functions) == 1
    assert scorer.success is scorer.functions[0]
    _, scorer = loaded(
        reward_funcs=["bcft.rewards.math_reward", "reasoning_gym_score"], success_func="reasoning_gym_score"
    )
    assert scorer.success is scorer.functions[1]
    with pytest.raises(UsageError, match=r"names share in its signature; there are .*partial_scores"):
        loaded(reward_args={"share": True})


def test_a_run_remembers_how_its_problems_are_graded():
    recorded = {**load("filtered", None, KEYS).resolved, "dataset_args": {"largest": 7}}
    reward = own_reward(recorded)
    item = reasoning_gym_items.items_of("sums", '{"largest": 7, "seed": 0}').entry(4000)
    assert reward(completions=[item["answer"]], index=[4000]) == [1.0]
    assert own_reward({**recorded, "dataset_name": "bcft:arithmetic"}) is None


# Grading in another process, and interrupted


@pytest.fixture
def outside(monkeypatch):
    """Let the sandbox return these texts, in turn, for each request."""
    replies = []

    class Scripted:
        def call(self, requests):
            return [replies.pop(0) for _ in requests]

    monkeypatch.setattr(reasoning_gym_items, "_sandbox", lambda *_: Scripted())
    return replies


def test_a_scorer_that_was_not_read_runs_in_the_sandbox(monkeypatch):
    def outside(names):
        items = reasoning_gym_items.Items("composite", json.dumps({"datasets": [{"name": name} for name in names]}))
        return items.graded_outside

    plain = type("Plain", (ProceduralDataset,), {})
    other = type("Other", (plain,), {"score_answer": lambda *_: 1.0})
    known = {"sums": (Sums, Config), "plain": (plain, Config), "other": (other, Config)}
    monkeypatch.setattr(sys.modules["reasoning_gym"].factory, "DATASETS", known)
    assert [outside(names) for names in (["sums"], ["plain"], ["sums", "plain"])] == [False] * 3
    assert [outside(names) for names in (["other"], ["sums", "other"])] == [True] * 2


@pytest.mark.parametrize("failure", FAILURES)
def test_an_answer_that_the_sandbox_gave_up_on_is_ungraded_and_not_wrong(failure, outside, monkeypatch):
    monkeypatch.setattr(reasoning_gym_items, "COMPARING", frozenset())
    splits, _ = loaded()
    index = splits.train[0].problem.columns["index"]
    outside.extend([failure, "1.0", "0.0", "0.5"])
    assert splits.reward(completions=["a", "b", "c", "d", "a"], index=[index] * 5) == [None, 1.0, 0.0, 0.0, None]
    outside.extend([failure, "0.5"])
    assert splits.reward(completions=["a", "b"], index=[index] * 2, partial_scores=True) == [None, 0.5]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_sandbox_that_makes_no_items_ends_the_run_and_drops_no_problem(failure, outside, monkeypatch):
    monkeypatch.setattr(reasoning_gym_items, "UNSEEDED", {"sums"})
    outside.extend([failure] * 20)
    with pytest.raises(FaultError, match=rf"sums: making items 0 to \d+ ended in the sandbox \({failure};"):
        loaded()


def test_what_a_generator_says_of_an_item_is_no_failure_of_the_sandbox(outside, monkeypatch):
    monkeypatch.setattr(reasoning_gym_items, "UNSEEDED", {"sums"})
    monkeypatch.setattr(reasoning_gym_items.os, "cpu_count", lambda: 1)
    item = {"question": "2?", "answer": "2"}
    outside.append(json.dumps(["ValueError: no item 0", item]))
    items = reasoning_gym_items.items_of("sums", "{}")
    assert list(items.between(0, 2, wanted=2)) == [(0, "ValueError: no item 0"), (1, item)]


@pytest.fixture
def preempted():
    """Have SIGTERM raise as it does in a run."""

    def preempt(*_):
        raise Preempted("asked to stop")

    before = signal.signal(signal.SIGTERM, preempt)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("preempted")
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)])
def test_a_signal_is_neither_a_wrong_answer_nor_a_missing_item(number, kind, monkeypatch):
    splits, _ = loaded()
    problem = splits.train[0].problem
    asked = {"completions": [problem.columns["answer"]], "index": [problem.columns["index"]]}
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    def stopped():
        try:
            signal.raise_signal(number)
        except BaseException:  # as the package's own bare `except`
            raise AssertionError("a handler ran inside the package") from None

    monkeypatch.setattr(Sums, "during", staticmethod(stopped))
    with pytest.raises(kind):
        splits.reward(**asked)
    reasoning_gym_items.items_of.cache_clear()
    with pytest.raises(kind):
        loaded()
    monkeypatch.setattr(Sums, "__init__", lambda *_: stopped())
    reasoning_gym_items._dataset.cache_clear()
    with pytest.raises(kind):
        loaded()
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    monkeypatch.undo()


def test_a_package_without_metadata_grades_all_the_same(monkeypatch):
    def missing(name):
        raise reasoning_gym.PackageNotFoundError(name)

    monkeypatch.setattr(reasoning_gym, "version", missing)
    assert graded("{}") == 1.0
    splits, _ = loaded()
    assert "package='unknown'" in described(splits.reward)
    monkeypatch.setattr(reasoning_gym, "version", lambda _: "0.2")
    assert "package='0.2'" in described(loaded()[0].reward), "another version may grade by other rules"


# Problems that a run trained on


@pytest.mark.parametrize("keys", [{}, {"prompt_suffix": "Go."}, {"answer_format": "tag"}])
def test_another_suffix_hides_no_overlap_of_another_seed(keys, tmp_path):
    """Item i of seed 4000 is item 4000 + i of seed 0: its test problems are training problems of the run."""
    large = {"largest": 10**9}
    recorded = load("filtered", None, KEYS | {"dataset_args": large}).resolved
    (tmp_path / "config.yaml").write_text(json.dumps(recorded))
    (tmp_path / "versions.json").write_text("{}")

    def check(arguments):
        config = load("evaluate", None, KEYS | {"dataset_args": large | arguments} | keys)
        splits = load_splits(config.data, config.evaluation, demonstrations=False)
        evaluate._refuse_trained(config, splits, str(tmp_path), None)

    with pytest.raises(UsageError, match=r"^dataset_args: \d+ of the test problems, .* give the same$"):
        check({"seed": 4000})
    check({})
    check({"seed": 10**6})
