"""Which runs a directory resumes, and which it refuses whatever is allowed."""

import types
import warnings

import pytest
import yaml

from bcft.config.keys import KEYS
from bcft.errors import UsageError
from bcft.runs import directory as run_directory
from bcft.runs.directory import PACKAGES, RunDirectory, quiet_libraries
from bcft.runs.drift import GRADING, MODEL, remeasures, replays, retrains
from bcft.runs.storage import read_json, write_json, write_manifest, write_text

RECIPE = {"model_name_or_path": "m", "num_rounds": 2, "lora_r": 4, "use_peft": True, "success_func": "a.b", "seed": 0}


def directory(path, changed, *, rounds=0, finished=False, allow=True):
    """Return a directory whose run was started with RECIPE and has committed rounds, for a recipe with other keys."""
    path.mkdir(exist_ok=True)
    (path / "config.yaml").write_text(yaml.safe_dump(RECIPE))
    write_json(path / "versions.json", {"packages": {"torch": "0"}, "world_size": 7, "data": "d"})
    for number in range(1, rounds + 1):
        write_json(path / f"round_{number:03d}" / "metrics.json", {})
        write_manifest(path / f"round_{number:03d}", [path / f"round_{number:03d}" / "metrics.json"])
    if finished:
        write_manifest(path, [path / "config.yaml"])
    return RunDirectory(path, command="x", recipe=RECIPE | changed, allow_drift=allow)


MODELS = {"model_name_or_path": "n", "model_revision": "r", "use_peft": False, "lora_r": 16, "lora_alpha": 1,
          "lora_target_modules": ["q"], "use_rslora": True, "use_dora": True, "load_in_4bit": True,
          "bnb_4bit_quant_type": "fp4", "use_bnb_nested_quant": True}  # fmt: skip
GRADINGS = {"success_func": "", "reward_funcs": ["a.c"], "reward_weights": [2.0], "reward_args": {"a": 1}}


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize(("key", "value"), [*MODELS.items(), *GRADINGS.items()])
def test_committed_rounds_keep_their_model_and_their_grading(tmp_path, key, value, allow):
    with pytest.raises(
        UsageError, match=f"{key} was .*its rounds were made with {key}: give another output_dir"
    ) as got:
        directory(tmp_path, {key: value}, rounds=1, allow=allow).check_recipe()
    assert ("refilter" in str(got.value)) == (key in GRADING)
    assert "--allow-drift" not in str(got.value)


@pytest.mark.parametrize(("key", "value"), [*MODELS.items(), *GRADINGS.items()])
def test_before_a_round_is_committed_model_and_grading_may_differ(tmp_path, key, value):
    with pytest.raises(UsageError, match="--allow-drift"):
        directory(tmp_path, {key: value}, allow=False).check_recipe()
    run = directory(tmp_path, {key: value})
    run.check_recipe()
    assert run.drift == {key}


@pytest.mark.parametrize(
    ("key", "value"), [("seed", 1), ("learning_rate", 1.0), ("temperature", 0.5), ("eval_every", 2), ("max_length", 9)]
)
def test_other_keys_may_differ_after_committed_rounds(tmp_path, key, value):
    run = directory(tmp_path, {key: value}, rounds=2)
    run.check_recipe()
    assert run.drift == {key}


@pytest.mark.parametrize("rounds", [1, 2, 3, 9])
def test_a_finished_run_is_prolonged_with_other_versions_and_processes_where_drift_is_allowed(tmp_path, rounds):
    more = {"num_rounds": 2 + rounds}
    with pytest.raises(UsageError, match=r"processes was 7, now 1.*or pass --allow-drift"):
        checked(directory(tmp_path, more, rounds=2, finished=True, allow=False))
    assert checked(directory(tmp_path, more, rounds=2, finished=True)).drift == {"versions"}
    with pytest.raises(UsageError, match="it is finished"):
        checked(directory(tmp_path, {}, rounds=2, finished=True))


def checked(run):
    run.check_recipe()
    run.check_versions()
    return run


def started(path, recipe, *, rounds=0, allow=False):
    """Return the directory of a run that was started with a recipe, opened again."""
    directory(path, {}, rounds=rounds)
    run = RunDirectory(path, command="x", recipe=recipe, allow_drift=allow)
    run.record([], "digest")
    return run


@pytest.mark.parametrize("named", ["path", "directory", "package"])
def test_a_run_is_not_continued_with_other_weights_in_the_file_of_its_model(tmp_path, monkeypatch, named):
    place = tmp_path / "site" / "has_a_file"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    file = place / "m.gguf"
    file.write_bytes(b"GGUF one")
    recipe = {
        "path": {"model_name_or_path": str(file)},
        "directory": {"model_name_or_path": str(place), "gguf_file": "m.gguf"},
        "package": {"model_name_or_path": "package:has_a_file/m.gguf"},
    }[named]
    strict = started(tmp_path / "strict", recipe)
    allowed, with_rounds = (started(tmp_path / str(n), recipe, rounds=n, allow=True) for n in (0, 1))
    for run in (strict, allowed, with_rounds):
        run.check_versions()
    file.write_bytes(b"GGUF three")
    with pytest.raises(
        UsageError, match=r"another GGUF file of the same name \(it had 8 bytes, SHA-256 \w{12}, now 10 "
    ):
        strict.check_versions()
    allowed.check_versions()
    assert allowed.drift == {"model_name_or_path"}
    with pytest.raises(UsageError, match="its rounds were made with model_name_or_path: give another output_dir"):
        with_rounds.check_versions()
    file.unlink()  # the model is refused later, by name
    strict.check_versions()


