"""One prompt in several rows: refused where the difference matters, else the first row counts and it is said."""

import pytest
from helpers.tiny import write_jsonl

from bcft.config.schema import DataSettings, EvaluationSettings
from bcft.data.loading import load_splits
from bcft.data.readers import demonstration
from bcft.data.repeated import repeated_prompts
from bcft.errors import DataError
from bcft.types import bucket, problem_id

ROW = {"prompt": "2 + 2?", "completion": "4", "answer": "36", "level": 1}


def loaded(path, rows, *, dev=0, test=0, demonstrations=False, **keys):
    write_jsonl(path, rows)
    data = DataSettings(dataset_name=str(path), **keys)
    sizes = EvaluationSettings(eval_dev_problems=dev, eval_test_problems=test)
    return load_splits(data, sizes, demonstrations=demonstrations)


def one(low, high):
    """Return a prompt whose hash lies in a share."""
    return next(text for i in range(10_000) if low <= bucket(problem_id(text := f"{i} + {i}?")) < high)


SHARES = {"train": (0.1, 1.0), "dev": (0.05, 0.1), "test": (0.0, 0.05)}
OTHERS = {
    "another answer": {"answer": "37"},
    "a number": {"answer": 36},
    "no answer": {"answer": ...},
    "more space in the prompt": {"prompt": " 2  +\n2?", "answer": "37"},
    "a message": {"prompt": [{"role": "user", "content": "2 + 2?"}], "answer": "37"},
    "a list": {"answer": ["36"]},
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_another_value_in_a_column_that_is_read_is_an_error_with_both_places(change, tmp_path):
    path = tmp_path / "a.jsonl"
    other = {key: value for key, value in {**ROW, **change}.items() if value is not ...}
    for rows, places in (
        ([ROW, other], (1, 2)), ([other, ROW], (1, 2)), ([ROW, ROW, {"prompt": "x"}, other], (1, 4)),
    ):  # fmt: skip
        parts = loaded(path, rows)
        for read in (["answer"], {"answer", "level"}, frozenset({"answer", "x"}), None):
            with pytest.raises(DataError) as caught:
                parts.note_conflicts(read)
            first, again = places
            assert str(caught.value).startswith(f"{path}:{again}: the prompt of {path}:{first} with another answer: ")
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"level": 2}, {"level": None}, {"level": ...}, {"n": 5}, {"level": [1], "n": {}}])
def test_another_value_in_a_column_that_nothing_reads_is_counted_and_the_first_row_is_played(change, tmp_path):
    other = {key: value for key, value in {**ROW, **change}.items() if value is not ...}
    parts = loaded(tmp_path / "a.jsonl", [ROW, other, {"prompt": "x"}, other])
    note = parts.note_conflicts({"answer"})
    assert note.startswith("2 rows repeat a prompt with another value (")
    assert all(f"{column} in 2" in note for column in change)
    assert f"a.jsonl:2 does {tmp_path / 'a.jsonl'}:1" in note
    (problem, _) = parts.problems_to_attempt().values()
    assert (problem.columns, problem.where) == ({"answer": "36", "level": 1}, f"{tmp_path / 'a.jsonl'}:1")
    with pytest.raises(DataError, match=r"a\.jsonl:2: the prompt of .*a\.jsonl:1 with another"):
        parts.note_conflicts(None)


@pytest.mark.parametrize("part", SHARES)
@pytest.mark.parametrize("columns", [{"answer": "37"}, {"answer": "37", "level": 2}])
def test_held_out_problems_and_training_ones_are_treated_alike(part, columns, tmp_path):
    prompt = one(*SHARES[part])
    others = [{"prompt": f"{i} - {i}?", "answer": "0"} for i in range(100)]
    rows = [*others, {"prompt": prompt, "answer": "36"}, {"prompt": prompt, **columns}]
    parts = loaded(tmp_path / "a.jsonl", rows, dev=1, test=1)
    with pytest.raises(DataError, match=r"a\.jsonl:102: the prompt of .*a\.jsonl:101 with another answer"):
        parts.note_conflicts({"answer"})
    assert parts.note_conflicts({"other"}).startswith("1 rows repeat")
    every = loaded(tmp_path / "a.jsonl", rows, dev=99, test=99)
    firsts = [every.problems_to_attempt().get(problem_id(prompt)), *(d.problem for d in every.held_out)]
    (problem,) = (p for p in firsts if p is not None and p.prompt == prompt)
    assert problem.columns == {"answer": "36"}


@pytest.mark.parametrize(
    "other", [{}, {"completion": "5"}, {"prompt": "2 +  2?"}, {"answer": "36"}, {"level": 1.0}, {"extra": None}]
)
def test_rows_that_agree_are_no_conflict(other, tmp_path):
    for demonstrations in (True, False):
        parts = loaded(tmp_path / "a.jsonl", [ROW, {**ROW, **other}] * 3, demonstrations=demonstrations)
        assert parts.note_conflicts(None) == ""
        assert len(parts.train) == 6


def test_the_templates_arguments_are_always_read(tmp_path):
    for values in ((True, False), (None, True), (False, None)):
        rows = [{**ROW, "chat_template_kwargs": {"enable_thinking": value}} for value in values]
        with pytest.raises(DataError, match="with another chat_template_kwargs"):
            loaded(tmp_path / "a.jsonl", rows).note_conflicts(())
    for same in (({}, None), ({"a": None}, {}), ({"a": 1}, {"a": 1})):
        rows = [{**ROW, "chat_template_kwargs": value} for value in same]
        note = loaded(tmp_path / "a.jsonl", rows).note_conflicts(())
        assert note == "", rows


def test_a_test_split_that_repeats_a_training_prompt_with_another_answer_is_a_conflict(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": "2 + 2?", "answer": "37"}])
    write_jsonl(tmp_path / "train.jsonl", [ROW])
    data = DataSettings(dataset_name=str(tmp_path), allow_overlap=True)
    parts = load_splits(data, EvaluationSettings(eval_dev_problems=0))
    with pytest.raises(DataError, match=r"test\.jsonl:1: the prompt of .*train\.jsonl:1 with another answer"):
        parts.note_conflicts({"answer"})


def test_values_that_are_not_plain_are_compared_by_what_they_show():
    numpy = pytest.importorskip("numpy")
    array = numpy.array
    nan = float("nan")
    pairs = [
        (array([1, 2]), array([1, 2]), False),
        (array([1]), array([1, 2]), True),
        (nan, nan, False),
        (nan, 1, True),
    ]
    for a, b, differ in [*pairs, ({"x": 1, "y": 2}, {"y": 2, "x": 1}, False), ("1", 1, True)]:
        rows = [demonstration({"prompt": "?", "value": value}, "", problem_only=True) for value in (a, b)]
        assert bool(repeated_prompts(rows)) == differ


def test_embedded_datasets_repeat_no_prompt_with_another_value():
    for name in ("twenty-questions", "grid-walk", "arithmetic"):
        data = DataSettings(dataset_name=f"bcft:{name}", dataset_train_split="train[:400]")
        assert load_splits(data, EvaluationSettings(eval_test_problems=20)).note_conflicts(None) == ""
