"""What stays in a directory when its run is resumed with another recipe: by the section of each key that differs."""

import shutil
from collections.abc import Collection
from pathlib import Path

from bcft.config.keys import KEYS
from bcft.runs.storage import KEPT, ROLLOUTS, SCORES, SEAL

GRADING = frozenset({"reward_funcs", "reward_weights", "reward_args", "success_func"})
"""Keys that change what attempts are worth, and no attempt."""
MODEL = frozenset(
    {
        *("model_name_or_path", "model_revision", "gguf_file", "use_peft", "use_rslora", "use_dora"),
        *("load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"),
        *(key for key in KEYS if key.startswith("lora_")),
    }
)
"""Keys that decide which weights there are: those of a committed round fit no other model."""
_PLAYED = ("model", "data", "sampling", "engine", "environment")


def replays(drift: Collection[str]) -> bool:
    """Return whether attempts of an unfinished round would differ."""
    return _touches(drift, _PLAYED, {"seed", "init_from"})


def retrains(drift: Collection[str]) -> bool:
    """Return whether weights that are trained on the same rows would differ."""
    return _touches(drift, ("model", "data", "training", "rounds"))


def remeasures(drift: Collection[str]) -> bool:
    """Return whether the evaluation of the same weights would differ."""
    return _touches(drift, (*_PLAYED, "evaluation"), {"seed", *GRADING})


def discard_attempts(directory: Path, drift: Collection[str]) -> None:
    """Delete what an unfinished round has of another recipe and this one would read.

    Attempts and answers stay in their journals where they would not differ; the files are made of them again.
    """
    if replays(drift):
        shutil.rmtree(directory / "journal", ignore_errors=True)
    if drift:
        for name in (ROLLOUTS, SCORES, KEPT, SEAL):
            (directory / name).unlink(missing_ok=True)


def _touches(drift: Collection[str], sections: Collection[str], keys: Collection[str] = ()) -> bool:
    """Return whether one of the keys, or of a section's, differs; what is no key, such as versions, touches all."""
    return any(key in keys or key not in KEYS or KEYS[key].section in sections for key in drift)
