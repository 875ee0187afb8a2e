"""The smallest recipe, values that a key can have, and the findings of a recipe that must be refused."""

from collections.abc import Callable
from typing import Any

import pytest

from bcft.config.loader import Config
from bcft.errors import UsageError

BASE = "model_name_or_path: bcft:tiny-math\ndataset_name: bcft:arithmetic\n"
BASE_KEYS = {"model_name_or_path": "bcft:tiny-math", "dataset_name": "bcft:arithmetic"}
BASE_TOKENS = [f"{key}={value}" for key, value in BASE_KEYS.items()]

SAME: list[tuple[str, str, Any]] = [
    ("learning_rate", "1e-6", 1e-6),
    ("learning_rate", "1E5", 1e5),
    ("learning_rate", "3", 3.0),
    ("learning_rate", ".5", 0.5),
    ("num_train_epochs", "2", 2.0),
    ("warmup_steps", "0.03", 0.03),
    ("max_steps", "-1", -1),
    ("seed", "+7", 7),
    ("max_length", "2048", 2048),
    ("max_length", "null", None),
    ("max_length", "~", None),
    ("use_peft", "true", True),
    ("use_peft", "yes", True),
    ("use_peft", "Off", False),
    ("bf16", "no", False),
    ("bf16", "null", None),
    ("save_strategy", "no", "no"),
    ("eval_strategy", "no", "no"),
    ("include_num_input_tokens_seen", "no", "no"),
    ("include_num_input_tokens_seen", "true", True),
    ("run_name", "no", "no"),
    ("run_name", "010", "010"),
    ("run_name", "12:30:45", "12:30:45"),
    ("run_name", "2026-11-22", "2026-11-22"),
    ("run_name", "1e-6", "1e-6"),
    ("run_name", '"x"', "x"),
    ("run_name", "'x y'", "x y"),
    ("run_name", '"null"', "null"),
    ("run_name", "'it''s'", "it's"),
    ("run_name", '"a\\tb \\"c\\""', 'a\tb "c"'),
    ("seed", '"7"', 7),
    ("use_peft", "'true'", True),
    ("overlength", '"raise"', "raise"),
    ("lora_target_modules", "'[q_proj]'", ["q_proj"]),
    ("pad_to_multiple_of", "64", 64),
    ("pad_to_multiple_of", "auto", "auto"),
    ("overlength", "raise", "raise"),
    ("report_to", "none", "none"),
    ("report_to", "[wandb, trackio]", ["wandb", "trackio"]),
    ("lora_target_modules", "all-linear", ["all-linear"]),
    ("lora_target_modules", '["q_proj", v_proj]', ["q_proj", "v_proj"]),
    ("gradient_checkpointing", "true", True),
    ("gradient_checkpointing_kwargs", '{"use_reentrant": false}', {"use_reentrant": False}),
    ("lr_scheduler_kwargs", "{min_lr: 1e-7, n: 3, kind: cos}", {"min_lr": 1e-7, "n": 3, "kind": "cos"}),
    ("lr_scheduler_kwargs", "{a: [1, {b: null}]}", {"a": [1, {"b": None}]}),
]
"""Key, text in a file or on the command line, value."""


def findings(action: Callable[[], Config]) -> list[str]:
    """Return the findings of an action that must be refused."""
    with pytest.raises(UsageError) as caught:
        action()
    return str(caught.value).splitlines()
