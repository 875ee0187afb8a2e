"""Recipes: laws first, then one line for each way in which a recipe or a command line can be wrong."""

import random
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from helpers.recipes import BASE, BASE_KEYS, SAME, findings

from bcft.config.keys import COMMANDS, KEYS, PASSED_THROUGH
from bcft.config.loader import load, parse
from bcft.config.schema import SECTIONS

ROOT = Path(__file__).parents[2]
Write = Callable[[str | bytes], str]

# Laws


def test_the_order_of_keys_never_matters(write: Write) -> None:
    lines = [*BASE.splitlines(), *(f"{key}: {text}" for key, text, _ in {s[0]: s for s in SAME}.values())]
    first = load("sft", write("\n".join(lines)), {})
    for seed in range(5):
        random.Random(seed).shuffle(lines)
        again = load("sft", write("\n".join(lines)), {})
        assert again.values == first.values
        assert again.given == first.given


def test_the_command_line_overrides_the_file_which_overrides_defaults(write: Write) -> None:
    recipe = parse("sft", [write(BASE + "seed: 1\nmax_steps: 5\n"), "--seed", "2"])
    assert (recipe.values["seed"], recipe.values["max_steps"], recipe.values["learning_rate"]) == (2, 5, 2e-5)
    assert recipe.given == {"model_name_or_path", "dataset_name", "seed", "max_steps"}


def test_all_findings_come_at_once_each_on_a_line_with_its_place(write: Write) -> None:
    path = write("learning_rte: 1\nnum_train_epochs: two\nhub_token: x\nbatch_size: 4\noverlength: cut\n")
    lines = findings(lambda: parse("sft", [path, "--seed", "x", "--no-such", "--preview_rows=2"]))
    assert [line.split(": ")[0] for line in lines] == [
        *(f"{path}:{n}" for n in range(1, 6)),
        *["command line"] * 3,
        *[path] * 2,
    ]
    assert lines[0] == f"{path}:1: learning_rte: unknown key; did you mean learning_rate?"
    assert lines[-2:] == [f"{path}: model_name_or_path: required", f"{path}: dataset_name: required"]


def recipe_for(command: str) -> str:
    """Return a recipe with every key of `SAME` that a file for this command may hold."""
    lines = {key: text for key, text, _ in SAME if command != "filtered" or command in KEYS[key].commands}
    return BASE + "".join(f"{key}: {text}\n" for key, text in lines.items())


def test_what_a_run_records_gives_the_same_recipe_again(write: Write) -> None:
    for command in COMMANDS:
        recipe = load(command, write(recipe_for(command)), {"output_dir": "runs/a"})
        again = load(command, write(yaml.safe_dump(recipe.resolved)), {})
        assert again.values == recipe.values
        assert again.resolved == recipe.resolved


def test_a_recipe_records_its_own_keys_and_what_decides_the_result() -> None:
    resolved = load("sft", None, BASE_KEYS).resolved
    assert {"overlength", "learning_rate", "temperature", "dtype", "seed", "output_dir"} <= resolved.keys()
    assert not {"against", "preview_rows", "run_name"} & resolved.keys()


def test_a_recipe_cannot_be_changed() -> None:
    recipe = load("sft", None, BASE_KEYS)
    with pytest.raises(TypeError):
        recipe.values["seed"] = 1  # type: ignore[index]
    recipe.resolved["seed"] = 1
    assert recipe.values["seed"] == recipe.resolved["seed"] == 42


def test_the_sections_have_the_values_of_the_keys(write: Write) -> None:
    recipe = load("filtered", write(recipe_for("filtered") + "pass_rate: [0.1, 0.9]\n"), {})
    assert recipe.selection.pass_rate == (0.1, 0.9)
    assert recipe.training.passed_through == {key: recipe.values[key] for key in PASSED_THROUGH if key in recipe.given}
    for section in SECTIONS:
        for key, value in vars(getattr(recipe, section)).items():
            if key != "passed_through":
                assert recipe.values[key] == (list(value) if isinstance(value, tuple) else value)


