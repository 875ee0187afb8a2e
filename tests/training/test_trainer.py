"""The trainer: its loss is the token mean, its steps do not depend on micro-batches, and it stops when it should."""

import dataclasses
import signal
from pathlib import Path

import pytest
import torch
import yaml
from helpers.tiny import llama_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from trl import SFTConfig

from bcft.config.declare import LIBRARY
from bcft.config.keys import KEYS, PASSED_THROUGH
from bcft.config.loader import load
from bcft.config.schema import TrainingSettings
from bcft.errors import DivergedError, Preempted
from bcft.runs.progress import Progress
from bcft.training.trainer import BCTrainer, fit, newest_checkpoint, to_dataset, training_arguments
from bcft.types import IGNORED, TrainingExample

VOCABULARY = 40
RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def tokenizer():
    return llama_tokenizer(["a b c"])


def model(*, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.2, attention_dropout=dropout,
            pad_token_id=0,
        )
    )  # fmt: skip


def examples(n=8, seed=3):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(n):
        prompt, completion = (int(torch.randint(1, 12, (1,), generator=generator)) for _ in range(2))
        ids = torch.randint(6, VOCABULARY, (prompt + completion,), generator=generator).tolist()
        labels = (*[IGNORED] * prompt, *ids[prompt:])
        made.append(TrainingExample(f"demonstration-{index}", f"p{index}", tuple(ids), labels))
    return made


def settings_of(**fields):
    """Return training settings; the Trainer's own fields go to `passed_through`, as in a recipe."""
    through = {name: fields.pop(name) for name in tuple(fields) if name in PASSED_THROUGH}
    return TrainingSettings(**fields, passed_through=through)


def trainer(network, directory, tokenizer, *, given=None, **fields):
    settings = settings_of(
        **{
            "learning_rate": 0.1, "optim": "sgd", "max_steps": 1, "per_device_train_batch_size": 4, "seed": 0,
            "report_to": "none", "save_strategy": "no", "gradient_checkpointing": False, "logging_steps": 1,
            "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant",
        }
        | fields
    )  # fmt: skip
    arguments = training_arguments(settings, output_dir=directory, autocast="no", use_cpu=True)
    return BCTrainer(network, arguments, examples=given or examples(), tokenizer=tokenizer)


