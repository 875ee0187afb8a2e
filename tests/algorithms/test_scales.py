"""`ship_scale`: of the weights between base and chosen round the best on dev are tested and written."""

from types import SimpleNamespace

import pytest
import torch
from helpers.pages import read_page, rows_of, section
from helpers.runs import TINY, equal, interrupted, of_round, text, weights
from safetensors.torch import load_file

from bcft import filtered
from bcft.algorithms import rounds, scales
from bcft.config.loader import load
from bcft.errors import UsageError
from bcft.evaluation import held_out
from bcft.policy.loading import load_policy
from bcft.runs.history import History
from bcft.runs.storage import committed

RUN = TINY | {"num_rounds": 1, "prompts_per_round": 20, "eval_dev_problems": 24, "learning_rate": 5e-4}
HALF = RUN | {"ship_scale": [0.5]}


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A run that takes half of what its round changed, and what it returned."""
    path = tmp_path_factory.mktemp("half")
    return path, filtered.run(None, output_dir=str(path), **HALF)


def saved(path):
    return load_file(path / "best" / "model.safetensors")


def test_the_scaled_weights_are_what_is_written_and_tested(half):
    path, metrics = half
    assert metrics["best_round"] == 1
    base = load_policy(RUN["model_name_or_path"], load("filtered", None, RUN).model).model.state_dict()
    one, two = base, weights(path, 1)
    expected = {name: torch.lerp(one[name], two[name], 0.5) for name in two}
    assert equal(saved(path), expected)
    assert not equal(saved(path), two)
    assert metrics["best"] == of_round(path, 1, "scale_0.5/test/evaluation.json")
    assert not (path / "round_001" / "test").exists()


def test_the_choice_is_in_the_metrics_the_conclusion_and_the_report(half):
    path, metrics = half
    (only,) = metrics["scales"]
    assert metrics["scale"] == only["scale"] == 0.5
    assert only["eval"]["sampled"] == of_round(path, 1, "scale_0.5/evaluation.json")["sampled"]
    assert 0 < only["eval"]["kl_base"] < of_round(path, 1, "metrics.json")["eval"]["kl_base"]
    assert metrics["conclusion"].endswith("; best/ has 0.5 of the round's change from the base, the best on dev of 0.5")
    page = section(read_page((path / "report.html").read_text()), "success")
    (scale,) = rows_of(page.all("table")[-1])
    assert (scale["scale"], scale["chosen"]) == (0.5, "in best/")
    assert "round 1 x 0.5" in page.text


def test_of_equal_scales_the_larger_is_taken_and_scale_1_is_not_evaluated_again(half, tmp_path, monkeypatch):
    split = []
    measure = held_out.evaluate

    def measuring(*rest, phase, **keys):
        split.append(phase)
        return measure(*rest, phase=phase, **keys)

    monkeypatch.setattr(held_out, "evaluate", measuring)
    monkeypatch.setattr(History, "level", lambda self, dev: float("vs_base" in dev))  # noqa: ARG005
    metrics = filtered.run(None, output_dir=str(tmp_path), **RUN | {"ship_scale": [1.0, 0.5]})
    assert metrics["scale"] == 1.0
    assert [one["scale"] for one in metrics["scales"]] == [0.5, 1.0]
    assert metrics["scales"][0] == half[1]["scales"][0]
    assert metrics["scales"][1]["eval"] == of_round(tmp_path, 1, "metrics.json")["eval"]
    assert split.count("dev") == 3  # base, the round, the round at 0.5
    assert equal(saved(tmp_path), weights(tmp_path, 1))


@pytest.mark.slow
def test_a_scale_of_1_alone_changes_nothing(tmp_path):
    runs = {}
    for name, keys in {"without": {}, "with": {"ship_scale": [1.0]}}.items():
        metrics = filtered.run(None, output_dir=str(tmp_path / name), **RUN | {"eval_dev_problems": 8} | keys)
        files = sorted((tmp_path / name).glob("round_*/**/*.json*"))
        runs[name] = metrics, saved(tmp_path / name), {
            str(file.relative_to(tmp_path / name)): file.read_text()
            for file in files
            if file.name not in ("metrics.json", "manifest.json")
        }  # fmt: skip
    (metrics, model, files), (others, other, also) = runs["without"], runs["with"]
    assert metrics == others
    assert "scale" not in metrics
    assert files == also
    assert equal(model, other)


POINTS = {
    "before the scale is evaluated": (scales, "_evaluated", "before"),
    "after the scale is evaluated": (scales, "_evaluated", "after"),
    "before the test": (rounds, "choose_scale", "after"),
    "before the run is committed": (rounds, "write_best", "before"),
}


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_an_interrupted_choice_is_resumed_to_the_same_weights_and_figures(half, tmp_path, monkeypatch, work, point):
    holder, name, when = POINTS[point]
    interrupted(monkeypatch, tmp_path, holder, name, when=when, **HALF)
    assert not committed(tmp_path)
    assert filtered.run(None, output_dir=str(tmp_path), **HALF) == half[1]
    assert equal(saved(tmp_path), saved(half[0]))
    assert work["trained"] == 1
    assert work["played"].count("dev") == 3 * 24 * (1 + 2)


@pytest.mark.slow
def test_a_prolonged_run_trains_from_the_whole_round_and_chooses_anew(tmp_path):
    filtered.run(None, output_dir=str(tmp_path / "run"), **HALF)
    metrics = filtered.run(None, output_dir=str(tmp_path / "run"), **HALF | {"num_rounds": 2})
    whole = filtered.run(None, output_dir=str(tmp_path / "whole"), **HALF | {"num_rounds": 2})
    assert text(tmp_path / "run", 2, "rollouts.jsonl") == text(tmp_path / "whole", 2, "rollouts.jsonl")
    assert equal(saved(tmp_path / "run"), saved(tmp_path / "whole"))
    assert metrics == whole


@pytest.mark.slow
def test_the_adapter_that_is_written_is_the_scaled_one(tmp_path):
    keys = HALF | {"use_peft": True, "lora_r": 8, "lora_target_modules": ["all-linear"], "learning_rate": 2e-3}
    metrics = filtered.run(None, output_dir=str(tmp_path), **keys)
    assert metrics["scale"] == 0.5
    one, two = (load_file(tmp_path / place / "adapter_model.safetensors") for place in ("best", "round_001/model"))
    assert all(torch.equal(one[name], two[name] * (0.5 if "lora_B" in name else 1.0)) for name in two)


REFUSED = {
    "none": ([], "wants different numbers > 0 and <= 1"),
    "0": ([0.0, 1.0], "wants different numbers > 0 and <= 1"),
    "above 1": ([1.0, 1.5], "wants different numbers > 0 and <= 1"),
    "twice": ([0.5, 0.5], "wants different numbers > 0 and <= 1"),
}


@pytest.mark.parametrize("given", REFUSED)
def test_numbers_that_are_no_scales_are_refused(given):
    numbers, words = REFUSED[given]
    with pytest.raises(UsageError, match=f"ship_scale: {words}"):
        load("filtered", None, RUN | {"ship_scale": numbers})


def test_scales_without_figures_on_dev_are_refused():
    config, nothing = load("filtered", None, HALF), SimpleNamespace(measures="nothing")
    with pytest.raises(UsageError, match="ship_scale: nothing is measured on dev"):
        scales.check_scales(SimpleNamespace(config=config, scorer=nothing))
    scales.check_scales(SimpleNamespace(config=load("filtered", None, RUN), scorer=nothing))


def test_scales_of_an_adapter_that_is_no_change_from_the_base_are_refused(tmp_path):
    with pytest.raises(UsageError, match="ship_scale: a DoRA adapter has no scale"):
        load("filtered", None, HALF | {"use_peft": True, "use_dora": True})
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "base_model_name_or_path": "x"}')
    with pytest.raises(UsageError, match=r"ship_scale: .* is an adapter, and its scale 0 is the model below it"):
        load("filtered", None, HALF | {"model_name_or_path": str(tmp_path)})
    assert load("filtered", None, HALF | {"use_peft": True}).rounds.scales == (0.5,)
