"""Supervised tokens a second: `bcft.training.trainer.fit` against a bare `SFTTrainer`, same settings and examples.

    python tests/benchmarks/throughput.py [--pairs 7]

Interleaved pairs in one process, training only; the result is the median of the pairwise ratios, ours over bare.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import PrinterCallback, ProgressCallback
from trl import SFTTrainer

from bcft.config.loader import load
from bcft.data.examples import make_examples
from bcft.data.loading import load_splits
from bcft.policy.loading import load_policy, load_renderer
from bcft.training.trainer import BCTrainer, fit, to_dataset, training_arguments

RECIPE = Path(__file__).parents[2] / "recipes" / "bc_math.yaml"


def main() -> int:
    """Print each pair and the median ratio; exit 1 below the bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--bound", type=float, default=0.97)
    options = parser.parse_args()
    config = load("sft", RECIPE, {"max_steps": options.steps, "save_strategy": "no"})
    name = config.model.model_name_or_path
    demonstrations = load_splits(config.data, config.evaluation).train
    examples, _ = make_examples(demonstrations, load_renderer(name, config.model), max_length=512)

    def train(ours: bool) -> float:
        policy = load_policy(name, config.model)
        with tempfile.TemporaryDirectory() as directory:
            arguments = training_arguments(
                config.training,
                output_dir=Path(directory),
                autocast="no",
                use_cpu=policy.precision.device == "cpu",
            )
            if ours:
                trainer = BCTrainer(policy.model, arguments, examples=examples, tokenizer=policy.renderer.tokenizer)
                start = time.perf_counter()
                fit(trainer, examples)
            else:
                trainer = SFTTrainer(
                    policy.model,
                    arguments,
                    train_dataset=to_dataset(examples),
                    processing_class=policy.renderer.tokenizer,
                )
                trainer.pop_callback(PrinterCallback)
                trainer.pop_callback(ProgressCallback)
                start = time.perf_counter()
                trainer.train()
            return time.perf_counter() - start

    train(True), train(False)
    per_example = sum(example.supervised for example in examples) / len(examples)
    tokens = per_example * config.training.per_device_train_batch_size * options.steps
    ratios = []
    for pair in range(options.pairs):
        order = (True, False) if pair % 2 == 0 else (False, True)
        seconds = {ours: train(ours) for ours in order}
        ratios.append(seconds[False] / seconds[True])
        speeds = tokens / seconds[True], tokens / seconds[False]
        print(f"pair {pair + 1}: bcft {speeds[0]:,.0f}, SFTTrainer {speeds[1]:,.0f} tokens/s, ratio {ratios[-1]:.3f}")
    median = statistics.median(ratios)
    print(f"median ratio {median:.3f} of {options.pairs} pairs (range {min(ratios):.3f} to {max(ratios):.3f})")
    return 0 if median >= options.bound else 1


if __name__ == "__main__":
    sys.exit(main())
