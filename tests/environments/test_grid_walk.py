"""Walking: steps, offsets and returns."""

import doctest

from helpers.environments import problem_of

from bcft.environments import grid_walk
from bcft.environments.grid_walk import GridWalk


def test_examples_in_docstrings_are_true():
    results = doctest.testmod(grid_walk)
    assert (results.failed, results.attempted) == (0, 1)


def test_a_step_towards_the_goal_shortens_the_way_by_one_and_no_step_by_more():
    cells = [(column, row) for column in range(grid_walk.SIZE) for row in range(grid_walk.SIZE)]
    for start in cells:
        for goal in cells:
            ways = [
                grid_walk.shortest(grid_walk.step(start, d), goal) - grid_walk.shortest(start, goal) for d in "NESW"
            ]
            at_edge = not {0, grid_walk.SIZE - 1}.isdisjoint(start)
            # At the goal every step leads away from it, but one off the grid is a step on the spot.
            assert min(ways) == (-1 if start != goal else 0 if at_edge else 1)
            assert set(ways) <= {-1, 0, 1}


def test_the_return_is_minus_the_steps_and_the_offset_is_all_there_is_to_know():
    item = grid_walk.items("train", 1)[0]
    environment = GridWalk()
    observation = environment.reset(problem_of(item), seed=0)
    taken = 0
    while observation != "here":
        letter = observation.split()[0][-1]
        feedback = environment.step({"N": "north", "E": " e", "S": "S", "W": "w."}[letter])
        observation, taken = feedback.observation, taken + 1
        assert feedback.reward == -1.0
    assert feedback.done
    assert taken == grid_walk.shortest(tuple(item["start"]), tuple(item["goal"]))


def test_text_without_a_direction_and_a_step_off_the_grid_are_steps_on_the_spot():
    assert grid_walk.step((0, 0), "S") == grid_walk.step((0, 0), "hello") == grid_walk.step((0, 0), "") == (0, 0)


def test_offsets_by_hand():
    assert grid_walk.offset((0, 3), (2, 4)) == "2E 1N"
    assert grid_walk.offset((5, 5), (5, 0)) == "5S"
    assert grid_walk.offset((1, 1), (1, 1)) == "here"
