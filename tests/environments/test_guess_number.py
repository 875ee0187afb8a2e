"""Guessing: secrets, and answers to guesses."""

import doctest

import pytest

from bcft.environments import guess_number


def test_examples_in_docstrings_are_true():
    results = doctest.testmod(guess_number)
    assert (results.failed, results.attempted) == (0, 1)


def test_every_number_is_a_secret_in_training_while_the_triples_are_held_out():
    rows = guess_number.items("train", 1000)
    assert {row["secret"] for row in rows} == set(range(guess_number.LEAST, guess_number.MOST + 1))
    assert all(row["low"] <= row["secret"] <= row["high"] for row in rows)


@pytest.mark.parametrize("secret", [10, 33, 59])
def test_halving_finds_every_secret_in_at_most_as_many_guesses_as_it_has_bits(secret):
    low, high, guesses = guess_number.LEAST, guess_number.MOST, 0
    while True:
        guess, guesses = (low + high) // 2, guesses + 1
        reply = guess_number.answer(secret, f"I say {guess}.")
        if reply == "correct":
            break
        low, high = (guess + 1, high) if reply == "higher" else (low, guess - 1)
    assert guesses <= (guess_number.MOST - guess_number.LEAST + 1).bit_length()
