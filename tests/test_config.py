"""Recipes: laws first, then one line for each way in which a recipe or a command line can be wrong."""

import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bcft.config.loader import Recipe, help_text, load, parse, reference
from bcft.config.schema import CHOICES, COMMANDS, FLAGS, KEYS, LIMITS, OVERRIDES, OWN, REFUSED, REFUSED_VALUES, RENAMED
from bcft.errors import UsageError

ROOT = Path(__file__).parents[1]
BASE = "model_name_or_path: bcft:tiny-math\ndataset_name: bcft:arithmetic\n"
BASE_KEYS = {"model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic"}
Write = Callable[[str | bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a recipe and returns its path."""

    def _write(content: str | bytes) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return _write


def found(action: Callable[[], Recipe]) -> list[str]:
    """Return the findings of an action that must be refused."""
    with pytest.raises(UsageError) as caught:
        action()
    return str(caught.value).splitlines()


# Laws

SAME = [
    ("learning_rate", "1e-6", 1e-6),
    ("learning_rate", "1E5", 1e5),
    ("learning_rate", "3", 3.0),
    ("learning_rate", ".5", 0.5),
    ("num_train_epochs", "2", 2.0),
    ("warmup_steps", "0.03", 0.03),
    ("max_steps", "-1", -1),
    ("seed", "+7", 7),
    ("max_length", "2048", 2048),
    ("max_length", "null", None),
    ("max_length", "~", None),
    ("use_peft", "true", True),
    ("use_peft", "yes", True),
    ("use_peft", "Off", False),
    ("bf16", "no", False),
    ("bf16", "null", None),
    ("save_strategy", "no", "no"),
    ("eval_strategy", "no", "no"),
    ("include_num_input_tokens_seen", "no", "no"),
    ("include_num_input_tokens_seen", "true", True),
    ("run_name", "no", "no"),
    ("run_name", "010", "010"),
    ("run_name", "12:30:45", "12:30:45"),
    ("run_name", "2026-11-22", "2026-11-22"),
    ("run_name", "1e-6", "1e-6"),
    ("pad_to_multiple_of", "64", 64),
    ("pad_to_multiple_of", "auto", "auto"),
    ("overlength", "raise", "raise"),
    ("report_to", "none", "none"),
    ("report_to", "[wandb, trackio]", ["wandb", "trackio"]),
    ("lora_target_modules", "all-linear", ["all-linear"]),
    ("lora_target_modules", '["q_proj", v_proj]', ["q_proj", "v_proj"]),
    ("gradient_checkpointing_kwargs", '{"use_reentrant": false}', {"use_reentrant": False}),
    ("lr_scheduler_kwargs", "{min_lr: 1e-7, n: 3, kind: cos}", {"min_lr": 1e-7, "n": 3, "kind": "cos"}),
    ("lr_scheduler_kwargs", "{a: [1, {b: null}]}", {"a": [1, {"b": None}]}),
]


@pytest.mark.parametrize(("key", "text", "value"), SAME)
def test_a_value_means_the_same_in_a_file_on_the_command_line_and_in_python(
    write: Write, key: str, text: str, value: Any
) -> None:
    base = f"{BASE}use_peft: true\n" if key.startswith("lora_") else BASE
    path = write(base)
    recipes = [
        parse("sft", [path, f"--{key}", text]),
        parse("sft", [path, f"--{key}={text}"]),
        parse("sft", [f"{key}={text}", "--config", path]),
        load("sft", path, {key: value}),
        load("sft", write(f"{base}{key}: {text}\n"), {}),
    ]
    for recipe in recipes:
        assert recipe[key] == value
        assert type(recipe[key]) is type(value)
        assert key in recipe.given
    assert len({str(recipe.resolved()) for recipe in recipes}) == 1


@settings(max_examples=100, deadline=None)
@given(st.floats(min_value=1e-300, max_value=1e300))
def test_every_float_comes_back_as_python_and_yaml_write_it(value: float) -> None:
    for text in (repr(value), yaml.safe_dump(value).split("\n")[0]):
        assert parse("sft", [*as_tokens(BASE_KEYS), f"learning_rate={text}"])["learning_rate"] == value


@settings(max_examples=50, deadline=None)
@given(st.integers(min_value=0, max_value=10**18 - 1))
def test_every_integer_comes_back(value: int) -> None:
    assert parse("sft", [*as_tokens(BASE_KEYS), "--seed", str(value)])["seed"] == value


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_no_command_line_ends_in_anything_but_a_recipe_or_findings(key: str, value: str) -> None:
    for tokens in ([f"--{key}", value], [f"{key}={value}"], [value]):
        try:
            parse("sft", [*as_tokens(BASE_KEYS), *tokens])
        except UsageError as error:
            lines = str(error).split("\n")
        else:
            lines = []
        assert all(": " in line for line in lines)


def as_tokens(keys: dict[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in keys.items()]


def test_the_order_of_keys_never_matters(write: Write) -> None:
    lines = [*BASE.splitlines(), *(f"{key}: {text}" for key, text, _ in {s[0]: s for s in SAME}.values())]
    first = load("sft", write("\n".join(lines)), {})
    for seed in range(5):
        random.Random(seed).shuffle(lines)
        again = load("sft", write("\n".join(lines)), {})
        assert again.values == first.values
        assert again.given == first.given


def test_every_default_is_a_value_its_own_key_accepts() -> None:
    for key in KEYS.values():
        if key.default is not None:
            recipe = load(key.commands[0], None, {**BASE_KEYS, "use_peft": False, key.name: key.default})
            assert recipe[key.name] == key.default


def test_every_word_of_a_choice_stays_the_word(write: Write) -> None:
    for key in KEYS.values():
        for word in key.choices:
            if (key.name, word) not in REFUSED_VALUES:
                assert load("preview", write(f"{BASE}{key.name}: {word}\n"), {})[key.name] == word


def test_the_command_line_wins_over_the_file_which_wins_over_defaults(write: Write) -> None:
    recipe = parse("sft", [write(BASE + "seed: 1\nmax_steps: 5\n"), "--seed", "2"])
    assert (recipe["seed"], recipe["max_steps"], recipe["learning_rate"]) == (2, 5, 2e-5)
    assert recipe.given == {"model_name_or_path", "dataset_name", "seed", "max_steps"}


def test_all_findings_come_at_once_each_on_a_line_with_its_place(write: Write) -> None:
    path = write("learning_rte: 1\nnum_train_epochs: two\nhub_token: x\nbatch_size: 4\noverlength: cut\n")
    lines = found(lambda: parse("sft", [path, "--seed", "x", "--no-such", "--preview_rows=2"]))
    assert [line.split(": ")[0] for line in lines] == [
        *(f"{path}:{n}" for n in range(1, 6)),
        *["command line"] * 3,
        *[path] * 2,
    ]
    assert lines[0] == f"{path}:1: learning_rte: unknown key; did you mean learning_rate?"
    assert lines[-2:] == [f"{path}: model_name_or_path: required", f"{path}: dataset_name: required"]


def test_what_a_run_records_gives_the_same_recipe_again(write: Write) -> None:
    text = BASE + "".join(f"{key}: {text}\n" for key, text, _ in {s[0]: s for s in SAME}.values())
    for command in COMMANDS:
        recipe = load(command, write(text), {"output_dir": "runs/a"})
        again = load(command, write(yaml.safe_dump(recipe.resolved())), {})
        assert again.values == recipe.values
        assert again.resolved() == recipe.resolved()


def test_a_recipe_records_its_own_keys_and_what_decides_the_result() -> None:
    resolved = load("sft", None, BASE_KEYS).resolved()
    assert {"overlength", "learning_rate", "temperature", "dtype", "seed", "output_dir"} <= resolved.keys()
    assert not {"against", "preview_rows", "run_name"} & resolved.keys()


def test_a_recipe_cannot_be_changed() -> None:
    recipe = load("sft", None, BASE_KEYS)
    with pytest.raises(TypeError):
        recipe.values["seed"] = 1  # type: ignore[index]
    recipe.resolved()["seed"] = 1
    assert recipe["seed"] == 42


def test_importing_the_configuration_is_quick_and_imports_no_library() -> None:
    code = (
        "import sys, time; t = time.process_time(); import bcft.config.loader; t = time.process_time() - t\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules)\n"
        "assert t < 0.3, t"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# The tables

FILTERED = {name for name, reason in REFUSED.items() if reason == "this version does not have it"}


def test_every_own_key_is_in_the_help_of_its_commands() -> None:
    for command in COMMANDS:
        text = help_text(command)
        assert all(f"  {key.name}: " in text for key in OWN if command in key.commands)
        assert all(f"--{name} " in text for name, flag in FLAGS.items() if command in flag.commands)
        assert "SFTConfig" in text
        assert f"bcft {command} recipes/" in text


def test_the_reference_page_names_everything_there_is_and_is_not() -> None:
    page = reference()
    assert all(f"`{name}`" in page for name in (*KEYS, *REFUSED, *RENAMED))


def test_a_refused_or_foreign_name_is_answered_with_the_reason_or_the_right_name() -> None:
    lines = found(lambda: load("sft", None, BASE_KEYS | dict.fromkeys([*REFUSED, *RENAMED], 1)))
    assert lines == [
        *(f"override: {name}: refused: {reason}" for name, reason in REFUSED.items()),
        *(f"override: {name}: not a key here; use {right}" for name, right in RENAMED.items()),
    ]


def test_the_right_name_of_a_foreign_one_is_a_key() -> None:
    assert {right.split()[0].strip(":") for right in RENAMED.values()} <= KEYS.keys() | FILTERED


def test_the_tables_contradict_each_other_nowhere() -> None:
    assert not RENAMED.keys() & (KEYS.keys() | REFUSED.keys())
    assert not {key.name for key in OWN} & REFUSED.keys()
    assert {*LIMITS, *CHOICES, *OVERRIDES, *(name for name, _ in REFUSED_VALUES)} <= KEYS.keys()


def test_every_recipe_of_the_repository_is_accepted_by_every_command() -> None:
    for path in sorted((ROOT / "recipes").rglob("*.y*ml")):
        if "accelerate_configs" not in path.parts:
            for command in COMMANDS:
                assert parse(command, [str(path)]).path == str(path)


# Bad lines of a recipe: each stands on line 3, after two good ones

BAD_LINES = [
    ("learning_rte: 1", "learning_rte: unknown key; did you mean learning_rate?"),
    ("num_train_epoch: 1", "did you mean num_train_epochs?"),
    ("max_st: 1", "max_st: unknown key"),
    ("Learning_Rate: 1", "did you mean learning_rate?"),
    ("learning-rate: 1", "did you mean learning_rate?"),
    ("lr: 1", "use learning_rate"),
    ("warmup_ratio: 0.1", "use warmup_steps (a value below 1 is a fraction"),
    ("torch_dtype: auto", "use dtype"),
    ("max_seq_length: 9", "use max_length"),
    ("rollout.n: 4", "use num_generations"),
    ("policy_lm: gpt2", "use model_name_or_path"),
    ("env: {HF_TOKEN: x}", "env: refused: a recipe sets no environment variables"),
    ("datasets: [{path: x}]", "datasets: refused: mixtures"),
    ("completion_only_loss: true", "the labels are made and proved here"),
    ("packing: true", "packing: refused: this version does not pack"),
    ("hub_token: hf_abc", "set HF_TOKEN in the environment"),
    ("deepspeed: x.json", "accelerate launch --config_file"),
    ("use_vllm: true", "this version samples with its own engine only"),
    ("reward_args: x", "this version does not have it"),
    ("train_sampling_strategy: group_by_length", "its sampler is not seeded"),
    ("loss_type: chunked_nll", "old name of nll"),
    ("allow_drift: true", "a flag, not a key: give --allow-drift on the command line"),
    ("learning_rate: fast", "learning_rate: wants a number > 0, not 'fast'"),
    ("learning_rate: [1]", "wants a number > 0, not ['1']"),
    ("learning_rate:", "wants a number > 0, and has no value"),
    ("learning_rate: null", "and has no value"),
    ("learning_rate: 0", "wants a number > 0, not 0.0"),
    ("learning_rate: -1e-5", "wants a number > 0, not -1e-05"),
    ("learning_rate: .nan", "wants a number > 0, not '.nan'"),
    ("learning_rate: nan", "not 'nan'"),
    ("learning_rate: .inf", "not '.inf'"),
    ("learning_rate: 1e999", "not '1e999'"),
    ("learning_rate: 1e", "not '1e'"),
    ("learning_rate: e5", "not 'e5'"),
    ("learning_rate: 12:30:45", "not '12:30:45'"),
    ("learning_rate: true", "not 'true'"),
    ("learning_rate: 1_0", "not '1_0'"),
    ("seed: 010", "seed: wants an integer >= 0, not '010'"),
    ("seed: 0x10", "not '0x10'"),
    ("seed: 1.0", "not '1.0'"),
    ("seed: 1e3", "not '1e3'"),
    ("seed: 12:30:45", "not '12:30:45'"),
    ("seed: 99999999999999999999", "wants an integer"),
    ("max_steps: -2", "wants an integer >= -1, not -2"),
    ("top_p: 1.5", "wants a number > 0 and <= 1, not 1.5"),
    ("top_p: 0", "wants a number > 0 and <= 1"),
    ("temperature: 0", "wants a number > 0"),
    ("lora_r: 0\nuse_peft: true", "wants an integer >= 1, not 0"),
    ("use_peft: 1", "use_peft: wants true or false, not '1'"),
    ("use_peft: ture", "not 'ture'"),
    ("bf16: None", "None is a word in YAML; write null"),
    ("max_length: None", "write null"),
    ("save_strategy: off", "save_strategy: wants one of no, steps, epoch, best, not 'off'"),
    ("save_strategy: stepps", "did you mean steps?"),
    ("save_strategy: best", "best is refused"),
    ("optim: adamw", "wants one of adamw_torch,"),
    ("overlength: cut", "wants one of drop, raise, not 'cut'"),
    ("overlength: true", "wants one of drop, raise, not 'true'"),
    ("success_func: math_reward", "wants a dotted path such as package.module.function"),
    ("success_func: a.b:c", "wants a dotted path"),
    ("run_name: [a]", "run_name: wants text or null, not ['a']"),
    ("run_name: {a: 1}", "wants text or null, not {'a': '1'}"),
    ("run_name: ''", "wants text or null, and is empty"),
    ("run_name: hf_abcdefghijklmnopqrstuvwx", "run_name: holds a token"),
    ("lora_target_modules: q,v\nuse_peft: true", "lists are written [a, b]"),
    ("lora_target_modules: [q, [v]]\nuse_peft: true", "wants a list [a, b] or null"),
    ("lora_target_modules: [q, null]\nuse_peft: true", "wants a list [a, b] or null"),
    ("lora_r: 8", "lora_r: has no effect without use_peft: true"),
    ("lr_scheduler_kwargs: 3", "wants a mapping {name: value} or null, not '3'"),
    ("lr_scheduler_kwargs: [a]", "wants a mapping"),
    ("lr_scheduler_kwargs: '{a: '", "is not readable"),
    ("gradient_checkpointing_kwargs: {use_reentrant: no}", "'no' can be read in two ways here"),
    ("lr_scheduler_kwargs: {a: 010}", "'010' can be read in two ways here"),
    ("lr_scheduler_kwargs: {a: 1, a: 2}", "'a' is given twice"),
    ("trust_remote_code: true", "it needs --allow-remote-code on the command line and a model_revision of 40 hex"),
    ("bf16: true\nfp16: true", "fp16: bf16 is on too"),
    ("seed: 1\nseed: 2", "seed: given twice, first at"),
    ("1: 2", "1: unknown key"),
    ("true: 2", "true: unknown key"),
    ("'a\\nb': 2", "unknown key"),
    ("'': 2", "'': unknown key"),
    ("? [a]\n: 1", "a key is a word"),
    ("<<: {seed: 1}", "'<<': unknown key"),
    ("seed: !!int 3", "tags are not used in recipes"),
    ("seed: !!python/object/apply:os.system [ls]", "tags are not used in recipes"),
    ("seed: *a", "*a does not stand for a single value"),
    ("report_to: &a [*a]", "*a does not stand for a single value"),
    ("just words", "not valid YAML"),
    ("seed: 1: 2", "not valid YAML: mapping values are not allowed here"),
    ("\tseed: 1", "not valid YAML"),
    ("seed: [1, 2", "not valid YAML"),
    ("seed: 'x", "not valid YAML"),
    ("seed: @x", "not valid YAML"),
    ("seed: \x01", "not valid YAML: character '\\x01'"),
    ("lr_scheduler_kwargs: " + "[" * 50, "nested deeper than 20"),
    ("--- \nseed: 1", "a second document"),
]


@pytest.mark.parametrize(("line", "expected"), BAD_LINES)
def test_a_bad_line_of_a_recipe_is_one_finding_with_its_line(write: Write, line: str, expected: str) -> None:
    path = write(BASE + line + "\n")
    (finding,) = found(lambda: load("sft", path, {}))
    number = 4 if line.startswith(("bf16: true", "seed: 1\n")) else 3
    assert finding.startswith(f"{path}:{number}: ")
    assert expected in finding


def test_no_finding_repeats_a_secret(write: Write) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    path = write(f"{BASE}run_name: {secret}\nseed: {secret}\nhub_token: {secret}\nhf_tokn: {secret}\n")
    assert secret not in "\n".join(found(lambda: parse("sft", [path, "--project", secret])))


def test_both_lines_of_a_key_given_twice_are_named(write: Write) -> None:
    path = write(BASE + "seed: 1\nmax_steps: 1\nseed: 1\n")
    assert found(lambda: load("sft", path, {})) == [f"{path}:5: seed: given twice, first at {path}:3"]


BAD_FILES: list[tuple[bytes, int, str]] = [
    (b"- a\n- b\n", 1, "a recipe is lines of `key: value`"),
    (b"\n\njust words\n", 3, "a recipe is lines of `key: value`"),
    (b"a: 1\nb: \xff\n", 2, "not UTF-8: byte 8 is 0xff"),
    ("seed: 1\n".encode("utf-16"), 1, "not UTF-8"),
    (b"seed: 1\x00\n", 1, "not valid YAML"),
    (b"# " + b"x" * 1_000_001, 1, "larger than 1 MB"),
    (b"seed: [" + b"1," * 400_000 + b"]", 1, "more than 1000 values"),
    (b"".join(b"key_%d: 1\n" % i for i in range(60_000)), 500, "more than 1000 values"),
    (b"[" * 900_000, 1, "a recipe is lines of `key: value`"),
    (b"a: &x 1\n" + b"b: *x\n" * 101, 102, "more than 100 aliases"),
    (b"a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n", 2, "*a does not stand for a single value"),
]


@pytest.mark.parametrize(("content", "line", "expected"), BAD_FILES)
def test_a_file_that_is_no_recipe_is_one_finding_in_under_two_seconds(
    write: Write, content: bytes, line: int, expected: str
) -> None:
    path, start = write(content), time.process_time()
    (finding,) = found(lambda: load("sft", path, {}))
    assert time.process_time() - start < 2
    assert finding.startswith(f"{path}:{line}: {expected}")
    assert len(finding) < 300 + len(path)


def test_a_file_of_unknown_keys_is_told_in_under_two_seconds(write: Write) -> None:
    path, start = write("".join(f"learning_{i}_rate: 1\n" for i in range(490))), time.process_time()
    assert len(found(lambda: load("sft", path, {}))) == 492
    assert time.process_time() - start < 2


def test_what_cannot_be_opened_is_one_finding(tmp_path: Path) -> None:
    assert found(lambda: parse("sft", [str(tmp_path)])) == [f"{tmp_path}: a directory; give the recipe file in it"]
    assert found(lambda: parse("sft", ["no/such.yaml"])) == ["no/such.yaml: no such recipe file"]
    assert "a key is given as --seed value" in found(lambda: parse("sft", ["seed", "1"]))[-1]


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n", "{}", "null"])
def test_an_empty_recipe_lacks_what_is_required(write: Write, content: str) -> None:
    lines = found(lambda: load("sft", write(content), {}))
    assert lines[-1].endswith("dataset_name: required") or "lines of `key: value`" in lines[0]


def test_a_few_aliases_of_single_values_are_fine(write: Write) -> None:
    recipe = load("sft", write(BASE + "per_device_train_batch_size: &b 4\nper_device_eval_batch_size: *b\n"), {})
    assert recipe["per_device_eval_batch_size"] == 4


def test_a_byte_order_mark_and_windows_line_ends_are_fine(write: Write) -> None:
    assert load("sft", write(("\ufeff" + BASE + "seed: 3\n").replace("\n", "\r\n")), {})["seed"] == 3


# Command lines

BAD_TOKENS = [
    (["--learning_rte", "1"], "learning_rte: unknown key; did you mean learning_rate?"),
    (["--max_st", "1"], "max_st: unknown key"),
    (["--learning-rate", "1"], "did you mean learning_rate?"),
    (["-lr", "1"], "-lr: unknown key"),
    (["--seed"], "--seed: wants a value"),
    (["--seed", "--debug"], "--seed: wants a value"),
    (["--seed="], "seed: wants an integer >= 0, not ''"),
    (["--seed", "1", "seed=1"], "seed: given twice, first at command line"),
    (["--allow-drif"], "allow-drif: unknown key; did you mean --allow-drift?"),
    (["--debug=true"], "--debug: takes no value"),
    (["--html"], "--html: not a flag of bcft sft"),
    (["other.yaml"], "'other.yaml': one recipe is enough"),
    (["--config", "other.yaml"], "'other.yaml': one recipe is enough"),
    (["--config"], "--config: wants a value"),
    (["--use_peft", "ture"], "use_peft: wants true or false, not 'ture'"),
    (["--report_to", "a", "b"], "'b': one recipe is enough; keys are --key value or key=value, lists '[a, b]'"),
    (["--report_to", "[a"], "'[a' is not readable"),
    (["--against", "x"], "against: not used here; it is a key of bcft evaluate and filtered"),
    (["--preview_rows", "2"], "preview_rows: not used here; it is a key of bcft preview"),
    (["trainer.lr=1"], "trainer.lr: unknown key"),
    (["--"], "'': unknown key"),
]


@pytest.mark.parametrize(("tokens", "expected"), BAD_TOKENS)
def test_a_bad_command_line_is_one_finding(write: Write, tokens: list[str], expected: str) -> None:
    (finding,) = found(lambda: parse("sft", [write(BASE), *tokens]))
    assert finding.startswith("command line: ")
    assert expected in finding


def test_a_yes_no_key_may_stand_alone_before_anything(write: Write) -> None:
    path = write(BASE)
    for tokens in (
        ["--use_peft", path],
        [path, "--use_peft"],
        ["--use_peft", "seed=1", path],
        ["--use_peft", "on", path],
    ):
        assert parse("sft", tokens)["use_peft"] is True


def test_a_file_may_hold_keys_of_other_commands(write: Write) -> None:
    recipe = load("sft", write(BASE + "against: x\npreview_rows: 9\n"), {})
    assert recipe.resolved()["preview_rows"] == 9
    assert parse("evaluate", [recipe.path, "--against", "y", "--json"]).flags == {"json"}


def test_flags_are_told_apart_from_keys(write: Write) -> None:
    recipe = parse("sft", ["--allow-drift", write(BASE), "--debug", "--quiet"])
    assert recipe.flags == {"allow-drift", "debug", "quiet"}
    assert recipe.given == BASE_KEYS.keys()


def test_the_output_directory_is_named_after_the_recipe() -> None:
    assert load("sft", None, BASE_KEYS)["output_dir"] == "runs/sft"
    assert found(lambda: load("sft", None, {}))[0] == "command line: model_name_or_path: required"


def test_the_output_directory_of_a_file_is_its_stem(write: Write) -> None:
    assert load("sft", write(BASE), {})["output_dir"] == "runs/recipe"


def test_python_may_give_paths_and_text_and_gets_the_same_checks(tmp_path: Path) -> None:
    recipe = load("sft", None, BASE_KEYS | {"output_dir": tmp_path, "learning_rate": "1e-6", "seed": "7"})
    assert (recipe["output_dir"], recipe["learning_rate"], recipe["seed"]) == (str(tmp_path), 1e-6, 7)
    for key, value in [
        ("seed", True),
        ("seed", 1.0),
        ("use_peft", 1),
        ("run_name", 3),
        ("learning_rate", float("nan")),
    ]:
        (line,) = found(partial(load, "sft", None, BASE_KEYS | {key: value}))
        assert line.startswith(f"override: {key}: wants ")


def test_success_func_may_be_empty_for_none(write: Write) -> None:
    assert parse("sft", [write(BASE), "--success_func="])["success_func"] == ""
    assert load("sft", write(BASE + "success_func: ''\n"), {})["success_func"] == ""


# Rules about several keys


def test_remote_code_needs_the_flag_and_a_pinned_revision(write: Write) -> None:
    pinned = BASE + f"trust_remote_code: true\nmodel_revision: {'a1' * 20}\n"
    assert parse("sft", [write(pinned), "--allow-remote-code"])["trust_remote_code"] is True
    assert "--allow-remote-code" in found(lambda: parse("sft", [write(pinned)]))[0]
    unpinned = BASE + "trust_remote_code: true\nmodel_revision: main\n"
    assert "40 hex" in found(lambda: parse("sft", [write(unpinned), "--allow-remote-code"]))[0]


def test_a_small_models_learning_rate_is_not_kept_for_another_model(write: Write) -> None:
    path = write(BASE + "learning_rate: 3e-3\n")
    other = ["--model_name_or_path", "meta-llama/Llama-3.2-3B-Instruct"]
    (finding,) = found(lambda: parse("sft", [path, *other]))
    assert finding.startswith("command line: model_name_or_path: ")
    assert "recipes/llama-3.2-3b/bc_math.yaml" in finding
    assert parse("sft", [path, *other, "learning_rate=1e-5"])["learning_rate"] == 1e-5
    assert parse("sft", [path, "model_name_or_path=bcft:tiny-init"])["learning_rate"] == 3e-3


def test_a_small_models_recipe_may_evaluate_any_model(write: Write) -> None:
    assert parse("evaluate", [write(BASE), "--model_name_or_path", "runs/x"])["model_name_or_path"] == "runs/x"


def test_a_lora_recipe_may_be_run_without_its_adapter(write: Write) -> None:
    path = write(BASE + "use_peft: true\nlora_r: 8\n")
    assert parse("sft", [path, "--use_peft", "false"])["use_peft"] is False
