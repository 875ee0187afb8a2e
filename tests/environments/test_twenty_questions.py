"""Twenty questions: a table without doubles, rules that follow it, splits that cannot overlap, transcripts that replay.

Whether the facts of the table are true is for a person to decide; that the answers follow the table is tested here.
"""

import doctest
import re

import pytest

from bcft.environments import twenty_questions
from bcft.environments.base import SHARES
from bcft.environments.twenty_questions import (
    ATTRIBUTES,
    MOST_TURNS,
    OBJECTS,
    PAIRS,
    Riddle,
    TwentyQuestions,
    answer,
    items,
    riddles,
)
from bcft.types import Environment, Feedback, Problem, messages, problem_id

SPLITS = list(SHARES)
CAT = Riddle("cat", ("fur", "metal"))


def problem_of(row, **columns) -> Problem:
    return Problem(problem_id(row["prompt"]), row["prompt"], {"secret": row["secret"], "told": row["told"]} | columns)


def played(row) -> tuple[list[str], list[Feedback]]:
    """Play a row's assistant messages; return every observation, and the feedback."""
    environment = TwentyQuestions()
    first = environment.reset(problem_of(row), seed=0)
    actions = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
    given = [environment.step(action) for action in actions]
    return [first] + [feedback.observation for feedback in given], given


@pytest.fixture(scope="module")
def rows() -> list:
    return items("train", 1000)


def test_no_two_objects_have_the_same_attributes() -> None:
    assert len(set(OBJECTS.values())) == len(OBJECTS)


def test_the_table_knows_only_attributes_that_can_be_asked_and_each_divides_the_objects() -> None:
    assert frozenset().union(*OBJECTS.values()) == ATTRIBUTES.keys()
    for attribute in ATTRIBUTES:
        assert 2 <= sum(attribute in true for true in OBJECTS.values()) <= len(OBJECTS) / 2


def test_every_name_is_one_short_word_that_means_one_thing() -> None:
    assert not OBJECTS.keys() & ATTRIBUTES.keys()
    for name in [*OBJECTS, *ATTRIBUTES]:
        assert re.fullmatch("[a-z]{2,8}", name)


@pytest.mark.parametrize("phrase", ["{}?", "{}", "Does it have {}?", "Is it {}?", "IS IT MADE OF {}, OR NOT?"])
def test_a_question_is_answered_by_the_table_however_it_is_asked(phrase) -> None:
    for secret, true in OBJECTS.items():
        for attribute in ATTRIBUTES:
            expected = ("yes" if attribute in true else "no", False)
            assert answer(secret, phrase.format(attribute)) == expected
            assert answer(secret, phrase.format(attribute.upper())) == expected


@pytest.mark.parametrize("phrase", ["{}?", "{}", "Is it a {}?", "I know: the {}! The {}, with its fur."])
def test_a_guess_is_right_for_the_secret_alone(phrase) -> None:
    for secret in OBJECTS:
        for name in OBJECTS:
            guess = phrase.replace("{}", name)
            assert answer(secret, guess) == (("correct", True) if name == secret else ("no", False))


@pytest.mark.parametrize(
    ("action", "reply"),
    [
        ("", "what?"),
        ("dog?", "what?"),
        ("furry?", "what?"),
        ("cats?", "what?"),
        ("concatenate", "what?"),
        ("fur_coat", "what?"),
        ("fur or metal?", "what?"),
        ("cat or bear?", "what?"),
        ("cat or bear, and fur?", "yes"),
        ("bear, with fur?", "no"),
        ("fur? fur? fur?", "yes"),
        ("cat,cat,cat", "correct"),
        ("Is it the cat's?", "correct"),
        ("\n\tfur\n", "yes"),
        ("毛皮?", "what?"),
    ],
)
def test_only_whole_words_count_and_one_object_before_one_attribute(action, reply) -> None:
    assert answer("cat", action) == (reply, reply == "correct")


def test_the_examples_of_the_rules_are_true() -> None:
    results = doctest.testmod(twenty_questions)
    assert (results.failed, results.attempted) == (0, 2)


def test_every_riddle_is_in_exactly_one_split_and_its_text_is_its_own() -> None:
    prompts = [riddle.prompt for split in SPLITS for riddle in riddles(split)]
    assert len(set(prompts)) == len(prompts) == len(OBJECTS) * len(PAIRS)


@pytest.mark.parametrize("split", SPLITS)
def test_the_hash_of_its_text_decides_the_split_of_a_problem(split) -> None:
    low, high = SHARES[split]
    for row in items(split, 100):
        assert low <= int(problem_id(row["prompt"]), 16) / 16**16 < high


def test_every_object_is_a_secret_of_training() -> None:
    """Held-out riddles differ in the facts given with a secret: no policy must guess an object it has never seen."""
    assert {riddle.secret for riddle in riddles("train")} == OBJECTS.keys()


def test_a_seed_changes_the_order_and_not_the_riddles() -> None:
    first, second = riddles("test", seed=0), riddles("test", seed=1)
    assert first != second
    assert set(first) == set(second)


@pytest.mark.parametrize("split", SPLITS)
def test_fewer_items_are_the_first_of_more(split) -> None:
    assert items(split, 300)[:20] == items(split, 20)
    assert items(split, 0) == []