def test_the_command_line_that_a_run_shows_gives_the_same_recipe_again(write: Write) -> None:
    values = {
        "run_name": "null",
        "project": '"x"',
        "success_func": "",
        "report_to": ["wandb", "trackio"],
        "warmup_steps": 0.5,
    }
    path = write(BASE + "seed: 1\nlr_scheduler_kwargs: {a: [1, {b: null}]}\n")
    for recipe in (load("sft", path, values), load("sft", None, BASE_KEYS | values)):
        _, command, *tokens = shlex.split(recipe.command_line)
        again = parse(command, tokens)
        assert (again.values, again.given) == (recipe.values, recipe.given)
    assert "seed" not in load("sft", path, values).command_line


def test_names_of_python_objects_are_recorded(write: Write) -> None:
    objects = {"reward_funcs": ["m.f@0a1b2c3d"], "environment": "m.<lambda>", "dataset_name": "train_dataset@0a1b2c3d"}
    for recipe in (None, write(BASE), BASE_KEYS):
        named = load("filtered", recipe, {"model_name_or_path": "bcft:tiny-init"}, objects=objects)
        assert {key: named.resolved[key] for key in objects} == objects
        assert named.selection.reward_funcs == ("m.f@0a1b2c3d",)
        assert (named.environment.environment, named.data.dataset_name) == ("m.<lambda>", "train_dataset@0a1b2c3d")
    assert load("filtered", None, BASE_KEYS).resolved["reward_funcs"] is None


def test_the_command_line_leaves_out_python_objects_and_parses(write: Write) -> None:
    path = write(BASE + "reward_funcs: [m.f]\n")
    functions = {"reward_funcs": ["m.f@0a1b2c3d"]}
    named = load("filtered", path, {"seed": 7}, objects=functions | {"environment": "m.<lambda>"})
    assert named.python_objects == {"reward_funcs", "environment"}
    _, command, *tokens = shlex.split(named.command_line)
    assert tokens == [path, "seed=7"]
    assert parse(command, tokens).selection.reward_funcs == ("m.f",)
    named = load("filtered", path, {"environment": "m.C", "seed": 7}, objects=functions)
    assert named.command_line == f"bcft filtered {path} environment=m.C seed=7"


