"""One step of a tiny network on weighted rows; as a program of torchrun, in each of its processes.

torchrun --nproc_per_node 2 -m helpers.weighted_step DIRECTORY REDUCTIONS_JSON
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from bcft.config.schema import TrainingSettings
from bcft.runs.distributed import leave, rank
from bcft.testing import tiny_tokenizer
from bcft.training.trainer import BCTrainer, training_arguments
from bcft.types import IGNORED, TrainingExample

VOCABULARY = 40
WEIGHTS = (0.25, 3.0, 1.0, 0.5)


def model(*, lora=False):
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0,
        )
    )  # fmt: skip
    if not lora:
        return network
    adapted = get_peft_model(network, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # zero at first: no gradient would reach lora_A
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def examples(weights=(1.0,) * 4):
    """Return an example for each weight, of different lengths, beginning alike."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for index, weight in enumerate(weights):
        prompt, completion = (int(torch.randint(1, 12, (1,), generator=generator)) for _ in range(2))
        ids = [7, 8, 9, *torch.randint(6, VOCABULARY, (prompt + completion,), generator=generator).tolist()]
        labels = (*[IGNORED] * (prompt + 3), *ids[prompt + 3 :])
        made.append(TrainingExample(f"demonstration-{index}", f"p{index}", tuple(ids), labels, weight=weight))
    return made


def trainer(network, rows, directory, tokenizer, **fields):
    settings = TrainingSettings(
        **{
            "learning_rate": 0.05, "optim": "sgd", "max_steps": 1, "per_device_train_batch_size": 4, "seed": 0,
            "logging_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "warmup_steps": 0,
            "passed_through": {
                "report_to": "none", "save_strategy": "no", "train_sampling_strategy": "sequential",
            },
        }
        | fields
    )  # fmt: skip
    arguments = training_arguments(settings, output_dir=directory, autocast="no", use_cpu=True)
    return BCTrainer(network, arguments, examples=rows, tokenizer=tokenizer, reduction=settings.loss_reduction)


def after_a_step(rows, directory, tokenizer, *, lora=False, **fields):
    """Return the trainable weights after one step of plain gradient descent, and the figures that were logged."""
    made = trainer(model(lora=lora), rows, directory, tokenizer, **fields)
    made.train()
    (logged,) = [entry for entry in made.state.log_history if "entropy" in entry]
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}, logged


if __name__ == "__main__":
    root = Path(sys.argv[1])
    for reduction in json.loads(sys.argv[2]):
        weights, _ = after_a_step(
            examples(WEIGHTS), root / "two", tiny_tokenizer(["a b c"]), loss_reduction=reduction,
            per_device_train_batch_size=2,
        )  # fmt: skip
        plain = {name.removeprefix("module."): values.contiguous() for name, values in weights.items()}
        save_file(plain, root / f"{reduction}_{rank()}.safetensors")
    leave()