def test_items_are_distinct_until_all_were_used_and_then_their_transcripts_are_others() -> None:
    n = len(riddles("dev"))
    rows = items("dev", 2 * n)
    first, second = rows[:n], rows[n:]
    assert len({row["prompt"] for row in first}) == n
    assert [row["prompt"] for row in second] == [row["prompt"] for row in first]
    same = sum(a["messages"] == b["messages"] for a, b in zip(first, second, strict=True))
    assert same < n / 20, "the same transcripts again teach nothing; only very short ones may agree by chance"


def test_every_transcript_replays_and_ends_solved(rows) -> None:
    for row in rows:
        observations, given = played(row)
        expected = [message["content"] for message in row["messages"] if message["role"] == "user"]
        assert observations == [*expected, "correct"]
        assert [feedback.done for feedback in given] == [False] * (len(given) - 1) + [True]
        assert [feedback.success for feedback in given] == [feedback.done for feedback in given]
        assert [feedback.reward for feedback in given] == [-1.0] * (len(given) - 1) + [0.0]


def test_a_transcript_alternates_from_the_facts_to_the_right_guess(rows) -> None:
    for row in rows:
        transcript = row["messages"]
        assert [message["role"] for message in transcript] == ["user", "assistant"] * (len(transcript) // 2)
        assert len(transcript) // 2 <= MOST_TURNS
        assert transcript[-1]["content"] == f"{row['secret']}?"
        assert transcript[0]["content"] == Riddle(row["secret"], tuple(row["told"])).opening
        assert [message for part in transcript for message in messages([part])] == transcript


def test_the_secret_stands_in_no_message_but_the_last(rows) -> None:
    for row in rows:
        for message in row["messages"][:-1]:
            assert row["secret"] not in message["content"].replace("?", "").split()


def test_the_sloppy_player_never_repeats_itself_and_guesses_nothing_that_cannot_be(rows) -> None:
    for row in rows:
        contents = [message["content"].removesuffix("?") for message in row["messages"]]
        words = contents[1::2]
        assert len(set(words)) == len(words)
        assert not set(words) & set(row["told"])
        known = dict(fact.split() for fact in contents[0].split(", "))
        for word, reply in zip(words, [*contents[2::2], "correct"], strict=True):
            if word in OBJECTS:
                assert all((value == "yes") == (attribute in OBJECTS[word]) for attribute, value in known.items())
            else:
                known[word] = reply


def test_the_sloppy_player_wastes_turns(rows) -> None:
    """It makes wrong guesses: otherwise there would be nothing to gain over it."""
    turns = [len(row["messages"]) // 2 for row in rows]
    assert 5.5 < sum(turns) / len(turns) < 7
    assert any(
        word in OBJECTS and word != row["secret"]
        for row in rows
        for word in (message["content"].removesuffix("?") for message in row["messages"])
    )


def test_a_transcript_that_is_not_solved_in_time_is_drawn_again(monkeypatch) -> None:
    monkeypatch.setattr(twenty_questions, "MOST_TURNS", 4)
    for row in items("train", 50):
        assert len(row["messages"]) <= 2 * 4
        assert row["messages"][-1]["content"] == f"{row['secret']}?"


def test_the_example_of_the_module_is_played_as_it_is_written() -> None:
    example = re.findall(r"^    (user|assistant) +(.+)$", twenty_questions.__doc__, re.MULTILINE)
    transcript = [{"role": role, "content": content} for role, content in example]
    row = {"prompt": CAT.prompt, "messages": transcript, "secret": "cat", "told": ["fur", "metal"]}
    replies, given = played(row)
    assert CAT.prompt == "Twenty questions: cat, told fur and metal."
    assert replies == ["fur yes, metal no", "no", "no", "correct"]
    assert sum(feedback.reward for feedback in given) == -2.0


def test_the_environment_never_ends_before_the_right_guess() -> None:
    environment: Environment = TwentyQuestions()
    environment.reset(problem_of(items("train", 1)[0], secret="cat"), seed=0)
    for _ in range(2 * MOST_TURNS):
        assert environment.step("dog?") == Feedback("what?", reward=-1.0, done=False, success=False)
    assert environment.step("cat?") == Feedback("correct", reward=0.0, done=True, success=True)


def test_nothing_is_drawn_from_the_seed() -> None:
    problem = problem_of(items("train", 1)[0])
    assert len({TwentyQuestions().reset(problem, seed=seed) for seed in range(5)}) == 1


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"told": ["fur", "metal"]}, "no secret$"),
        ({"secret": "cat"}, "no told$"),
        ({}, "no secret and no told$"),
        ({"secret": "dog", "told": ["fur", "metal"]}, "'dog' is not one of the objects"),
        ({"secret": "cat", "told": ["metal", "fur"]}, "order"),
        ({"secret": "cat", "told": ["fur", "fur"]}, "two attributes"),
        ({"secret": "cat", "told": ["fur"]}, "two attributes"),
        ({"secret": "cat", "told": "fur metal"}, "two attributes"),
    ],
)
def test_a_problem_of_another_kind_is_refused_by_name(columns, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        TwentyQuestions().reset(Problem("0" * 16, "?", columns), seed=0)


def test_items_are_the_same_in_every_version_of_python() -> None:
    row = items("test", 3, seed=3)[0]
    assert row["prompt"] == "Twenty questions: bee, told big and small."
    contents = ["big no, small yes", "wings?", "yes", "wheels?", "no", "bee?"]
    assert [message["content"] for message in row["messages"]] == contents
