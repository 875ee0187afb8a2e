"""Every setting: typed, frozen sections whose fields carry their type, default, limits and meaning.

A recipe is flat; the sections only say which stage reads a key, and `commands` which command. The sections declare the
fields of TRL and transformers that bcft reads, `keys.PASSED_THROUGH` lists those that go to the Trainer as they are,
and every other one is refused. `recipes/KEYS.md` is made from them. The sections of rounds are in `rounds`, that of
engines is in `engine`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from bcft.config.declare import (
    PLAYING,
    SPLITTING,
    TRAINING,
    Conflict,
    Settings,
    library,
    own,
)
from bcft.config.engine import EngineSettings
from bcft.config.mixture import mixture_faults
from bcft.config.rounds import (
    EvaluationSettings,
    RoundSettings,
    RuleSettings,
    SelectionSettings,
    of_rounds,
)
from bcft.config.sharing import SharingSettings
from bcft.types import Sampling

__all__ = [
    "REQUIRED",
    "SECTIONS",
    "SEEDS",
    "DataSettings",
    "EngineSettings",
    "EnvironmentSettings",
    "EvaluationSettings",
    "ModelSettings",
    "RoundSettings",
    "RuleSettings",
    "SamplingSettings",
    "SelectionSettings",
    "SharingSettings",
    "TrainingSettings",
]

REQUIRED = ("model_name_or_path", "dataset_name")
SEEDS = ">= 0 and < 4294967296"
"""What numpy takes; torch takes more."""
trained = partial(library, commands=TRAINING)
played = partial(library, commands=PLAYING)
of_rows = partial(library, commands=SPLITTING)


@dataclass(frozen=True)
class ModelSettings(Settings):
    """The policy: its weights, its precision and its adapter."""

    model_name_or_path: str = library(
        "model_name_or_path",
        default="",
        note="a Hub id, a directory, a .gguf file, package:NAME/FILE.gguf, a file inside an installed package, or "
        "bcft:tiny-math, which is embedded",
    )
    model_revision: str = of_rows("model_revision")
    gguf_file: str | None = own(
        None,
        "a GGUF file in the directory or repository that model_name_or_path names, such as model.Q4_1.gguf; its "
        "weights are dequantized, and an ordinary model is saved",
        commands=SPLITTING,
    )
    trust_remote_code: bool = of_rows("trust_remote_code")
    attn_implementation: str | None = played("attn_implementation")
    chat_template_path: str | None = of_rows("chat_template_path")
    chat_template_kwargs: Mapping[str, Any] = own(
        {},
        "arguments of the chat template, such as {enable_thinking: false}; a row's column of that name adds to them",
        commands=SPLITTING,
    )
    eos_token: str | None = of_rows("eos_token")
    dtype: str = played("dtype", default="auto", note="auto: from model and hardware; TRL's own default is float32")
    bf16: bool | None = played("bf16")
    fp16: bool | None = played("fp16", default=None, note="null: chosen from the hardware")
    use_cpu: bool = played("use_cpu")
    load_in_4bit: bool = played("load_in_4bit")
    bnb_4bit_quant_type: str = played("bnb_4bit_quant_type")
    use_bnb_nested_quant: bool = played("use_bnb_nested_quant")
    use_peft: bool = played("use_peft")
    lora_r: int = trained("lora_r", note="the adapter's rank; higher trains more weights", limits=">= 1")
    lora_alpha: int = trained("lora_alpha", note="higher scales the adapter up: by lora_alpha / lora_r", limits=">= 1")
    lora_dropout: float = trained("lora_dropout", note="higher regularizes more", limits=">= 0 and < 1")
    lora_target_modules: tuple[str, ...] | None = trained("lora_target_modules")
    lora_modules_to_save: tuple[str, ...] | None = trained("lora_modules_to_save")
    use_rslora: bool = trained("use_rslora")
    use_dora: bool = trained("use_dora")

    def conflicts(self) -> Iterator[Conflict]:
        """Yield bf16 and fp16 in one run, what `gguf_file` cannot be, and 4-bit weights of a GGUF file."""
        if self.bf16 and self.fp16:
            yield ("fp16", "bf16"), "bf16 is on too; a run has one precision"
        name, file = self.model_name_or_path, self.gguf_file
        if file and (name.endswith(".gguf") or name.startswith("bcft:")):
            yield ("gguf_file",), f"has no effect: {name} is no directory or Hub id that has a GGUF file: leave it out"
        elif file and (not file.endswith(".gguf") or file.startswith("/") or ".." in file.split("/")):
            yield ("gguf_file",), f"wants a file in {name or 'model_name_or_path'}, such as model.Q4_1.gguf, not {file}"
        if self.load_in_4bit and (file or name.endswith(".gguf")):
            yield (
                ("load_in_4bit",),
                "the weights of a GGUF file are dequantized: save them as an ordinary model first, or leave it out",
            )


@dataclass(frozen=True)
class DataSettings(Settings):
    """The source of problems and demonstrations, and the rules that make examples of them."""

    dataset_name: str = library(
        "dataset_name",
        default="",
        note="a Hub id; a file, or several, as a.jsonl,b.jsonl or data/*.parquet; a directory of files or one that "
        "save_to_disk wrote; module:function, which returns rows; reasoning-gym:NAME, a generator of the package "
        "reasoning-gym; or bcft:arithmetic, which is embedded",
    )
    datasets: tuple[Mapping[str, Any], ...] | None = own(
        None,
        "a mixture in place of dataset_name, as TRL has it: a list of {path, name, data_dir, data_files, split, "
        "columns, fraction}; path is named like dataset_name, or json, csv or parquet for data_files; with fractions, "
        "the first rows of each, as many as give those shares; held-out problems are chosen by hash",
        commands=SPLITTING,
    )
    dataset_config: str | None = of_rows("dataset_config")
    dataset_train_split: str = of_rows("dataset_train_split")
    dataset_test_split: str | None = of_rows(
        "dataset_test_split",
        default=None,
        note="null: `test` if the dataset has it, else a share of the problems by the hash of their text",
    )
    dataset_args: Mapping[str, Any] = own(
        {},
        "arguments of module:function; configuration of a reasoning-gym generator, such as {max_terms: 3, max_digits: "
        "2, seed: 0}; of "
        "reasoning-gym:composite {datasets: [{name: chain_sum, weight: 1, config: {max_terms: 3}}]}",
        commands=SPLITTING,
    )
    answer_format: Literal["text", "number", "tag", "hash", "boxed"] = own(
        "text",
        "where a reply states its answer to a reasoning-gym problem. text: the whole reply; number: its last number; "
        "tag: in <answer></answer>; hash: after the last ####; boxed: in the last \\boxed{}",
        commands=SPLITTING,
    )
    prompt_suffix: str | None = own(
        None,
        "what a reasoning-gym prompt ends with, after a blank line; null: a sentence that asks for answer_format, "
        "for text nothing; '': nothing",
        commands=SPLITTING,
    )
    dataset_format: Literal["trl", "sharegpt", "alpaca", "math", "lines"] = own(
        "trl",
        "the columns of a row. trl: prompt and completion, messages, or question and answer, and tools beside them; "
        "sharegpt: conversations of {from, value}; alpaca: instruction, input, output; math: problem, solution; lines: "
        "conversation, a list of texts, each a question of the policy's and, behind its question mark, the reply",
        commands=SPLITTING,
    )
    prompt_column: str | None = own(
        None,
        "the column to read as prompt; in lines the one that names the problem, which the policy does not read",
        commands=SPLITTING,
    )
    completion_column: str | None = own(None, "the column to read as completion", commands=SPLITTING)
    answer_column: str | None = own(
        None, "the column to read as answer, the reference that grades attempts", commands=SPLITTING
    )
    system_prompt: str | None = own(
        None,
        "a system message to begin every prompt with; refused where a row has one or the chat template takes none; in "
        "lines the user's first message, which the policy asks behind; an environment with a first message of its own "
        "gives a system message itself",
        commands=SPLITTING,
    )
    max_length: int | None = library(
        "max_length",
        note="in tokens; longer examples are dropped or refused, never truncated; higher needs more memory; null: no "
        "limit",
        commands=("sft", "filtered", "preview"),
        limits=">= 2",
    )
    overlength: Literal["drop", "raise"] = own(
        "drop",
        "for examples longer than max_length: drop and count them, or raise an error",
        commands=("sft", "preview"),
    )
    special_tokens: Literal["raise", "strip", "text"] = own(
        "raise",
        "for a completion that ends in the letters of its stop token, and a prompt that a chat template has rendered "
        "already: raise an error; strip: take the letters off completions; text: train them as plain text",
        commands=SPLITTING,
    )
    train_on: Literal["all_turns", "last_turn", "marked"] = own(
        "all_turns",
        "which of a conversation's assistant turns carry loss. marked: those whose message has train: true or weight: "
        "1, and where none has, those without train: false or weight: 0; for demonstrations",
        commands=("sft", "filtered", "collect", "refilter", "preview"),
    )
    allow_overlap: bool = own(False, "train even if held-out prompts are also in training", commands=SPLITTING)
    replay_dataset: str | None = of_rounds(
        None,
        "demonstrations to train on beside the kept trajectories, at most as many, drawn anew each round; named like "
        "dataset_name; its rows are those of dataset_train_split, the slice included, without held-out problems; "
        "dataset_config applies only if it is dataset_name itself",
    )
    preview_rows: int = own(3, "how many rows are shown", commands=("preview",), limits=">= 1")

    def conflicts(self) -> Iterator[Conflict]:
        """Yield what a mixture cannot be, columns that `dataset_format` names itself, and what it needs."""
        if self.datasets is not None:
            if self.dataset_name:
                yield ("datasets", "dataset_name"), "dataset_name is given too: remove one of them"
            for key in ("dataset_config", "dataset_test_split"):
                if getattr(self, key) is not None:
                    yield (key,), "has no effect with datasets: each has its own name and split"
            if self.dataset_train_split != "train":
                yield ("dataset_train_split",), "has no effect with datasets: give each its split"
            yield from ((("datasets",), reason) for reason in mixture_faults(self.datasets))
        form, own_columns = self.dataset_format, "names its own columns: leave it out, or give dataset_format: trl"
        if self.prompt_column is not None and form in ("alpaca", "math"):
            yield ("prompt_column", "dataset_format"), f"dataset_format: {form} {own_columns}"
        if self.completion_column is not None and form != "trl":
            yield ("completion_column", "dataset_format"), f"dataset_format: {form} {own_columns}"
        if form == "lines" and self.prompt_column is None:
            yield ("dataset_format",), "lines needs prompt_column, the column that names the problem, such as word"
        if form == "lines" and self.system_prompt is None:
            yield ("dataset_format",), "lines needs system_prompt, what the policy reads before its first question"
        if self.system_prompt is not None and not self.system_prompt.strip():
            yield ("system_prompt",), "is empty: leave it out"

    @property
    def source_name(self) -> str:
        """The dataset's name; of a mixture the names of its parts."""
        return self.dataset_name or " + ".join(str(part["path"]) for part in self.datasets or ())


