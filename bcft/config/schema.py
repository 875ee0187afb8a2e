"""The tables of the configuration: every key and flag there is, and every name that is refused, with the reason.

Data only. `library_fields.json` holds what TRL and transformers have; here stand the own keys, the few library defaults that
differ, and the names from elsewhere. Reading and checking is `loader`'s work, converting `values`'s.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Key:
    """One key of a recipe."""

    name: str
    type: str
    """Alternatives of `null bool int float str dict list[str] list[float]`, joined by ` | `."""
    default: Any
    meaning: str
    group: str
    """The library class the key belongs to, or the heading of an own key."""
    commands: tuple[str, ...]
    """Which commands use it. A file may hold the keys of all commands, a command line only those of its own."""
    choices: tuple[str, ...] = ()
    limits: str = ""
    """Such as `> 0 and <= 1`: what holds of every number."""


class Command(NamedTuple):
    """One command, for `--help`."""

    summary: str
    example: str


COMMANDS = {
    "sft": Command(
        "Plain behaviour cloning: one run on prompt/completion pairs, loss on the completion only,\n"
        "the model evaluated on held-out problems before and after.",
        "bcft sft recipes/bc_math.yaml --learning_rate 1e-4 seed=1",
    ),
    "filtered": Command(
        "Filtered behaviour cloning: rounds of roll out, score, select, clone and evaluate, from the policy's own\n"
        "attempts.",
        "bcft filtered recipes/filtered_bc.yaml --num_rounds 6 keep_quantile=0.8",
    ),
    "evaluate": Command(
        "Success of a model, an adapter or a run on held-out problems, paired against another with --against.",
        "bcft evaluate recipes/bc_math.yaml --model_name_or_path runs/bc_math --against bcft:tiny-math",
    ),
    "collect": Command(
        "Play a policy, or a stronger teacher, score what it did and keep the best as demonstrations for bcft sft.",
        "bcft collect recipes/filtered_bc.yaml --model_name_or_path runs/bc_math --prompts_per_round 200",
    ),
    "refilter": Command(
        "Score and select saved rollouts again, by other rewards or another rule, without generating anything.",
        "bcft refilter recipes/filtered_bc.yaml --rollouts runs/filtered_bc --keep_quantile 0.5",
    ),
    "preview": Command(
        "Show, for the first rows of a recipe, exactly which tokens carry loss.",
        "bcft preview recipes/bc_math.yaml --preview_rows 5",
    ),
}
TRAINING = ("sft", "filtered")
PLAYING = ("sft", "filtered", "evaluate", "collect")
SELECTING = ("filtered", "collect", "refilter")
REQUIRED = ("model_name_or_path", "dataset_name")


class Flag(NamedTuple):
    """A switch of the command line; never a key of a recipe."""

    commands: tuple[str, ...]
    meaning: str


FLAGS = {
    "dry-run": Flag(("sft", "filtered"), "print what the run would be: rows, steps, evaluation, memory; train nothing"),
    "json": Flag(("evaluate", "preview"), "print JSON"),
    "html": Flag(("preview",), "print one self-contained HTML page"),
    "quiet": Flag(("sft", "filtered", "evaluate", "collect", "refilter"), "print the conclusion only"),
    "debug": Flag(tuple(COMMANDS), "show the traceback of an error"),
    "allow-drift": Flag(("sft", "filtered", "collect"), "go on with a run begun with another recipe, data or versions"),
    "allow-remote-code": Flag(tuple(COMMANDS), "let `trust_remote_code: true` count, with a pinned model_revision"),
}

OWN = (
    Key(
        name="overlength",
        type="str",
        default="drop",
        meaning="what happens to rows longer than max_length; they are never cut",
        group="data",
        commands=("sft", "preview"),
        choices=("drop", "raise"),
    ),
    Key(
        name="allow_overlap",
        type="bool",
        default=False,
        meaning="train even if training prompts are also held-out ones",
        group="data",
        commands=("sft", "filtered", "evaluate", "collect", "preview"),
    ),
    Key(
        name="success_func",
        type="str | null",
        default=None,
        meaning="dotted path of the function that returns 1.0 or more for a completion that solves its problem; "
        "null: the first of reward_funcs; '' for none, as rewards without such a meaning need",
        group="evaluation",
        commands=("sft", "filtered", "evaluate", "collect", "refilter"),
    ),
    Key(
        name="eval_split",
        type="str",
        default="test",
        meaning="which held-out problems are evaluated",
        group="evaluation",
        commands=("evaluate",),
        choices=("dev", "test"),
    ),
    Key(
        name="eval_dev_problems",
        type="int",
        default=128,
        meaning="how many problems are held out as dev",
        group="evaluation",
        commands=("sft", "filtered", "evaluate", "collect", "preview"),
        limits=">= 0",
    ),
    Key(
        name="eval_dev_samples",
        type="int",
        default=4,
        meaning="sampled attempts at each dev problem",
        group="evaluation",
        commands=("sft", "filtered", "evaluate"),
        limits=">= 1",
    ),
    Key(
        name="eval_test_problems",
        type="int",
        default=500,
        meaning="how many problems of test are evaluated; 0 evaluates nothing",
        group="evaluation",
        commands=("sft", "filtered", "evaluate", "collect", "preview"),
        limits=">= 0",
    ),
    Key(
        name="eval_test_samples",
        type="int",
        default=16,
        meaning="sampled attempts at each test problem",
        group="evaluation",
        commands=("sft", "filtered", "evaluate"),
        limits=">= 1",
    ),
    Key(
        name="against",
        type="str | null",
        default=None,
        meaning="a model, an adapter or a run directory to compare with; of `filtered`: the directory of another run, "
        "such as its random control, for its report",
        group="evaluation",
        commands=("evaluate", "filtered"),
    ),
    Key(
        name="environment",
        type="str | null",
        default=None,
        meaning="dotted path of what makes an environment, such as bcft.environments.grid_walk.GridWalk; null: one "
        "question, one answer",
        group="environment",
        commands=PLAYING,
    ),
    Key(
        name="environment_args",
        type="dict",
        default={},
        meaning="what it is called with",
        group="environment",
        commands=PLAYING,
    ),
    Key(
        name="max_turns",
        type="int",
        default=20,
        meaning="actions of an attempt in an environment; who reaches it has a low return, and is not cut",
        group="environment",
        commands=PLAYING,
        limits=">= 1",
    ),
    Key(
        name="step_timeout",
        type="float",
        default=60.0,
        meaning="seconds an environment may take to answer; one that takes longer makes its attempt an error",
        group="environment",
        commands=PLAYING,
        limits="> 0",
    ),
    Key(
        name="train_on",
        type="str",
        default="all_turns",
        meaning="which of a conversation's actions carry loss",
        group="environment",
        commands=("sft", "filtered", "collect", "refilter", "preview"),
        choices=("all_turns", "last_turn"),
    ),
    Key(
        name="num_rounds",
        type="int",
        default=10,
        meaning="rounds of roll out, score, select, clone",
        group="filtered",
        commands=("filtered",),
        limits=">= 1",
    ),
    Key(
        name="prompts_per_round",
        type="int",
        default=256,
        meaning="training problems attempted in a round, drawn anew without replacement",
        group="filtered",
        commands=("filtered", "collect"),
        limits=">= 1",
    ),
    Key(
        name="warmup_rounds",
        type="int",
        default=0,
        meaning="first rounds that play and score but train nothing; with `history` their trajectories count later",
        group="filtered",
        commands=("filtered",),
        limits=">= 0",
    ),
    Key(
        name="history",
        type="int | str",
        default=1,
        meaning="how many rounds' trajectories are selected from, this one's included; all: every round's",
        group="filtered",
        commands=("filtered",),
        choices=("all",),
        limits=">= 1",
    ),
    Key(
        name="init_from",
        type="str",
        default="previous",
        meaning="the weights a round trains from: those it played with; base: the model as given; best: the round "
        "that is best on dev so far, which then plays as well",
        group="filtered",
        commands=("filtered",),
        choices=("previous", "base", "best"),
    ),
    Key(
        name="reset_optimizer",
        type="bool",
        default=True,
        meaning="a fresh optimizer each round; false: its moments are carried on, and saved with the round's weights",
        group="filtered",
        commands=("filtered",),
    ),
    Key(
        name="early_stop",
        type="int | null",
        default=None,
        meaning="stop after so many evaluated rounds without a better one on dev, and when pass@k on dev falls below "
        "the base's (collapse); null: play all rounds",
        group="filtered",
        commands=("filtered",),
        limits=">= 1",
    ),
    Key(
        name="eval_every",
        type="int | str",
        default="auto",
        meaning="rounds between two evaluations on dev; auto: as often as keeps them under a third of all attempts",
        group="filtered",
        commands=("filtered",),
        choices=("auto",),
        limits=">= 1",
    ),
    Key(
        name="keep_quantile",
        type="float",
        default=0.9,
        meaning="the cutoff is this quantile of the graded rewards; what reaches it may be kept",
        group="filtered",
        commands=SELECTING,
        limits=">= 0 and <= 1",
    ),
    Key(
        name="min_reward",
        type="float | null",
        default=None,
        meaning="no trajectory below it is kept",
        group="filtered",
        commands=SELECTING,
    ),
    Key(
        name="require_success",
        type="str",
        default="auto",
        meaning="auto: where success is known only successes are kept; false: by reward alone, the origin's rule",
        group="filtered",
        commands=SELECTING,
        choices=("auto", "true", "false"),
    ),
    Key(
        name="pass_rate",
        type="list[float] | null",
        default=None,
        meaning="least and greatest share of a problem's attempts that are solved, such as [0.1, 0.9]: what is never "
        "or always solved teaches little, and is not kept",
        group="filtered",
        commands=SELECTING,
    ),
    Key(
        name="max_per_problem",
        type="int | null",
        default=None,
        meaning="most trajectories kept of one problem in a round",
        group="filtered",
        commands=SELECTING,
        limits=">= 1",
    ),
    Key(
        name="ties",
        type="str",
        default="include",
        meaning="include keeps all at the cutoff; sample keeps round((1 - keep_quantile) x graded)",
        group="filtered",
        commands=SELECTING,
        choices=("include", "sample"),
    ),
    Key(
        name="control",
        type="str",
        default="none",
        meaning="random: as many as the filter would keep, drawn without looking at rewards; a control, not a method",
        group="filtered",
        commands=("filtered",),
        choices=("none", "random"),
    ),
    Key(
        name="learning_rate_decay",
        type="float",
        default=1.0,
        meaning="the learning rate of round n is learning_rate x learning_rate_decay ** (n - 1)",
        group="filtered",
        commands=("filtered",),
        limits="> 0 and <= 1",
    ),
    Key(
        name="replay_dataset",
        type="str | null",
        default=None,
        meaning="demonstrations to train on beside what a round kept, at most as many rows, drawn anew each round; "
        "named as dataset_name is, of which the train split is taken",
        group="filtered",
        commands=("filtered",),
    ),
    Key(
        name="rollouts",
        type="str | null",
        default=None,
        meaning="the saved rollouts to select from: a rollouts.jsonl, a round, or the directory of a run",
        group="refilter",
        commands=("refilter",),
    ),
    Key(
        name="on_empty",
        type="str",
        default="skip",
        meaning="a round that keeps nothing is skipped, or stops the run",
        group="filtered",
        commands=("filtered",),
        choices=("skip", "stop"),
    ),
    Key(
        name="reward_funcs",
        type="list[str] | null",
        default=None,
        meaning="dotted paths of reward functions in TRL's signature; the first also says what is solved; null: "
        "bcft.rewards.math_reward, and none where there is an environment",
        group="evaluation",
        commands=("sft", "filtered", "evaluate", "collect", "refilter"),
    ),
    Key(
        name="preview_rows",
        type="int",
        default=3,
        meaning="how many rows are shown",
        group="preview",
        commands=("preview",),
        limits=">= 1",
    ),
)


class Override(NamedTuple):
    """A library key with another default here, or another type, or a note to its meaning."""

    default: Any
    note: str
    type: str = ""


OVERRIDES = {
    "model_name_or_path": Override(None, "a Hub id, a directory, or bcft:tiny-math, which is embedded", "str"),
    "dataset_name": Override(None, "a Hub id, a file, a directory, or bcft:arithmetic, which is embedded", "str"),
    "output_dir": Override(None, "left out: runs/ and the recipe's name", "str"),
    "dtype": Override("auto", "auto: chosen from model and hardware; TRL's own default is float32", "str"),
    "fp16": Override(None, "null: chosen from the hardware", "bool | null"),
    "gradient_checkpointing": Override(False, "off, unlike in TRL: small models do not need it"),
    "min_p": Override(0.0, "0 is off", "float"),
    "max_completion_length": Override(512, "in tokens, of every sampled completion", "int"),
    "num_generations": Override(8, "sampled attempts at each problem of a round", "int"),
    "max_length": Override(1024, "longer rows are dropped or refused, never cut; null: no limit"),
}


def _each(names: str, value: str) -> dict[str, str]:
    """Return the same value for each of the names, which stand with spaces between."""
    return dict.fromkeys(names.split(), value)


LIMITS = {
    **_each("per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps", ">= 1"),
    **_each(
        "lora_r lora_alpha save_total_limit max_completion_length num_generations ddp_timeout torch_empty_cache_steps",
        ">= 1",
    ),
    **_each("learning_rate num_train_epochs logging_steps save_steps eval_steps adam_epsilon", "> 0"),
    **_each("temperature repetition_penalty", "> 0"),
    **_each("warmup_steps weight_decay max_grad_norm seed data_seed dataloader_num_workers", ">= 0"),
    **_each("top_k neftune_noise_alpha eval_delay", ">= 0"),
    **_each("adam_beta1 adam_beta2 label_smoothing_factor lora_dropout min_p", ">= 0 and < 1"),
    "max_length": ">= 2",
    "max_steps": ">= -1",
    "top_p": "> 0 and <= 1",
}
CHOICES = {"include_num_input_tokens_seen": ("all", "non_padding", "no"), "pad_to_multiple_of": ("auto",)}

_LABELS = "the labels are made and proved here: loss is on completions only"
_RENDERER = "one renderer makes every row, from the columns prompt and completion"
_LAUNCHER = "give it to the launcher: accelerate launch --config_file FILE"
_METRICS = "success is measured by sampling on held-out problems, not by the Trainer"
_LAST = "the last weights are the result, and held-out problems judge them"
_LATER = "this version does not have it"

REFUSED = {
    # secrets and surroundings
    "env": "a recipe sets no environment variables; export them in the shell that starts the run",
    **_each(
        "hub_token push_to_hub_token huggingface_token hf_token use_auth_token",
        "set HF_TOKEN in the environment instead; tokens never go into recipes",
    ),
    **_each("wandb_key wandb_api_key", "set WANDB_API_KEY in the environment instead; keys never go into recipes"),
    "cache_dir": "set HF_HOME in the environment instead",
    "debug": "the flag --debug shows tracebacks; the Trainer's key of that name is not supported",
    "local_rank": "the launcher sets it",
    **_each("deepspeed fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap parallelism_config", _LAUNCHER),
    **_each("do_train do_eval do_predict agent_type", "the command says it, such as `bcft sft`"),
    # data and labels
    **_each("datasets dataset_mixture", "mixtures are not supported; write one file and give it as dataset_name"),
    "dataset_streaming": "every row is counted and proved before the first step",
    **_each("completion_only_loss assistant_only_loss train_on_inputs train_on_prompt mask_history", _LABELS),
    **_each("label_names remove_unused_columns", _LABELS),
    **_each("dataset_text_field dataset_kwargs dataset_num_proc formatting_func", _RENDERER),
    "pad_token": "padding carries no label and no attention; a token of the vocabulary is taken",
    **_each("tokenizer tokenizer_name tokenizer_name_or_path", "a model brings its own tokenizer"),
    "truncation_mode": "over-long rows are dropped or refused (overlength), never cut",
    **_each("packing packing_strategy eval_packing padding_free sample_packing", "this version does not pack"),
    "shuffle_dataset": "the sampler shuffles, seeded; see train_sampling_strategy",
    "length_column_name": "only length-grouped sampling reads it, which is not resumable",
    # the model
    "model_init_kwargs": "bcft loads the model: use dtype, attn_implementation, model_revision, load_in_4bit",
    "lora_task_type": "it is always CAUSAL_LM",
    "lora_target_parameters": "this version adapts modules only: use lora_target_modules",
    "load_in_8bit": "this version quantises to 4 bit only: use load_in_4bit",
    "bnb_4bit_quant_storage": "this version stores 4-bit weights in the library's default type",
    "ignore_bias_buffers": "it works around models that are not supported",
    **_each("use_liger_kernel liger_kernel_config", "TRL's own fused head is always on, and exact"),
    "activation_checkpointing": "one name for one thing: use gradient_checkpointing",
    "activation_checkpointing_kwargs": "one name for one thing: use gradient_checkpointing_kwargs",
    "use_cache": "the cache is on while sampling and off while training",
    **_each("bf16_full_eval fp16_full_eval", "it casts the weights that are being trained"),
    **_each("critic_lr gamma tau capacity", "behaviour cloning has no critic and no replay buffer"),
    # what would break exact resumption, or hide a failure
    **_each(
        "resume resume_from_checkpoint restore_callback_states_from_checkpoint", "the same command resumes by itself"
    ),
    "overwrite_output_dir": "a run is resumed, never overwritten; give another output_dir",
    "ignore_data_skip": "a resumed run would see rows twice",
    "save_only_model": "such a checkpoint cannot be resumed exactly; use save_strategy: no",
    "enable_jit_checkpoint": "it saves in mid-step and exits 0; bcft ends the step, saves and exits 75",
    "dataloader_in_order": "the order of rows is part of the result",
    "auto_find_batch_size": "it would change the batch, and with it the result, behind your back",
    "logging_nan_inf_filter": "it is always off: a loss that is not finite is seen, and ends the run",
    "save_safetensors": "weights are always saved as safetensors",
    "logging_dir": "logs are in output_dir",
    **_each(
        "push_to_hub hub_model_id push_to_hub_model_id push_to_hub_organization hub_strategy hub_private_repo "
        "hub_always_push hub_revision",
        "nothing is uploaded by a run; upload its finished directory with `hf upload`",
    ),
    # evaluation
    **_each("include_for_metrics batch_eval_metrics eval_do_concat_batches eval_use_gather_object", _METRICS),
    **_each("eval_accumulation_steps prediction_loss_only", _METRICS),
    **_each("load_best_model_at_end metric_for_best_model greater_is_better", _LAST),
    **_each("do_sample greedy", "evaluation reports greedy and sampled success, always both"),
    "generation_kwargs": "every sampling parameter is a key of its own: temperature, top_p, top_k, min_p",
    # what other commands and later versions have
    "reward_args": _LATER,
    "num_generations_eval": "an evaluation has eval_dev_samples and eval_test_samples",
    **_each(
        "engine use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_gpu_memory_utilization "
        "vllm_max_model_length vllm_tensor_parallel_size vllm_server_base_url vllm_server_host vllm_server_port "
        "vllm_server_timeout vllm_group_port vllm_device "
        "use_transformers_continuous_batching transformers_continuous_batching_config",
        "this version samples with its own engine only",
    ),
}
"""Name -> why it is refused. No library key that stands here is ever accepted."""

REFUSED_VALUES = {
    ("train_sampling_strategy", "group_by_length"): "its sampler is not seeded, so that a resumed run differs",
    ("train_sampling_strategy", "batch_rebalance"): "it is not known to resume exactly",
    ("loss_type", "chunked_nll"): "it is the old name of nll",
    ("save_strategy", "best"): _LAST,
}


def _renamed(right: dict[str, str]) -> dict[str, str]:
    return {old: new for new, names in right.items() for old in names.split()}


RENAMED = _renamed(
    {
        # former names of transformers and TRL; LLaMA-Factory, axolotl, Unsloth, torchtune, verl, OpenRLHF; the origin
        "model_name_or_path": "model model_name model_path model_id base_model policy_lm pretrain",
        "model_revision": "revision",
        "dtype": "torch_dtype",
        "attn_implementation": "flash_attn flash_attention use_flash_attention_2 attn_impl",
        "use_peft": "finetuning_type train_type use_lora lora lora_enable",
        "use_peft: true (for qlora with load_in_4bit: true)": "adapter",
        "lora_r": "lora_rank",
        "lora_target_modules": "lora_target target_modules lora_target_linear",
        "lora_modules_to_save": "additional_target modules_to_save",
        "load_in_4bit": "quantization_bit quant_bits use_4bit",
        "dataset_name": "dataset data data_path dataset_path train_file train_data",
        "dataset_train_split": "train_split",
        "dataset_test_split": "test_split val_set_size val_size eval_dataset",
        "chat_template_path": "chat_template template",
        "max_length": "max_seq_length max_seq_len cutoff_len sequence_len seq_len model_max_length max_prompt_length",
        "learning_rate": "lr lm_lr actor_lr",
        "lr_scheduler_type": "lr_scheduler scheduler lr_schedule",
        "warmup_steps (a value below 1 is a fraction of all steps)": "warmup_ratio warmup",
        "num_train_epochs": "num_epochs epochs n_epochs max_epochs total_epochs actor_epochs",
        "max_steps": "max_train_steps num_steps steps total_steps",
        "per_device_train_batch_size": "batch_size micro_batch_size train_batch_size mini_batch_size "
        "micro_train_batch_size per_gpu_train_batch_size",
        "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
        "gradient_accumulation_steps": "grad_accum_steps grad_accum gradient_accumulation accumulate_steps",
        "gradient_checkpointing": "grad_checkpointing enable_gradient_checkpointing",
        "max_grad_norm": "gradient_clipping grad_clip clip_grad max_norm",
        "optim": "optimizer",
        "bf16 or fp16 (left out, the hardware decides)": "precision mixed_precision",
        "use_cpu": "no_cuda",
        "seed": "random_seed",
        "train_sampling_strategy: random (grouping by length does not resume exactly)": "group_by_length",
        "output_dir": "save_path checkpoint_path save_dir out_dir output_path",
        "save_steps": "save_freq save_interval",
        "logging_steps": "log_every log_interval log_every_n_steps",
        "report_to": "use_wandb wandb_project logger tracker",
        "run_name": "exp_name experiment_name wandb_run_name",
        "eval_strategy": "evaluation_strategy eval_freq eval_interval",
        "eval_test_problems": "eval_size num_eval_problems eval_limit",
        "max_completion_length": "max_new_tokens max_tokens response_length max_response_length",
        "success_func": "reward_fn reward_function reward_func",
        "num_generations of the command filtered; an evaluation has eval_test_samples": "num_return_sequences "
        "rollout.n n_samples_per_prompt samples_per_prompt n_samples",
        "num_rounds of the command filtered": "num_cycles iterations num_iterations n_iterations rounds",
        "prompts_per_round of the command filtered": "rollout_size rollout_batch_size",
        "warmup_rounds of the command filtered": "warmup_iter",
        "early_stop of the command filtered": "early_stopping_patience patience",
        "keep_quantile of the command filtered": "keep_fraction filter_quantile",
        "max_per_problem of the command filtered": "max_per_prompt max_per_task n_best_to_keep",
    }
)
"""A name from elsewhere -> what it is called here."""

RECORDED = frozenset(
    _each(
        "output_dir max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps learning_rate "
        "lr_scheduler_type warmup_steps optim weight_decay max_grad_norm loss_type max_length chat_template_path "
        "bf16 fp16 use_cpu seed trust_remote_code",
        "SFTConfig",
    )
)
"""Keys of SFTConfig that `config.yaml` holds even where nobody set them."""


def _used_by(name: str, group: str) -> tuple[str, ...]:
    if name == "reward_weights":
        return SELECTING
    if name == "num_generations":
        return ("filtered", "collect")
    return PLAYING if group == "GRPOConfig" else tuple(COMMANDS)


def _table() -> Mapping[str, Key]:
    table = {key.name: key for key in OWN}
    library = json.loads(Path(__file__).with_name("library_fields.json").read_text(encoding="utf-8"))
    for group, fields in library.items():
        for name, row in fields.items():
            if name in REFUSED:
                continue
            override = OVERRIDES.get(name, Override(row["default"], ""))
            table[name] = Key(
                name,
                override.type or row["type"],
                override.default,
                f"{row['help']} ({override.note})" if override.note else row["help"],
                group,
                _used_by(name, group),
                tuple(row.get("choices", CHOICES.get(name, ()))),
                LIMITS.get(name, ""),
            )
    return table


KEYS = _table()
"""Every key that is accepted, by name."""
