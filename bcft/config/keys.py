"""Commands, flags and keys, which are derived from the fields of `schema`; and the names that are refused."""

import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, NamedTuple

from bcft.config.declare import ALL, GRADING, LIBRARY_FIELDS, TRAINING
from bcft.config.schema import SECTIONS, SEEDS


class Command(NamedTuple):
    """One command, for `--help`."""

    summary: str
    example: str


COMMANDS = {
    "sft": Command(
        "Plain behavior cloning: one run on prompt/completion pairs, loss on the completion only,\n"
        "the model is evaluated on held-out problems before and after.",
        "bcft sft recipes/bc_math.yaml --learning_rate 1e-4 seed=1",
    ),
    "filtered": Command(
        "Filtered behavior cloning: rounds of roll out, score, select, train and evaluate, on the policy's own\n"
        "trajectories.",
        "bcft filtered recipes/filtered_bc.yaml --num_rounds 6 keep_quantile=0.8",
    ),
    "evaluate": Command(
        "Success of a model, an adapter or a run on held-out problems; with --against, paired against another.",
        "bcft evaluate recipes/bc_math.yaml --model_name_or_path runs/bc_math --against bcft:tiny-math",
    ),
    "collect": Command(
        "Roll out a policy or a stronger teacher, score its trajectories and keep the best as demonstrations.",
        "bcft collect recipes/filtered_bc.yaml --model_name_or_path runs/bc_math --prompts_per_round 200",
    ),
    "refilter": Command(
        "Score and select saved rollouts again, with other rewards or another rule, without generating anything.",
        "bcft refilter recipes/filtered_bc.yaml --rollouts runs/filtered_bc --keep_quantile 0.5",
    ),
    "preview": Command(
        "Show, for the first rows of a recipe, exactly which tokens carry loss.",
        "bcft preview recipes/bc_math.yaml --preview_rows 5",
    ),
}


ON_DIRECTORIES = {
    "export": "Write a run as one ordinary model directory, or its trajectories as a dataset: bcft export DIR.",
    "report": "Draw a run again, or two side by side, as one self-contained HTML page: bcft report DIR [DIR].",
}
"""Commands that take directories in place of a recipe, and what they do."""


class Flag(NamedTuple):
    """A switch of the command line; never a key of a recipe."""

    commands: tuple[str, ...]
    meaning: str


FLAGS = {
    "dry-run": Flag(("sft", "filtered"), "print rows, steps, evaluation and memory of the run; train nothing"),
    "json": Flag(("evaluate", "preview"), "print JSON"),
    "html": Flag(("preview",), "print one self-contained HTML page"),
    "quiet": Flag(GRADING, "print the conclusion only"),
    "debug": Flag(ALL, "show the traceback of an error"),
    "allow-drift": Flag(("sft", "filtered", "collect"), "resume with another recipe, other data or other versions"),
    "allow-remote-code": Flag(ALL, "allow `trust_remote_code: true`, with a pinned model_revision"),
}

_WITHOUT_LIMITS = (
    "accelerator_config", "activation_offloading", "average_tokens_across_devices",
    "dataloader_multiprocessing_context", "dataloader_persistent_workers", "dataloader_pin_memory",
    "dataloader_prefetch_factor", "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters", "ddp_static_graph", "eval_on_start", "full_determinism",
    "gradient_checkpointing_kwargs", "include_num_input_tokens_seen", "log_level", "log_level_replica",
    "log_on_each_node", "logging_strategy", "lr_scheduler_kwargs", "optim_args",
    "optim_target_modules", "pad_to_multiple_of", "project", "report_to", "router_aux_loss_coef", "run_name",
    "save_on_each_node", "save_strategy", "skip_memory_metrics", "tf32", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id",
    "train_sampling_strategy",
)  # fmt: skip
PASSED_THROUGH = {
    "per_device_eval_batch_size": ">= 1",
    "save_total_limit": ">= 1",
    "ddp_timeout": ">= 1",
    "torch_empty_cache_steps": ">= 1",
    "save_steps": "> 0",
    "eval_steps": "> 0",
    "adam_epsilon": "> 0",
    "adam_beta1": ">= 0 and < 1",
    "adam_beta2": ">= 0 and < 1",
    "label_smoothing_factor": ">= 0 and < 1",
    "data_seed": SEEDS,
    "dataloader_num_workers": ">= 0",
    "neftune_noise_alpha": ">= 0",
    "eval_delay": ">= 0",
    **dict.fromkeys(_WITHOUT_LIMITS, ""),
}
"""SFTConfig's fields that go to the Trainer as they are -> the limits of their numbers."""
TRACKERS = ("mlflow", "tensorboard", "trackio", "wandb")
"""What a run can report to."""
_CHOICES = {
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "pad_to_multiple_of": ("auto",),
    "report_to": ("none", "all", *TRACKERS),
}
"""The words that a passed-through field takes beside its other types; the library's annotation only says `str`."""
_SFT_ONLY = (
    "data_seed", "eval_delay", "eval_on_start", "eval_steps", "per_device_eval_batch_size", "save_on_each_node",
    "save_steps", "save_strategy", "save_total_limit",
)  # fmt: skip
"""Rounds save their weights and evaluate by themselves, and each has a seed of its own."""

