"""One step on weighted rows in a process of torchrun, for each reduction; writes the weights after it.

torchrun --nproc_per_node 2 -m helpers.weighted_step DIRECTORY REDUCTIONS_JSON
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from bcft.runs.distributed import rank
from bcft.testing import tiny_tokenizer

TEST = Path(__file__).parents[1] / "training" / "test_weights.py"

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("test_weights", TEST)
    laws = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(laws)
    root = Path(sys.argv[1])
    for reduction in json.loads(sys.argv[2]):
        fields = {"loss_reduction": reduction, "per_device_train_batch_size": 2}
        rows = laws.examples(laws.WEIGHTS)
        weights, _ = laws.after_a_step(rows, root / "two", tiny_tokenizer(["a b c"]), **fields)
        plain = {name.removeprefix("module."): values.contiguous() for name, values in weights.items()}
        save_file(plain, root / f"{reduction}_{rank()}.safetensors")
    torch.distributed.destroy_process_group()
