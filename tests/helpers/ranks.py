"""A run of `bcft.filtered` that records a hash of this process's weights after each round; started by torchrun.

torchrun --nproc_per_node 2 tests/helpers/ranks.py DIRECTORY KEYS_JSON [FLAG]
"""

import hashlib
import json
import sys
from pathlib import Path

import torch

from bcft import filtered
from bcft.algorithms import filtered_bc
from bcft.runs.distributed import rank

hashes = []
commit = filtered_bc.commit


def recording(run, learner, history, number):
    """Commit the round, and record the weights."""
    commit(run, learner, history, number)
    digest = hashlib.sha256()
    for name, tensor in learner.policy.model.named_parameters():
        digest.update(name.encode() + tensor.detach().float().numpy().tobytes())
    hashes.append(digest.hexdigest())


if __name__ == "__main__":
    root = Path(sys.argv[1])
    filtered_bc.commit = recording
    keys = {**json.loads(sys.argv[2]), "output_dir": str(root / "run")}
    given = {key: value if isinstance(value, str) else json.dumps(value) for key, value in keys.items()}
    assert filtered.main([*(f"{key}={value}" for key, value in given.items()), *sys.argv[3:]]) == 0
    assert not torch.distributed.is_initialized()  # it would abort some of the processes when they end
    (root / f"rank_{rank()}.json").write_text(json.dumps(hashes))