@dataclass(frozen=True)
class SamplingSettings(Settings):
    """How the policy is sampled, in rollouts and in evaluations."""

    temperature: float = played("temperature", note="higher makes samples more varied", limits="> 0")
    top_k: int = played("top_k", note="0: off; lower allows fewer tokens", limits=">= 0")
    top_p: float = played("top_p", note="1: off; lower allows fewer tokens", limits="> 0 and <= 1")
    min_p: float = played("min_p", default=0.0, note="0: off; higher allows fewer tokens", limits=">= 0 and < 1")
    repetition_penalty: float = played("repetition_penalty", note="1: off; higher repeats less", limits="> 0")
    max_completion_length: int = played(
        "max_completion_length",
        note="in tokens, of every sampled completion; higher truncates fewer and takes longer",
        limits=">= 1",
    )
    num_generations: int = library(
        "num_generations",
        note="sampled attempts at each problem of a round; more give more to select from",
        commands=("filtered", "collect"),
        limits=">= 1",
    )

    @property
    def parameters(self) -> Sampling:
        """The parameters of the next token's distribution."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)


@dataclass(frozen=True)
class EnvironmentSettings(Settings):
    """The environment that the policy acts in; without one, an attempt is one prompt and one completion."""

    environment: str | None = own(
        None,
        "dotted path of an environment's factory, such as bcft.environments.grid_walk.GridWalk; null: one prompt, one "
        "completion",
        commands=PLAYING,
    )
    environment_args: Mapping[str, Any] = own({}, "the factory's keyword arguments", commands=PLAYING)
    max_turns: int = own(
        20,
        "most turns of an attempt; higher allows longer attempts; reaching it is a low return, not a truncation",
        commands=PLAYING,
        limits=">= 1",
    )
    step_timeout: float = own(
        60.0,
        "seconds an environment may take for a step; then the attempt ends as an error; higher waits longer",
        commands=PLAYING,
        limits="> 0",
    )


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """The Trainer: the fields that bcft reads, and those that it passes through unchanged."""

    output_dir: str = library("output_dir", default="", note="left out: runs/ and the recipe's name")
    seed: int = library("seed", limits=SEEDS)
    learning_rate: float = trained("learning_rate", note="higher changes the weights more", limits="> 0")
    lr_scheduler_type: str = trained("lr_scheduler_type")
    warmup_steps: float = trained(
        "warmup_steps", note="below 1: a share of all steps; more start more gently", limits=">= 0"
    )
    optim: str = trained("optim")
    weight_decay: float = trained("weight_decay", note="higher pulls weights harder toward 0", limits=">= 0")
    max_grad_norm: float = trained("max_grad_norm", note="lower clips more; 0: off", limits=">= 0")
    loss_type: str = trained("loss_type")
    loss_reduction: Literal["token", "sequence", "sum"] = own(
        "token",
        "how a step's loss is made of the negative log-likelihoods of its supervised tokens, each times its row's "
        "weight. token: their sum, divided by the number of tokens; sequence: the mean over rows of each row's mean; "
        "sum: their sum, so that a row of weight 2 is that row twice, and learning_rate and max_grad_norm are those "
        "of a sum",
        commands=(*TRAINING, "preview"),
    )
    num_train_epochs: float = trained(
        "num_train_epochs", note="in `filtered`, of each round; more fit the examples closer", limits="> 0"
    )
    max_steps: int = trained(
        "max_steps", note="-1: as many as num_train_epochs takes; more train longer", limits=">= -1"
    )
    per_device_train_batch_size: int = trained(
        "per_device_train_batch_size", note="higher needs more memory", limits=">= 1"
    )
    gradient_accumulation_steps: int = trained(
        "gradient_accumulation_steps", note="higher makes the batch larger without more memory", limits=">= 1"
    )
    gradient_checkpointing: bool = trained(
        "gradient_checkpointing", default=False, note="off, unlike in TRL: small models do not need it"
    )
    dataloader_drop_last: bool = trained("dataloader_drop_last")
    eval_strategy: str = library("eval_strategy", commands=("sft",))
    logging_steps: float | None = trained(
        "logging_steps",
        default=None,
        note="higher logs less often; null: 10, as in TRL, and in `filtered` every step",
        limits="> 0",
    )
    passed_through: Mapping[str, Any] = field(default_factory=dict)
    """The keys of `keys.PASSED_THROUGH` that the recipe sets, with their values."""

    def conflicts(self) -> Iterator[Conflict]:
        """Yield reductions that a loss or a way to average over processes does not have."""
        key, given = "loss_reduction", self.passed_through
        if self.loss_reduction == "sequence" and self.loss_type != "nll":
            yield (key, "loss_type"), f"sequence is a mean of log-likelihoods, and loss_type: {self.loss_type} has none"
        if self.loss_reduction == "sequence" and given.get("label_smoothing_factor"):
            yield (key, "label_smoothing_factor"), "sequence has no label smoothing: leave label_smoothing_factor out"
        if self.loss_reduction != "token" and given.get("average_tokens_across_devices") is False:
            other = "average_tokens_across_devices"
            yield (key, other), f"{self.loss_reduction} is over all processes: leave {other} out"


SECTIONS = {
    "model": ModelSettings,
    "data": DataSettings,
    "sampling": SamplingSettings,
    "engine": EngineSettings,
    "environment": EnvironmentSettings,
    "selection": SelectionSettings,
    "rounds": RoundSettings,
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
    "sharing": SharingSettings,
}
"""Section of `Config` -> its class."""
