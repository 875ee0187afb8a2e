"""Turns to rows: what is trained is what was sampled, each token once, and of nobody's words but the policy's."""

import pytest
from test_play import FORGETFUL, Counting, Scripted, attempts, played, retold
from tiny import llama_tokenizer

from bcft.data.examples import conversation_turns, kept_lines, make_rows, row_of, stretches
from bcft.errors import DataError
from bcft.policy.chat_template import Renderer
from bcft.types import IGNORED, Demonstration, Turn

TEMPLATES = ["llama", "plain", "forgetful"]


def renderer_of(template):
    if template == "plain":
        return Renderer(llama_tokenizer(["say a number"], vocabulary=300, chat=False))
    return Renderer(retold(FORGETFUL) if template == "forgetful" else llama_tokenizer(["say a number"], vocabulary=300))


def say(key):
    return f"thinking of {key[5]}> {key[4]}"


@pytest.fixture(params=TEMPLATES)
def game(request):
    """Return a template's name, its renderer, and what was played on it: three turns each."""
    renderer = renderer_of(request.param)
    return request.param, renderer, played(attempts(), Counting, renderer, Scripted(renderer, say=say))


def supervised(row):
    return tuple(label for label in row.labels if label != IGNORED)


def test_every_sampled_id_is_trained_once_and_nothing_else_is(game):
    _, _, found = game
    for trajectory in found:
        rows = stretches(trajectory.turns)
        assert sum(map(supervised, rows), ()) == sum((turn.action_ids for turn in trajectory.turns), ())


def test_every_row_is_a_context_the_policy_read_and_what_it_said_to_it(game):
    _, _, found = game
    for trajectory in found:
        for row in stretches(trajectory.turns):
            last = trajectory.turns[row.last]
            assert row.input_ids == trajectory.contexts[row.last] + last.action_ids
            assert all(label in (IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True))


def test_a_new_row_begins_where_the_template_rewrites_and_nowhere_else(game):
    template, _, found = game
    for trajectory in found:
        spans = [(row.first, row.last) for row in stretches(trajectory.turns)]
        assert spans == ([(0, 0), (1, 1), (2, 2)] if template == "forgetful" else [(0, 2)])


def test_the_words_of_users_and_tools_are_never_trained(game):
    _, renderer, found = game
    for trajectory in found:
        for row in stretches(trajectory.turns):
            # Observations end with a question mark, which no action has.
            assert "?" not in renderer.tokenizer.decode(list(supervised(row)))


def test_on_the_last_turn_alone_the_row_ends_with_it_and_trains_it_only(game):
    _, _, found = game
    for trajectory in found:
        (row,) = stretches(trajectory.turns, train_on="last_turn")
        assert supervised(row) == trajectory.turns[-1].action_ids
        assert row.input_ids == trajectory.contexts[-1] + trajectory.turns[-1].action_ids


def test_the_text_of_a_kept_row_demonstrates_the_same_ids_again(game):
    _, renderer, found = game
    for trajectory in found:
        problem = next(a.problem for a in attempts() if a.problem.id == trajectory.problem_id)
        lines = kept_lines(trajectory, problem, reward=1.0, source="self")
        demonstrations = [
            Demonstration(problem, "x", (*line["prompt"], *line["completion"]), len(line["prompt"])) for line in lines
        ]
        rows, _ = make_rows(demonstrations, renderer, max_length=10_000)
        assert [(row.input_ids, row.labels) for row in rows] == [
            (row_of(line).input_ids, row_of(line).labels) for line in lines
        ]


def test_a_demonstrated_conversation_reads_as_one_that_was_played(game):
    _, renderer, found = game
    for trajectory in found:
        problem = next(a.problem for a in attempts() if a.problem.id == trajectory.problem_id)
        said = [{"role": "user", "content": problem.prompt}, *trajectory.messages]
        turns = conversation_turns(said, renderer, begins=1, where="here")
        assert [(t.ids, t.action_ids, t.rewritten) for t in turns] == [
            (t.ids, t.action_ids, t.rewritten) for t in trajectory.turns
        ]


def test_an_action_that_says_nothing_is_read_but_not_trained():
    turns = [
        Turn("a", (1,), (2, 3), "stop_token"),
        Turn(" ", (4,), (5, 3), "stop_token"),
        Turn("b", (6,), (7, 3), "stop_token"),
        Turn("", (8,), (3,), "stop_token"),
    ]
    (row,) = stretches(turns)
    assert row.input_ids == (1, 2, 3, 4, 5, 3, 6, 7, 3)  # nothing behind the last token that carries loss
    assert row.labels == (IGNORED, 2, 3, IGNORED, IGNORED, IGNORED, IGNORED, 7, 3)
    assert stretches(turns[1:2]) == stretches(turns, train_on="last_turn") == []


@pytest.mark.parametrize("roles", ["assistant", "assistant user", "user assistant assistant", "user assistant user"])
def test_a_conversation_that_does_not_go_to_and_fro_is_refused(roles):
    said = [{"role": role, "content": "x"} for role in roles.split()]
    with pytest.raises(DataError, match="file:3: in a conversation"):
        conversation_turns(said, renderer_of("llama"), begins=1, where="file:3")


def test_two_turns_by_hand():
    turns = [Turn("5", (1, 2), (5, 9), "stop_token"), Turn("7", (3, 4), (7, 9), "stop_token")]
    (row,) = stretches(turns)
    assert row.input_ids == (1, 2, 5, 9, 3, 4, 7, 9)
    assert row.labels == (-100, -100, 5, 9, -100, -100, 7, 9)