_LAUNCHER = "give it to the launcher: accelerate launch --config_file FILE"
_LABELS = "bcft makes and checks the labels: loss is on completions only; `train_on` chooses the turns"
_TOKEN = "set HF_TOKEN in the environment instead; tokens never go into recipes"
_COMMAND = "the command decides it, such as `bcft sft`"
_UPLOAD = "a finished run is uploaded once, with push_to_hub: true"
_TOKENIZER = "a model brings its own tokenizer"
_SERVER = "give the whole address: vllm_server_base_url"

REFUSED = {
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), _LAUNCHER),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss", "train_on_inputs"), _LABELS),
    **dict.fromkeys(("hub_token", "push_to_hub_token", "hf_token", "use_auth_token"), _TOKEN),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "agent_type"), _COMMAND),
    "critic_lm": "behavior cloning has no critic",
    **dict.fromkeys(("hub_strategy", "hub_always_push", "hub_revision"), _UPLOAD),
    **dict.fromkeys(("tokenizer", "tokenizer_name", "tokenizer_name_or_path"), _TOKENIZER),
    **dict.fromkeys(("vllm_server_host", "vllm_server_port"), _SERVER),
    **dict.fromkeys(
        ("api_key", "openai_api_key"), "set OPENAI_API_KEY in the environment instead; keys never go into recipes"
    ),
    "use_vllm": "give engine: vllm",
    "vllm_mode": "vLLM always is a server of its own, which the run starts unless vllm_server_base_url names one",
    "wandb_api_key": "set WANDB_API_KEY in the environment instead; keys never go into recipes",
    "env": "a recipe sets no environment variables; export them in the shell that starts the run",
    "debug": "the flag --debug shows tracebacks; the Trainer's key of that name is not supported",
    "resume_from_checkpoint": "re-run the same command to resume",
    "overwrite_output_dir": "a run is resumed, never overwritten; give another output_dir",
    "streaming": "large files are not held in memory anyway, and every row is counted before the first step",
    "test_split_size": "held-out problems are chosen by hash: eval_test_problems and eval_dev_problems",
    "packing": "this version does not pack rows",
    "use_liger_kernel": "TRL's own fused head is always on, and exact",
    "dataset_text_field": "the chat template renders every row from its prompt and completion",
    "formatting_func": "the chat template renders every row from its prompt and completion",
    "truncation_mode": "rows that are too long are dropped or refused (overlength), never truncated",
    "load_in_8bit": "this version quantizes to 4 bit only: use load_in_4bit",
    "load_best_model_at_end": "the last weights of `sft` are the result; `filtered` chooses its round on dev",
    "auto_find_batch_size": "it would silently change the batch, and with it the result",
    "disable_tqdm": "the flag --quiet decides whether there is a progress bar",
    "logging_first_step": "the first step is always logged: a run reports its loss",
    "max_tool_calling_iterations": "give max_turns, the most actions of an attempt: one more than its calls of tools",
    "environment_factory": "give environment, the dotted path of the class",
    "tools": "give an environment with tools, or the rows a column tools",
    "do_sample": "evaluation reports greedy and sampled success, always both",
    "generation_kwargs": "every sampling parameter is a key of its own: temperature, top_p, top_k, min_p",
}
"""A name that users type -> the reason why it is refused. Other library fields that are not keys are refused too."""

REFUSED_VALUES = {
    ("train_sampling_strategy", "group_by_length"): "its sampler is not seeded, so a resumed run would differ",
    ("train_sampling_strategy", "batch_rebalance"): "it is not known to resume exactly",
    ("loss_type", "chunked_nll"): "it is the old name of nll",
    ("save_strategy", "best"): "the last weights are the result, and held-out problems judge them",
}