@pytest.mark.parametrize("key", ["dataset_name", "replay_dataset"])
def test_a_run_is_not_continued_with_another_version_of_what_makes_its_problems(tmp_path, monkeypatch, key):
    monkeypatch.setattr(run_directory.metadata, "version", lambda name: {"reasoning-gym": "1"}.get(name, "7"))
    run = started(tmp_path, {key: "reasoning-gym:chain_sum"})
    run.check_versions()
    monkeypatch.setattr(run_directory.metadata, "version", lambda name: {"reasoning-gym": "2"}.get(name, "7"))
    with pytest.raises(UsageError, match=r"other versions or processes \(reasoning-gym was 1, now 2\)"):
        run.check_versions()


def test_packages_and_files_that_a_recipe_does_not_name_are_not_recorded_nor_missed(tmp_path):
    run = started(tmp_path, {"model_name_or_path": "m", "dataset_name": "d"})
    recorded = read_json(tmp_path / "versions.json")
    assert tuple(recorded["packages"]) == PACKAGES
    assert "weights" not in recorded
    # A run from before they were recorded continues.
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    run.recipe = {"model_name_or_path": str(tmp_path / "m.gguf"), "dataset_name": "reasoning-gym:chain_sum"}
    run.check_versions()
    assert not run.drift


def test_every_key_touches_what_its_section_says():
    touched = {"replays": replays, "retrains": retrains, "remeasures": remeasures}
    wanted = {
        "model": {"replays", "retrains", "remeasures"}, "data": {"replays", "retrains", "remeasures"},
        "sampling": {"replays", "remeasures"}, "engine": {"replays", "remeasures"},
        "environment": {"replays", "remeasures"}, "selection": set(),
        "rounds": {"retrains"}, "training": {"retrains"}, "evaluation": {"remeasures"}, "sharing": set(),
    }  # fmt: skip
    more = {"seed": {"replays", "remeasures"}, "init_from": {"replays"}} | {key: {"remeasures"} for key in GRADING}
    for key in KEYS:
        found = {name for name, function in touched.items() if function({key})}
        assert found == wanted[KEYS[key].section] | more.get(key, set()), key
    for other in ("versions", "the data"):
        assert all(function({other}) for function in touched.values())
    assert not any(function(()) for function in touched.values())
    assert KEYS.keys() >= GRADING | MODEL


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        (["m.f@0a1b2c3d"], ["m.f@ffffffff"], True),
        (["m.f@0a1b2c3d[limit=3]"], ["m.f@0a1b2c3d[limit=4]"], True),
        (["m.f@0a1b2c3d", "a.b"], ["m.f@ffffffff", "a.b"], True),
        (["m.f@0a1b2c3d"], ["m.g@0a1b2c3d"], False),
        (["m.f@0a1b2c3d"], ["m.f@ffffffff", "a.b"], False),
        (["m.f@0a1b2c3d"], ["a.b"], False),
    ],
)
def test_committed_rounds_continue_with_a_function_that_was_repaired_and_not_with_another(tmp_path, before, now, same):
    """The recipe names a function of a notebook by its source: a repair must not lose the rounds."""
    directory(tmp_path, {}, rounds=1)
    write_text(tmp_path / "config.yaml", yaml.safe_dump(RECIPE | {"reward_funcs": before}))
    strict, allowed = (
        RunDirectory(tmp_path, command="x", recipe=RECIPE | {"reward_funcs": now}, allow_drift=allow)
        for allow in (False, True)
    )
    with pytest.raises(UsageError, match="--allow-drift" if same else "give another output_dir"):
        strict.check_recipe()
    if same:
        allowed.check_recipe()
        assert not allowed.drift
    else:
        with pytest.raises(UsageError, match="its rounds were made with reward_funcs"):
            allowed.check_recipe()


@pytest.mark.parametrize(
    ("before", "now", "named"),
    [
        (["m.f@0a1b2c3d"], ["m.f@ffffffff"], "m.f"),
        (["m.f@0a1b2c3d", "m.g@0a1b2c3d"], ["m.f@0a1b2c3d", "m.g@ffffffff"], "m.g"),
        (["m.f@0a1b2c3d"], ["m.f@0a1b2c3d"], ""),
        (["m.f@0a1b2c3d"], ["m.h@ffffffff"], ""),  # another function is another recipe
        ([], ["m.f@ffffffff"], ""),
    ],
)
def test_a_function_whose_source_changed_is_named_when_its_run_resumes(tmp_path, before, now, named):
    run = RunDirectory(tmp_path, command="x", recipe=RECIPE, allow_drift=False)
    assert run.changed_functions(now) == ""
    run.record([], "digest", functions=before)
    note = run.changed_functions(now)
    assert (f"rewards: {named} changed since" in note) if named else not note


def test_warnings_of_libraries_are_hidden_and_those_of_users_code_are_shown():
    library, own = types.ModuleType("peft.tuners.lora"), types.ModuleType("my_rewards")
    for module in (library, own):
        exec("import warnings\ndef warn():\n    warnings.warn(f'from {__name__}', stacklevel=1)\n", module.__dict__)

    def seen(*, debug):
        with warnings.catch_warnings(record=True) as caught, quiet_libraries(debug=debug):
            library.warn()
            own.warn()
        return [str(warning.message) for warning in caught]

    assert seen(debug=False) == ["from my_rewards"]
    assert seen(debug=True) == ["from peft.tuners.lora", "from my_rewards"]
