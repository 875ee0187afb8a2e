"""The published methods as recipes: each runs, and selects as its paper does."""

import math
from collections import Counter
from pathlib import Path

import pytest

from bcft import filtered
from bcft.config.loader import load
from bcft.runs.storage import read_jsonl

RECIPES = Path(__file__).parents[2] / "recipes" / "methods"
METHODS = ["archer", "raft", "rest_em", "star", "best_of_n", "rft", "maxrl", "rwr", "ssd"]
SMALL = {
    "num_rounds": 2, "prompts_per_round": 24, "dataset_train_split": "train[:64]", "eval_dev_problems": 4,
    "eval_dev_samples": 1, "eval_test_problems": 4, "eval_test_samples": 2,
}  # fmt: skip


WITHOUT_SECTION = ("maxrl", "rwr", "ssd")
"""Methods whose papers were read in other people's words, so that no section is named."""


def test_every_recipe_there_is_tested_and_names_its_source():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(METHODS)
    for name in METHODS:
        head = (RECIPES / f"{name}.yaml").read_text().split("model_name_or_path")[0]
        assert "arXiv:" in head
        assert ("section" in head) == (name not in WITHOUT_SECTION)
        assert "Its settings:" in head


@pytest.mark.parametrize("name", METHODS)
def test_all_play_as_many_attempts_in_all(name):
    """The table of `recipes/methods/README.md` compares them at that."""
    config = load("filtered", RECIPES / f"{name}.yaml", {})
    attempts = config.rounds.prompts_per_round * config.sampling.num_generations
    assert config.rounds.num_rounds * attempts == 12_288


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_small_rounds_keep_what_the_paper_keeps(name, tmp_path):
    metrics = filtered.run(RECIPES / f"{name}.yaml", output_dir=str(tmp_path), **SMALL)
    assert metrics["rounds"] == 2
    for number in (1, 2):
        place = tmp_path / f"round_{number:03d}"
        scores = read_jsonl(place / "scores.jsonl")
        kept = [s for s in scores if s["decision"] == "kept"]
        of_problem = Counter(s["id"].split("-")[1] for s in kept)
        best = {}
        for s in scores:
            problem = s["id"].split("-")[1]
            best[problem] = max(best.get(problem, 0.0), s["reward"])
        rows = read_jsonl(place / "kept.jsonl")
        sources = Counter(line["source"] for line in rows)
        assert sources == {"self": len(kept)} | ({"demonstration": min(len(kept), 64)} if name == "rft" else {})
        assert kept
        if name in ("rest_em", "star", "rft"):
            assert {s["success"] for s in kept} == {"yes"}
            assert max(of_problem.values()) <= {"rest_em": 10, "star": 1, "rft": 32}[name]
        elif name in ("raft", "best_of_n"):  # one of each problem, and none that is worse than another of it
            assert set(of_problem.values()) == {1}
            assert all(s["reward"] == best[s["id"].split("-")[1]] for s in kept)
        elif name == "maxrl":  # each solved problem weighs as much as any other
            assert {s["success"] for s in kept} == {"yes"}
            assert {s["decision"] for s in scores if s["success"] == "yes"} <= {"kept", "duplicate", "truncated"}
            of_row = dict.fromkeys(of_problem, 0.0)
            for line in rows:
                of_row[line["problem_id"]] += line["weight"]
            assert [*of_row.values()] == pytest.approx([len(rows) / len(of_row)] * len(of_row))
        elif name == "rwr":  # exp(1 / 0.5) for a right attempt, whatever repeats it adds the same again
            assert {s["decision"] for s in scores} <= {"kept", "duplicate", "truncated"}
            assert sum(line["weight"] for line in rows) == pytest.approx(len(rows))
            right, wrong = (min(line["weight"] for line in rows if line["reward"] == r) for r in (1.0, 0.0))
            assert right / wrong == pytest.approx(math.exp(2))
        elif name == "ssd":
            assert {s["decision"] for s in scores} <= {"kept", "truncated"}
            assert {line["weight"] for line in rows} == {1.0}
        else:
            assert all(s["reward"] >= s["cutoff"] for s in kept)
            assert {s["id"].split("-")[0] for s in scores} == {str(n) for n in range(1, number + 1)}