RENAMED = {
    old: new
    for new, names in {
        "model_name_or_path": "model model_name model_path model_id base_model policy_lm pretrain",
        "model_revision": "revision",
        "dtype": "torch_dtype",
        "attn_implementation": "flash_attn use_flash_attention_2",
        "use_peft": "finetuning_type use_lora lora",
        "use_peft: true (for qlora with load_in_4bit: true)": "adapter",
        "lora_r": "lora_rank",
        "lora_target_modules": "lora_target target_modules",
        "lora_modules_to_save": "modules_to_save",
        "load_in_4bit": "quantization_bit",
        "dataset_name": "dataset data data_path dataset_path train_file",
        "dataset_train_split": "train_split",
        "dataset_test_split": "test_split val_set_size eval_dataset",
        "chat_template_path": "chat_template template",
        "dataset_format": "formatting",
        "prompt_column": "prompt_key input_key",
        "completion_column": "response_key output_key",
        "answer_column": "label_key",
        "system_prompt": "default_system system_message",
        "max_length": "max_seq_length max_seq_len cutoff_len sequence_len model_max_length max_prompt_length",
        "learning_rate": "lr lm_lr actor_lr",
        "lr_scheduler_type": "lr_scheduler",
        "warmup_steps (a value below 1 is a fraction of all steps)": "warmup_ratio",
        "num_train_epochs": "num_epochs epochs n_epochs max_epochs actor_epochs",
        "max_steps": "num_steps max_train_steps total_steps",
        "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size per_gpu_train_batch_size",
        "per_device_eval_batch_size": "eval_batch_size",
        "gradient_accumulation_steps": "grad_accum_steps grad_accum gradient_accumulation",
        "max_grad_norm": "gradient_clipping grad_clip",
        "optim": "optimizer",
        "bf16 or fp16 (left out, the hardware decides)": "precision mixed_precision",
        "use_cpu": "no_cuda",
        "seed": "random_seed",
        "train_sampling_strategy: random (grouping by length does not resume exactly)": "group_by_length",
        "output_dir": "out_dir save_path save_dir checkpoint_path",
        "report_to": "use_wandb wandb_project",
        "run_name": "exp_name experiment_name wandb_run_name",
        "eval_strategy": "evaluation_strategy",
        "eval_test_problems": "eval_size",
        "max_completion_length": "max_new_tokens max_tokens max_response_length",
        "reward_funcs": "reward_fn reward_function reward_func reward_functions",
        "num_generations in rounds; an evaluation has eval_test_samples": "num_return_sequences n_samples "
        "n_samples_per_prompt rollout.n",
        "num_rounds": "num_iterations iterations n_iterations rounds",
        "prompts_per_round": "rollout_size rollout_batch_size",
        "warmup_rounds": "warmup_iter",
        "early_stop": "early_stopping_patience patience",
        "keep_quantile": "keep_fraction filter_quantile",
    }.items()
    for old in names.split()
}
"""A name from an earlier transformers or from another toolkit -> the name here."""


@dataclass(frozen=True)
class Key:
    """One key of a recipe, as a section's field declares it."""

    name: str
    type: str
    """Alternatives of `null bool int float str dict list[str] list[float] list[dict]`, joined by ` | `."""
    default: Any
    meaning: str
    section: str
    group: str
    """The library class the key comes from, or `bcft`."""
    commands: tuple[str, ...]
    """The commands that read it. A file may hold keys of other commands (see `effects`), a command line may not."""
    choices: tuple[str, ...] = ()
    limits: str = ""
    """Of its numbers, such as `> 0 and <= 1`."""


def _kinds(hint: Any) -> list[str]:
    """Return the words of `Key.type` for an annotation."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [word for part in typing.get_args(hint) for word in _kinds(part)]
    if typing.get_origin(hint) is Literal:
        return ["str"]
    if typing.get_origin(hint) is tuple:
        return [f"list[{_kinds(typing.get_args(hint)[0])[0]}]"]
    if hint is types.NoneType:
        return ["null"]
    return [hint.__name__] if hint in (bool, int, float, str) else ["dict"]


def _words(hint: Any) -> tuple[str, ...]:
    """Return the choices in an annotation."""
    parts = typing.get_args(hint) if typing.get_origin(hint) is not Literal else (hint,)
    return tuple(word for part in parts if typing.get_origin(part) is Literal for word in typing.get_args(part))


def _keys() -> Iterator[Key]:
    """Yield the keys that the sections declare, then those that are passed through."""
    for section, cls in SECTIONS.items():
        hints = typing.get_type_hints(cls)
        for setting in fields(cls):
            if setting.name == "passed_through":
                continue
            hint, about = hints[setting.name], setting.metadata
            yield Key(
                name=setting.name,
                type=" | ".join(_kinds(hint)),
                default={} if setting.default is MISSING else setting.default,
                meaning=about["meaning"],
                section=section,
                group=about["group"],
                commands=about["commands"],
                choices=about.get("choices") or _words(hint),
                limits=about["limits"],
            )
    for name, limits in PASSED_THROUGH.items():
        group, row = LIBRARY_FIELDS[name]
        choices = tuple(row.get("choices", _CHOICES.get(name, ())))
        commands = ("sft",) if name in _SFT_ONLY else TRAINING
        yield Key(name, row["type"], row["default"], row["help"], "training", group, commands, choices, limits)


KEYS: Mapping[str, Key] = {key.name: key for key in _keys()}
"""Every key that is accepted, by name."""