def test_importing_the_configuration_imports_no_framework() -> None:
    code = (
        "import sys, bcft.config.loader, bcft.config.reference\n"
        "assert not {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_recipe_of_the_repository_is_accepted_by_the_commands_it_is_for() -> None:
    """`filtered` takes no file in which the Trainer of `sft` saves: a recipe of rounds has a number of rounds."""
    played = 0
    for path in sorted((ROOT / "recipes").rglob("*.y*ml")):
        if "accelerate_configs" not in path.parts:
            of_rounds = "num_rounds" in load("preview", path, {}).given
            played += of_rounds
            for command in {*COMMANDS} - (set() if of_rounds else {"filtered"}):
                assert parse(command, [str(path)]).path == str(path)
    assert played > 10


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
    ("datasets: [{path: x}]", "datasets: dataset_name is given too: remove one of them"),
    ("completion_only_loss: true", "bcft makes and checks the labels"),
    ("packing: true", "packing: refused: this version does not pack"),
    ("hub_token: hf_abc", "set HF_TOKEN in the environment"),
    ("deepspeed: x.json", "accelerate launch --config_file"),
    ("use_vllm: true", "use_vllm: refused: give engine: vllm"),
    ("reward_args: x", "reward_args: wants a mapping {name: value}, not 'x'"),
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
    ("seed: 010", "seed: wants an integer >= 0 and < 4294967296, not '010'"),
    ("seed: 4294967296", "seed: wants an integer >= 0 and < 4294967296, not 4294967296"),
    ("seed: -1", "seed: wants an integer >= 0 and < 4294967296, not -1"),
    ("seed: 1000000000000", "not 1000000000000"),
    ("data_seed: 4294967296", "data_seed: wants an integer >= 0 and < 4294967296 or null, not 4294967296"),
    ("lr_scheduler_type: cosin", "lr_scheduler_type: wants one of linear, cosine, "),
    ("lr_scheduler_type: cosine_with_min_lrs", "did you mean cosine_with_min_lr?"),
    ("optim: adamw_torch_fusd", "did you mean adamw_torch_fused?"),
    ("report_to: wanb", "report_to: wants a list [a, b] or one of none, all, mlflow, "),
    ("report_to: wanb", "not 'wanb'; did you mean wandb?"),
    ("report_to: [wandb, tensorbord]", "not 'tensorbord'; did you mean tensorboard?"),
    ("report_to: WANDB", "not 'WANDB'; did you mean wandb?"),
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
    ("success_func: math reward", "wants a dotted path such as package.module.function, or the name of one of"),
    ("success_func: a.b:c", "wants a dotted path"),
    ("environment: GridWalk", "environment: wants a dotted path such as package.module.Class, not 'GridWalk'"),
    ("pass_rate: [0.9, 0.1]", "pass_rate: wants two numbers in [0, 1], the lower first, such as [0.1, 0.9], not [0.9,"),
    ("pass_rate: [0.1]", "pass_rate: wants two numbers in [0, 1]"),
    ("pass_rate: [0, 1.5]", "pass_rate: wants two numbers in [0, 1]"),
    ("keep_quantile: 1\nties: sample", "ties: sample with keep_quantile: 1 would keep nothing"),
    ("warmup_rounds: 10", "warmup_rounds: warm-up rounds leave none that trains"),
    ("output_dir: '\"runs/x\"'", "output_dir: begins with a quotation mark, '\"runs/x\"'"),
    ("output_dir: \u201cruns/x\u201d", "output_dir: begins with a quotation mark"),
    (
        "pad_token: x",
        "pad_token: refused: bcft does not use this field of TRL's SFTConfig; recipes/KEYS.md has the keys",
    ),
    ("vllm_group_port: 1", "refused: bcft does not use this field of TRL's GRPOConfig"),
    ("load_in_8bit: true", "load_in_8bit: refused: this version quantizes to 4 bit only"),
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
    (
        "gradient_checkpointing_kwargs: {use_reentrant: no}\ngradient_checkpointing: true",
        "'no' can be read in two ways here",
    ),
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
    (finding,) = findings(lambda: load("sft", path, {}))
    number = 4 if line.startswith(("bf16: true", "seed: 1\n", "keep_quantile: 1\n")) else 3
    assert finding.startswith(f"{path}:{number}: ")
    assert expected in finding


def test_no_finding_repeats_a_secret(write: Write) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    path = write(f"{BASE}run_name: {secret}\nseed: {secret}\nhub_token: {secret}\nhf_tokn: {secret}\n")
    assert secret not in "\n".join(findings(lambda: parse("sft", [path, "--project", secret])))


def test_both_lines_of_a_key_given_twice_are_named(write: Write) -> None:
    path = write(BASE + "seed: 1\nmax_steps: 1\nseed: 1\n")
    assert findings(lambda: load("sft", path, {})) == [f"{path}:5: seed: given twice, first at {path}:3"]


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
def test_a_file_that_is_not_a_recipe_is_one_finding(write: Write, content: bytes, line: int, expected: str) -> None:
    path = write(content)
    (finding,) = findings(lambda: load("sft", path, {}))
    assert finding.startswith(f"{path}:{line}: {expected}")
    assert len(finding) < 300 + len(path)


def test_every_unknown_key_of_a_file_is_a_finding(write: Write) -> None:
    path = write("".join(f"learning_{i}_rate: 1\n" for i in range(490)))
    assert len(findings(lambda: load("sft", path, {}))) == 492


def test_a_file_that_cannot_be_opened_is_one_finding(tmp_path: Path) -> None:
    assert findings(lambda: parse("sft", [str(tmp_path)])) == [f"{tmp_path}: a directory; give the recipe file in it"]
    assert findings(lambda: parse("sft", ["no/such.yaml"])) == ["no/such.yaml: no such recipe file"]
    assert "a key is given as --seed value" in findings(lambda: parse("sft", ["seed", "1"]))[-1]


@pytest.mark.parametrize("content", ["", "# nothing\n", "---\n", "{}", "null"])
def test_an_empty_recipe_lacks_its_required_keys(write: Write, content: str) -> None:
    lines = findings(lambda: load("sft", write(content), {}))
    assert lines[-1].endswith("dataset_name: required") or "lines of `key: value`" in lines[0]


def test_a_few_aliases_of_single_values_are_fine(write: Write) -> None:
    recipe = load("sft", write(BASE + "per_device_train_batch_size: &b 4\ngradient_accumulation_steps: *b\n"), {})
    assert recipe.values["gradient_accumulation_steps"] == 4


def test_a_byte_order_mark_and_windows_line_ends_are_fine(write: Write) -> None:
    assert load("sft", write(("\ufeff" + BASE + "seed: 3\n").replace("\n", "\r\n")), {}).values["seed"] == 3


# Command lines

BAD_TOKENS = [
    (["--learning_rte", "1"], "learning_rte: unknown key; did you mean learning_rate?"),
    (["--max_st", "1"], "max_st: unknown key"),
    (["--learning-rate", "1"], "did you mean learning_rate?"),
    (["-lr", "1"], "-lr: unknown key"),
    (["--seed"], "--seed: wants a value"),
    (["--seed", "--debug"], "--seed: wants a value"),
    (["--seed="], "seed: wants an integer >= 0 and < 4294967296, not ''"),
    (["--seed", "1", "seed=1"], "seed: given twice, first at command line"),
    (["--allow-drif"], "allow-drif: unknown key; did you mean --allow-drift?"),
    (["--debug=true"], "--debug: takes no value"),
    (["--html"], "--html: not a flag of bcft sft"),
    (["other.yaml"], "'other.yaml': one recipe is enough"),
    (["--config", "other.yaml"], "'other.yaml': one recipe is enough"),
    (["--config"], "--config: wants a value"),
    (["--use_peft", "ture"], "use_peft: wants true or false, not 'ture'"),
    (["--report_to", "wandb", "b"], "'b': one recipe is enough; keys are --key value or key=value, lists '[a, b]'"),
    (["--report_to", "[a"], "'[a' is not readable"),
    (["--against", "x"], "against: not used here; it is a key of bcft evaluate and filtered"),
    (["--preview_rows", "2"], "preview_rows: not used here; it is a key of bcft preview"),
    (["trainer.lr=1"], "trainer.lr: unknown key"),
    (["--"], "'': unknown key"),
    (["output_dir='runs/x"], 'output_dir: "\'runs/x" is not readable'),
    (["output_dir=\"'runs/x'\""], "output_dir: begins with a quotation mark"),
    (["--output_dir", "`runs/x`"], "output_dir: begins with a quotation mark"),
]


@pytest.mark.parametrize(("tokens", "expected"), BAD_TOKENS)
def test_a_bad_command_line_is_one_finding(write: Write, tokens: list[str], expected: str) -> None:
    (finding,) = findings(lambda: parse("sft", [write(BASE), *tokens]))
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
        assert parse("sft", tokens).values["use_peft"] is True


def test_a_file_may_hold_keys_of_other_commands(write: Write) -> None:
    recipe = load("sft", write(BASE + "against: x\npreview_rows: 9\n"), {})
    assert recipe.resolved["preview_rows"] == 9
    assert parse("evaluate", [recipe.path, "--against", "y", "--json"]).flags == {"json"}


def test_flags_are_not_keys(write: Write) -> None:
    recipe = parse("sft", ["--allow-drift", write(BASE), "--debug", "--quiet"])
    assert recipe.flags == {"allow-drift", "debug", "quiet"}
    assert recipe.given == BASE_KEYS.keys()


def test_the_output_directory_is_named_after_the_recipe() -> None:
    assert load("sft", None, BASE_KEYS).values["output_dir"] == "runs/sft"
    assert findings(lambda: load("sft", None, {}))[0] == "command line: model_name_or_path: required"


def test_the_output_directory_of_a_file_is_its_stem(write: Write) -> None:
    assert load("sft", write(BASE), {}).values["output_dir"] == "runs/recipe"


def test_python_can_give_paths_and_text_with_the_same_checks(tmp_path: Path) -> None:
    recipe = load("sft", None, BASE_KEYS | {"output_dir": tmp_path, "learning_rate": "1e-6", "seed": "7"})
    assert (recipe.values["output_dir"], recipe.values["learning_rate"], recipe.values["seed"]) == (
        str(tmp_path),
        1e-6,
        7,
    )
    for key, value in [
        ("seed", True),
        ("seed", 1.0),
        ("use_peft", 1),
        ("run_name", 3),
        ("learning_rate", float("nan")),
    ]:
        (line,) = findings(partial(load, "sft", None, BASE_KEYS | {key: value}))
        assert line.startswith(f"override: {key}: wants ")


def test_an_output_directory_from_python_does_not_begin_with_a_quotation_mark_either() -> None:
    (line,) = findings(lambda: load("sft", None, BASE_KEYS | {"output_dir": '"runs/x"'}))
    assert line.startswith("override: output_dir: begins with a quotation mark")


def test_success_func_may_be_empty_for_none(write: Write) -> None:
    assert parse("sft", [write(BASE), "--success_func="]).values["success_func"] == ""
    assert load("sft", write(BASE + "success_func: ''\n"), {}).values["success_func"] == ""


# Rules about several keys


def test_remote_code_needs_the_flag_and_a_pinned_revision(write: Write) -> None:
    pinned = BASE + f"trust_remote_code: true\nmodel_revision: {'a1' * 20}\n"
    assert parse("sft", [write(pinned), "--allow-remote-code"]).values["trust_remote_code"] is True
    assert "--allow-remote-code" in findings(lambda: parse("sft", [write(pinned)]))[0]
    unpinned = BASE + "trust_remote_code: true\nmodel_revision: main\n"
    assert "40 hex" in findings(lambda: parse("sft", [write(unpinned), "--allow-remote-code"]))[0]


def test_a_small_models_learning_rate_is_not_kept_for_another_model(write: Write) -> None:
    path = write(BASE + "learning_rate: 3e-3\n")
    other = ["--model_name_or_path", "meta-llama/Llama-3.2-3B-Instruct"]
    (finding,) = findings(lambda: parse("sft", [path, *other]))
    assert finding.startswith("command line: model_name_or_path: ")
    assert "recipes/llama-3.2-3b/bc_math.yaml" in finding
    assert parse("sft", [path, *other, "learning_rate=1e-5"]).values["learning_rate"] == 1e-5
    assert parse("sft", [path, "model_name_or_path=bcft:tiny-init"]).values["learning_rate"] == 3e-3
    assert parse("sft", [path, 'model_name_or_path="bcft:tiny-init"']).values["learning_rate"] == 3e-3


def test_a_small_models_recipe_may_evaluate_any_model(write: Write) -> None:
    assert parse("evaluate", [write(BASE), "--model_name_or_path", "runs/x"]).values["model_name_or_path"] == "runs/x"


def test_a_lora_recipe_may_be_run_without_its_adapter(write: Write) -> None:
    path = write(BASE + "use_peft: true\nlora_r: 8\n")
    assert parse("sft", [path, "--use_peft", "false"]).values["use_peft"] is False
