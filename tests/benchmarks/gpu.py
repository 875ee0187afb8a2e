"""A GPU at the exact shape of Llama-3.2-3B, with random weights: training, a round of QLoRA, rollouts.

    python tests/benchmarks/gpu.py [full lora 4bit round hf vllm] [--vllm-command WORDS] [--output runs/gpu]
    python tests/benchmarks/gpu.py --shape tiny --device cpu        the same code on a small shape, in two minutes

The settings are those of recipes/llama-3.2-3b; the model is made in a temporary directory, with the embedded tokenizer.
Rows are random ids with lengths like GSM8K's, since speed and memory do not depend on what they say. Each part is a
process of its own and leaves `PART.json` with commit, card and versions; a finished part is not run again.
  full, lora, 4bit   training as in bc_math.yaml: all weights, LoRA on bf16, LoRA on 4 bits
  round              one round of filtered_bc_qlora.yaml: all attempts, then as many rows as it can keep
  hf, vllm           rollouts of filtered_bc.yaml by engine; vllm only with a command that starts a server
The share of the peak counts 6 N operations for a token, 4 N where the base is frozen and has no gradients of its own;
what checkpointing computes twice and attention scores do not count. Memory is the allocator's, beside the estimate of
`--dry-run`. Prints the table.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from bcft.config.engine import EngineSettings
from bcft.config.loader import Config, load
from bcft.environments.single_turn import SingleTurn
from bcft.errors import UsageError
from bcft.generation import make_engine, open_engine
from bcft.policy.loading import ASSETS, Policy, load_policy, with_adapter
from bcft.reporting.memory import free_memory, memory, outline
from bcft.runs.directory import versions
from bcft.runs.storage import write_json
from bcft.types import IGNORED, Request, RolloutSettings, TrainingExample

ROOT = Path(__file__).parents[2]
PARTS = ("full", "lora", "4bit", "round", "hf", "vllm")
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-3b": {
        "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 8192, "vocab_size": 128_256, "max_position_embeddings": 131_072,
    },
    "tiny": {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 32, "intermediate_size": 128, "vocab_size": 512, "max_position_embeddings": 131_072,
    },
}  # fmt: skip
PARAMETERS = {"llama-3.2-3b": 3_212_749_824}
"""What the real model has, so that the shape is known to be its own."""
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121}
"""A part of a card's name -> its bf16 TFLOP/s on dense matrices, as its data sheet says."""
PROMPT, SHORTEST, LONGER = 160, 40, 110.0
"""Tokens of a prompt, of the shortest answer, and how many more an answer has on average."""
WARM_UP = 2


# The model and its rows


