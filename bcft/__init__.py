"""bcft: behavior cloning of language models, plain and filtered."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bcft import collect, evaluate, export, filtered, preview, refilter, report, sft
    from bcft.types import Environment, Feedback, Message, Problem

__version__ = "0.1.0"
__all__ = [
    "Environment", "Feedback", "Message", "Problem", "collect", "evaluate", "export", "filtered", "preview", "refilter",
    "report", "sft",
]  # fmt: skip
_COMMANDS = ("collect", "evaluate", "export", "filtered", "preview", "refilter", "report", "sft")


def __getattr__(name: str) -> Any:
    """Load a public name when it is used: a command imports only what it needs."""
    if name in _COMMANDS:
        return importlib.import_module(f"bcft.{name}")
    if name in __all__:
        return getattr(importlib.import_module("bcft.types"), name)
    raise AttributeError(f"module 'bcft' has no attribute {name!r}")