def example_loss(network, example):
    """Return the summed negative log-likelihood of the supervised tokens, by the definition, and their number."""
    with torch.no_grad():
        scores = network(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
    picked = [scores[i - 1, label] for i, label in enumerate(example.labels) if label != IGNORED and i > 0]
    return -float(sum(picked)), len(picked)


def test_steps_are_counted_with_their_loss_and_the_trainer_forgets_who_counted(tmp_path, tokenizer):
    made = trainer(model(), tmp_path, tokenizer, max_steps=3)
    callbacks = list(made.callback_handler.callbacks)
    progress = Progress("train")
    fitted = fit(made, examples(), progress=progress)
    assert (progress.total, progress.done, progress.unit) == (3, 3, "steps")
    assert progress.note == f"loss {fitted.loss_last:.4f}"
    assert made.callback_handler.callbacks == callbacks


@pytest.mark.parametrize("multiple", [None, 8, 64])
def test_a_batch_loss_is_the_token_weighted_mean_of_its_rows_under_any_padding(tmp_path, tokenizer, multiple):
    network = model().eval()
    given = examples()
    made = trainer(network, tmp_path, tokenizer, given=given, pad_to_multiple_of=multiple)
    batch = made.data_collator([dict(columns) for columns in to_dataset(given)])
    assert multiple is None or batch["input_ids"].shape[1] % multiple == 0
    network.eval()
    losses, counts = zip(*(example_loss(network, example) for example in given), strict=True)
    assert made.compute_loss(network, batch).item() == pytest.approx(sum(losses) / sum(counts), rel=1e-5)


def test_four_rows_at_once_and_four_times_one_row_make_the_same_step(tmp_path, tokenizer):
    """Gradient accumulation was normalized per micro-batch in transformers before 4.46 (issue 34191)."""
    given = examples(4)
    assert len({example.supervised for example in given}) > 1
    weights = []
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        network = model()
        made = trainer(
            network, tmp_path, tokenizer, given=given, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        made.train()
        weights.append([p.detach().clone() for p in network.parameters()])
    for other in weights[1:]:
        for a, b in zip(weights[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def mixture():
    """Return a mixture of experts whose router has a loss of its own."""
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, num_local_experts=4, router_aux_loss_coef=0.5,
            pad_token_id=0,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "fields"),
    [(model, {}), (model, {"label_smoothing_factor": 0.1}), (model, {"neftune_noise_alpha": 5.0}), (mixture, {})],
    ids=["plain", "label smoothing", "NEFTune", "mixture of experts"],
)
def test_packed_rows_make_the_same_step_and_the_same_figures(tmp_path, tokenizer, monkeypatch, make, fields):
    monkeypatch.setattr("bcft.training.lean.GROUP_TOKENS", 24)
    system = (7, 8, 9)
    given = [
        dataclasses.replace(e, input_ids=(*system, *e.input_ids), labels=(*[IGNORED] * len(system), *e.labels))
        for e in examples(8)
    ]
    results = []
    for lean in (False, True):
        monkeypatch.setattr("bcft.policy.cpu.is_large", lambda _, lean=lean: lean)
        made = trainer(
            make(), tmp_path, tokenizer, given=given, per_device_train_batch_size=4, max_steps=2, **fields
        )  # fmt: skip
        fitted = fit(made, given)
        names = ("loss", "entropy", "mean_token_accuracy", "num_tokens")
        logged = [[entry[name] for name in names] for entry in made.state.log_history if "entropy" in entry]
        results.append((made.model.state_dict(), logged, fitted.loss))
    plain, grouped = results
    for name, weight in plain[0].items():
        torch.testing.assert_close(grouped[0][name], weight, rtol=1e-5, atol=1e-6)
    assert len(plain[1]) == 2
    for expected, got in zip(plain[1], grouped[1], strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


def test_training_follows_the_definition_of_gradient_descent(tmp_path, tokenizer):
    """One SGD step by hand, on the token mean over the batch, gives the trainer's weights."""
    given = examples(4)
    by_hand, network = model(), model()
    trainer(network, tmp_path, tokenizer, given=given).train()
    losses = []
    for example in given:
        scores = by_hand(torch.tensor([example.input_ids])).logits[0].log_softmax(-1)
        losses += [-scores[i - 1, label] for i, label in enumerate(example.labels) if label != IGNORED and i > 0]
    torch.stack(losses).mean().backward()
    for ours, theirs in zip(by_hand.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours - 0.1 * ours.grad, theirs, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_reaches_the_weights(tmp_path, tokenizer):
    network = model()
    with torch.no_grad():
        network.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    others = {name: p.detach().clone() for name, p in network.named_parameters()}
    made = trainer(network, tmp_path, tokenizer, max_steps=5, save_strategy="steps", save_steps=1)
    with pytest.raises(DivergedError, match="step 1: the loss is not finite"):
        fit(made, examples())
    assert all(torch.equal(p, others[n]) for n, p in network.named_parameters() if "layers.0.mlp.up" not in n)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert DivergedError.exit_code == 5


def test_a_run_that_changes_no_weight_is_an_error(tmp_path, tokenizer):
    with pytest.raises(DivergedError, match="changed no weight"):
        fit(trainer(model(), tmp_path, tokenizer, learning_rate=1e-30), examples())


def test_a_resumed_run_ends_in_the_same_weights_bit_for_bit(tmp_path, tokenizer):
    fields = {
        "max_steps": 9, "save_strategy": "steps", "save_steps": 4, "save_total_limit": 1,
        "optim": "adamw_torch", "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine", "train_sampling_strategy": "random", "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
    }  # fmt: skip
    given = examples(7)
    whole = model(dropout=0.1)
    fit(trainer(whole, tmp_path / "whole", tokenizer, given=given, **fields), given)

    class Power(Exception):  # noqa: N818
        pass

    def fail_at_six(*_):
        if made.state.global_step == 6:
            raise Power

    made = trainer(model(dropout=0.1), tmp_path / "killed", tokenizer, given=given, **fields)
    made.callback_handler.callbacks[-1].on_step_begin = lambda *_, **__: fail_at_six()
    with pytest.raises(Power):
        fit(made, given)
    checkpoint = newest_checkpoint(tmp_path / "killed")
    assert checkpoint.endswith("checkpoint-4")
    resumed = model(dropout=0.1)
    fit(trainer(resumed, tmp_path / "killed", tokenizer, given=given, **fields), given, resume=checkpoint)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_killed_after_its_last_checkpoint_takes_no_further_step(tmp_path, tokenizer):
    """The Trainer itself takes one: it compares the step count only after a step."""
    fields = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    whole = model()
    fit(trainer(whole, tmp_path, tokenizer, **fields), examples())
    again = model()
    fitted = fit(trainer(again, tmp_path, tokenizer, **fields), examples(), resume=newest_checkpoint(tmp_path))
    assert fitted.steps == 3
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("damage", ["torn", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_an_older_whole_one(tmp_path, tokenizer, damage):
    made = trainer(model(), tmp_path, tokenizer, max_steps=4, save_strategy="steps", save_steps=2)
    fit(made, examples())
    newest = tmp_path / "checkpoint-4"
    if damage == "torn":
        file = newest / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-8])
    else:
        (newest / {"missing": "optimizer.pt", "no manifest": "manifest.json"}[damage]).unlink()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_signal_ends_the_step_saves_and_says_how_to_resume(tmp_path, tokenizer):
    made = trainer(model(), tmp_path, tokenizer, max_steps=50, save_strategy="steps", save_steps=40)

    def interrupt(*_, **__):
        if made.state.global_step == 3:
            signal.raise_signal(signal.SIGTERM)

    made.callback_handler.callbacks[0].on_step_begin = interrupt
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted, match="stopped and saved at step 4; re-run the same command to resume"):
        fit(made, examples())
    assert newest_checkpoint(tmp_path).endswith("checkpoint-4")
    assert signal.getsignal(signal.SIGTERM) is before
    assert Preempted.exit_code == 75


# The Trainer's configuration

EVERY_RECIPE = [
    pytest.param(command, path, id=f"{command} {path.relative_to(RECIPES)}")
    for command in ("sft", "filtered")
    for path in sorted(RECIPES.rglob("*.yaml"))
    if all(command in KEYS[key].commands for key in yaml.safe_load(path.read_text()) if KEYS[key].section == "training")
]
DECIDED = {
    "output_dir", "bf16", "fp16", "use_cpu", "logging_nan_inf_filter", "logging_first_step", "max_length",
    "chat_template_path", "eos_token", "dataset_kwargs", "report_to", "hub_private_repo",
}  # fmt: skip
"""The fields that the package decides itself; tests below say what for."""


def arguments_of(settings, **overrides):
    return training_arguments(settings, output_dir=Path("out"), autocast="no", use_cpu=True, **overrides)


def from_every_value(values, **overrides):
    """Return the configuration made from a value for every field: the recipe's, else the library's default."""
    every = {name: row["default"] for name, row in LIBRARY["SFTConfig"].items()}
    every |= {name: value for name, value in values.items() if name in every}
    if values["logging_steps"] is None:
        every["logging_steps"] = 10
    return SFTConfig(
        **{name: value for name, value in (every | overrides).items() if name not in DECIDED}, use_cpu=True
    )


@pytest.mark.parametrize(("command", "path"), EVERY_RECIPE)
@pytest.mark.parametrize(
    "overrides",
    [{}, {"disable_tqdm": True, "save_strategy": "no", "eval_strategy": "no", "logging_steps": 1}],
    ids=["once", "rounds"],
)
def test_every_recipe_gives_the_configuration_of_all_its_values(command, path, overrides):
    """What the sections leave out is what TRL's defaults say: nothing of a recipe is lost on its way."""
    config = load(command, path, {})
    arguments = arguments_of(config.training, **overrides).to_dict()
    expected = from_every_value(config.values, **overrides).to_dict()
    assert arguments.keys() == expected.keys()
    assert {name for name in arguments if arguments[name] != expected[name]} <= DECIDED
    assert arguments["learning_rate"] == config.values["learning_rate"]
    assert overrides or arguments["logging_steps"] == (config.training.logging_steps or 10)


def test_the_run_decides_where_and_on_what_hardware_it_trains(tmp_path):
    for use_cpu in (True, False):
        made = training_arguments(
            TrainingSettings(), output_dir=tmp_path, autocast="no", use_cpu=use_cpu, bf16=True, fp16=True
        )
        assert (made.output_dir, made.bf16, made.fp16, made.use_cpu) == (str(tmp_path), False, False, use_cpu)


def test_trl_trains_on_the_ids_as_they_are(tmp_path, tokenizer):
    """It would cut rows at 1,024 tokens, set another EOS token and tokenize text again."""
    ids = tuple(range(6, VOCABULARY)) * 40
    long = TrainingExample("demonstration-0", "p", ids, (IGNORED, *ids[1:]))
    assert len(ids) > 1024
    template, eos = tokenizer.chat_template, tokenizer.eos_token
    made = trainer(model(), tmp_path, tokenizer, given=[long])
    assert [list(row.items()) for row in made.train_dataset] == [
        [("input_ids", list(ids)), ("labels", [IGNORED, *ids[1:]])]
    ]
    batch = made.data_collator([dict(row) for row in made.train_dataset])
    assert (batch["input_ids"].tolist(), batch["labels"].tolist()) == ([list(ids)], [[IGNORED, *ids[1:]]])
    assert (made.processing_class.chat_template, made.processing_class.eos_token) == (template, eos)


def test_the_first_step_is_logged_whatever_logging_steps_is(tmp_path, tokenizer):
    fitted = fit(trainer(model(), tmp_path / "rare", tokenizer, max_steps=3, logging_steps=3), examples())
    every = fit(trainer(model(), tmp_path / "all", tokenizer, max_steps=3), examples())
    assert fitted.loss_first == every.loss_first != 0.0


def test_a_logged_loss_that_is_not_finite_is_not_replaced_by_the_one_before():
    assert arguments_of(TrainingSettings()).logging_nan_inf_filter is False


def test_keys_that_are_passed_through_reach_the_trainer():
    through = {
        "per_device_eval_batch_size": 3, "ddp_timeout": 77, "save_steps": 7, "adam_epsilon": 1e-6,
        "neftune_noise_alpha": 5.0, "run_name": "x", "lr_scheduler_kwargs": {"num_cycles": 2}, "save_total_limit": 1,
    }  # fmt: skip
    assert through.keys() <= PASSED_THROUGH.keys()
    settings = TrainingSettings(passed_through=through)
    arguments = training_arguments(settings, output_dir=Path("out"), autocast="no", use_cpu=True)
    assert {name: getattr(arguments, name) for name in through} == through


@pytest.mark.parametrize(("autocast", "bf16", "fp16"), [("no", False, False), ("bf16", True, False)])
def test_precision_comes_from_the_policy_and_not_from_trls_default(autocast, bf16, fp16):
    arguments = training_arguments(TrainingSettings(), output_dir=Path("out"), autocast=autocast, use_cpu=True)
    assert (arguments.bf16, arguments.fp16) == (bf16, fp16)