def make_model(shape: str, directory: Path, device: str) -> None:
    """Save a model of the shape with random bf16 weights, and the embedded tokenizer."""
    assets = ASSETS / "tiny-math"
    ids = json.loads((assets / "generation_config.json").read_text(encoding="utf-8"))
    tokens = {name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(**SHAPES[shape], **tokens, rope_parameters=LLAMA3, tie_word_embeddings=True, rms_norm_eps=1e-5)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    count = model.num_parameters()
    assert count == PARAMETERS.get(shape, count), f"{count:,} parameters are not those of {shape}"
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(assets / name, directory / name)


def ids_of(draw: random.Random, count: int) -> tuple[int, ...]:
    """Return random ids of the embedded tokenizer, none of them special."""
    return tuple(draw.choices(range(10, 100), k=count))


def answer_length(draw: random.Random, limit: int) -> int:
    """Return how many tokens an answer has."""
    return min(limit, SHORTEST + int(draw.expovariate(1 / LONGER)))


def example(name: str, prompt: Sequence[int], answer: Sequence[int]) -> TrainingExample:
    """Return a row that carries loss on the answer."""
    return TrainingExample(name, name, (*prompt, *answer), (*[IGNORED] * len(prompt), *answer))


def examples_of(count: int, limit: int) -> list[TrainingExample]:
    """Return random rows."""
    draw = random.Random(0)
    return [example(str(i), ids_of(draw, PROMPT), ids_of(draw, answer_length(draw, limit))) for i in range(count)]


# What is measured


def configured(command: str, recipe: str, options: argparse.Namespace, **model: Any) -> Config:
    """Return a recipe of the 3B model with the model of this run; model: its settings that differ."""
    keys: dict[str, Any] = {"model_name_or_path": options.model, "output_dir": f"{options.model}-run"}
    if options.device == "cpu":
        keys["use_cpu"] = True
    config = load(command, ROOT / "recipes" / "llama-3.2-3b" / recipe, keys)
    return replace(config, model=replace(config.model, **model))


def estimate(config: Config, policy_precision: Any, *, trained: int, sampled: int) -> dict[str, int]:
    """Return the bytes that a dry run would state, of training and of sampling; call it before weights are loaded."""
    items = memory(
        outline(config.model), policy_precision, model=config.model, training=config.training, trained=trained,
        sampled=sampled, held_out_loss=False, room=free_memory(policy_precision),
    )  # fmt: skip
    always = sum(item.size for item in items["always"])
    return {part: int(always + sum(item.size for item in items[part])) for part in ("training", "sampling")}


def load_trainable(config: Config) -> Policy:
    """Load the policy as a run does."""
    policy = load_policy(config.model.model_name_or_path, config.model)
    return with_adapter(policy, config.model, seed=config.training.seed)


def fresh_peak(device: str) -> None:
    """Forget the peak so far."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> dict[str, int]:
    """Return the bytes allocated and reserved at most; nothing on a CPU, whose process holds much else."""
    if device != "cuda":
        return {}
    torch.cuda.synchronize()
    return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}


def operations(policy: Policy) -> int:
    """Return the operations for a token of training: 6 for a trained weight, 4 for a frozen one."""
    parameters = list(policy.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    # A byte of 4-bit weights holds two.
    frozen = [p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for p in parameters if not p.requires_grad]
    return int(6 * trained + 4 * sum(frozen))


def train(config: Config, policy: Policy, rows: Sequence[TrainingExample], device: str) -> dict[str, Any]:
    """Train on the rows once, after some steps to warm up; return seconds, tokens, losses and memory."""
    from bcft.training.trainer import BCTrainer, fit, next_round, release, training_arguments

    settings = config.training
    arguments = training_arguments(
        settings, output_dir=Path(settings.output_dir), autocast=policy.precision.autocast, use_cpu=device == "cpu",
        disable_tqdm=True, save_strategy="no", eval_strategy="no", logging_steps=1, report_to="none",
    )  # fmt: skip
    tokenizer = policy.renderer.tokenizer
    trainer = BCTrainer(policy.model, arguments, examples=rows, tokenizer=tokenizer, checkpoints=False)
    per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    warm_up = list(rows[: WARM_UP * per_step])
    for part in (warm_up, list(rows)):
        release(trainer)
        fresh_peak(device)
        next_round(trainer, part, seed=0, learning_rate=settings.learning_rate)
        fitted = fit(trainer, part)
    tokens = sum(len(row.input_ids) for row in rows)
    return {
        "rows": len(rows), "tokens": tokens, "steps": fitted.steps, "seconds": fitted.seconds,
        "tokens_per_second": tokens / fitted.seconds, "operations_per_token": operations(policy),
        "loss_first": fitted.loss_first, "loss_last": fitted.loss_last, "peak": peak(device),
    }  # fmt: skip


def roll_out(config: Config, policy: Policy, prompts: int, device: str, make: Any = None) -> dict[str, Any]:
    """Sample the attempts of a round through an engine; return seconds, tokens and the rows that they make.

    All attempts at a problem have its length: random weights would hardly ever stop by themselves.
    """
    draw, sampling = random.Random(1), config.sampling
    requests = []
    for number in range(prompts):
        context, length = ids_of(draw, PROMPT), answer_length(draw, sampling.max_completion_length)
        for sample in range(sampling.num_generations):
            key = (0, "rollout", 1, str(number), sample, 0)
            requests.append(Request(key, context, sampling.parameters, policy.renderer.stop_ids, length))
    settings = RolloutSettings(SingleTurn, sampling.parameters, sampling.max_completion_length, 1, 60.0, 0)
    if make is not None:
        settings = replace(settings, make_engine=make)
    fresh_peak(device)
    with make_engine(policy, settings) as engine:
        warm_up = [replace(r, key=(*r.key[:2], 0, *r.key[3:]), max_new_tokens=4) for r in requests[:8]]
        list(engine.generate(warm_up))
        start = time.perf_counter()
        actions = list(engine.generate(requests))
        seconds = time.perf_counter() - start
    tokens = sum(len(action.ids) for action in actions)
    contexts = {request.key: request.context_ids for request in requests}
    most = config.selection.max_per_problem or sampling.num_generations
    kept = [action for action in actions if int(action.key[4]) < most]
    return {
        "attempts": len(actions), "tokens": tokens, "seconds": seconds, "attempts_per_second": len(actions) / seconds,
        "tokens_per_second": tokens / seconds, "peak": peak(device),
        "rows": [example("-".join(map(str, a.key)), contexts[a.key], a.ids) for a in kept],
    }  # fmt: skip


def measure(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one part; return its figures."""
    from bcft.policy.precision import choose_precision

    device = options.device
    if part in ("full", "lora", "4bit"):
        quantized = {"load_in_4bit": True, "use_bnb_nested_quant": True} if part == "4bit" else {}
        config = configured("sft", "bc_math.yaml", options, use_peft=part != "full", **quantized)
        if part == "full":
            config = replace(config, training=replace(config.training, learning_rate=1e-6))
    else:
        recipe = "filtered_bc_qlora.yaml" if part == "round" else "filtered_bc.yaml"
        config = configured("filtered", recipe, options)
    settings, limit = config.training, config.sampling.max_completion_length
    count = options.steps * settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    rows = examples_of(count, limit)
    longest = max(len(row.input_ids) for row in rows)
    precision = choose_precision(options.model, config.model)
    planned = estimate(config, precision, trained=longest, sampled=PROMPT + limit)
    policy = load_trainable(config)
    record: dict[str, Any] = {"precision": policy.precision.why, "estimate": planned}
    if part in ("full", "lora", "4bit"):
        return record | {"training": train(config, policy, rows, device)}
    if part == "vllm":
        given = EngineSettings(
            engine="vllm", vllm_command=(options.vllm_command,), concurrency=256,
            vllm_gpu_memory_utilization=options.vllm_share, vllm_max_model_length=PROMPT + limit + 16,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as directory, open_engine(given, directory=Path(directory)) as make:
            rollout = roll_out(config, policy, options.prompts, device, make)
    else:
        prompts = options.round_prompts if part == "round" else options.prompts
        rollout = roll_out(config, policy, prompts or config.rounds.prompts_per_round, device)
    kept = rollout.pop("rows")
    record["rollout"] = rollout
    return record | ({"training": train(config, policy, kept, device)} if part == "round" else {})


# The machine, and the table


def product_rate(device: str) -> float:
    """Return the FLOP/s of one large matrix product: bf16 on a GPU, fp32 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Return commit, card and versions."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    peaks = [1e12 * tera for part, tera in PEAKS.items() if part in name]
    return {
        "commit": options.commit or commit.stdout.strip() or "unknown", "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "shape": options.shape, "card": name, "cuda": torch.version.cuda or "", "peak_flops": next(iter(peaks), 0.0),
        "product_flops": product_rate(options.device), "versions": versions({"model_name_or_path": options.model}),
    }  # fmt: skip


def table(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the table; a part that has not run has cells that say so."""
    head = "tokens/s | share of bf16 peak | of a product | attempts/s | peak memory | estimated"
    lines = [f"| | {head} |", "|---|" + "---:|" * 6]
    for part in PARTS:
        record = records.get(part, {})
        if "out_of_memory" in record:
            lines.append(f"| {part} | out of memory | | | | | |")
            continue
        phases = [name for name in ("rollout", "training") if name in record]
        for phase in phases:
            figures, where = record[phase], record["machine"]
            done = figures["tokens_per_second"] * figures.get("operations_per_token", 0)
            limits = [where["peak_flops"], where["product_flops"]]
            shares = [f"{done / limit:.1%}" if done and limit else "" for limit in limits]
            rate = f"{figures['attempts_per_second']:.1f}" if phase == "rollout" else ""
            used = figures["peak"].get("allocated", 0)
            planned = record["estimate"]["sampling" if phase == "rollout" else "training"]
            sizes = [f"{size / 1e9:.2f} GB" if size else "not measured" for size in (used, planned)]
            name = part if len(phases) == 1 else f"{part}, {phase}"
            cells = [f"{figures['tokens_per_second']:,.0f}", *shares, rate, *sizes]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        if not phases:
            lines.append(f"| {part} | not measured |" + " |" * 5)
    return lines


def child(part: str, options: argparse.Namespace) -> int:
    """Run one part in this process; write its record."""
    if part == "model":
        make_model(options.shape, Path(options.model), options.device)
        return 0
    record: dict[str, Any] = {"machine": machine(options)}
    try:
        record |= measure(part, options)
    except torch.OutOfMemoryError as error:
        record["out_of_memory"] = str(error).splitlines()[0]
    except UsageError as error:
        if "out of memory" not in str(error):
            raise
        record["out_of_memory"] = str(error)
    write_json(options.output / f"{part}.json", record)
    return 0


def main() -> int:
    """Run the parts that are asked for, each in a process of its own; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=" ".join(PARTS))
    parser.add_argument("--shape", choices=list(SHAPES), default="llama-3.2-3b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--steps", type=int, help="optimizer steps of full, lora and 4bit")
    parser.add_argument("--prompts", type=int, help="problems of hf and vllm, eight attempts at each")
    parser.add_argument("--round-prompts", type=int, help="problems of the round, instead of the recipe's")
    parser.add_argument("--vllm-command", default="", help="what starts a vLLM server, as a shell would read it")
    parser.add_argument("--vllm-share", type=float, default=0.5, help="of the GPU's memory, for the server")
    parser.add_argument("--commit", default="", help="where the checkout has no .git")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--model", default="", help=argparse.SUPPRESS)
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    small = options.shape == "tiny"
    options.steps, options.prompts = options.steps or (2 if small else 8), options.prompts or (4 if small else 256)
    options.round_prompts = options.round_prompts or (4 if small else None)
    if options.child:
        return child(options.child, options)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: run this where there is one, or try the code with --shape tiny --device cpu", file=sys.stderr)
        return 1
    options.output = options.output.absolute()
    default = [part for part in PARTS if part != "vllm" or options.vllm_command]
    parts = [p for p in options.parts or default if not (options.output / f"{p}.json").is_file()]
    options.output.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory() as directory:
        given = [*sys.argv[1:], "--model", f"{directory}/model", "--output", str(options.output)]
        for part in ("model", *parts) if parts else ():
            print(f"{part} ...", flush=True)
            done = subprocess.run([sys.executable, __file__, *given, "--child", part], check=False, cwd=ROOT)
            failed += done.returncode != 0
    files = [options.output / f"{part}.json" for part in PARTS]
    records = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()}
    places = (record["machine"] for record in records.values())
    made = dict.fromkeys(f"{where['card']}, {where['shape']}, commit {where['commit'][:7]}" for where in places)
    print("\n".join(["", *made, "", *table(records)]))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
