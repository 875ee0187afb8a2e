"""The engine that samples: the program's own, a vLLM server, or any OpenAI-compatible chat server."""

import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal
from urllib.parse import urlsplit

from bcft.config.declare import PLAYING, Conflict, Settings, library, own
from bcft.errors import UsageError

COLLECTING = ("collect", "evaluate")
"""The commands whose attempts a policy that is not trained may play."""
SERVING = ("vllm_command", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size")
"""Keys of a vLLM server that the run starts itself."""
_KEY_OF = {"base_url": "OPENAI_API_KEY", "vllm_server_base_url": "VLLM_API_KEY"}
"""The key of an address -> the variable of the environment that holds the server's key."""
_SECRET = re.compile(r"--api[-_]key|--hf[-_]token|\b(VLLM_API_KEY|HF_TOKEN|HUGGING_FACE_HUB_TOKEN)=")
"""What gives vLLM a key on its command line."""
_vllm = partial(library, commands=PLAYING)
_openai = partial(own, commands=COLLECTING)


@dataclass(frozen=True)
class EngineSettings(Settings):
    """The engine, the server behind it and the limits of what is asked of it."""

    engine: Literal["hf", "vllm", "openai"] = own(
        "hf",
        "what samples the policy. hf: transformers, in this process; vllm: a vLLM server, which the run starts or "
        "finds at vllm_server_base_url; openai: in collect and evaluate, served_model at base_url, any server with "
        "OpenAI's chat API, its text tokenized for model_name_or_path",
        commands=PLAYING,
    )
    vllm_server_base_url: str | None = _vllm(
        "vllm_server_base_url",
        note="vLLM's own OpenAI server; not that of `trl vllm-serve`, which merges adapters into the base, and a 4-bit "
        "base does not survive that; null: the run starts a server of its own",
    )
    vllm_server_timeout: float = _vllm(
        "vllm_server_timeout", note="in seconds; higher waits longer for a large model", limits="> 0"
    )
    vllm_command: tuple[str, ...] | None = own(
        None,
        "the words that start a vLLM server, such as [/opt/vllm/bin/python, -m, vllm.entrypoints.openai.api_server], "
        "with further arguments of vLLM where need be, such as --enforce-eager; model, address and limits are added; "
        "null: the Python that runs bcft",
        commands=PLAYING,
    )
    vllm_gpu_memory_utilization: float = _vllm(
        "vllm_gpu_memory_utilization",
        note="the share that a server started by the run takes; higher is faster and leaves less for training",
        limits="> 0 and <= 1",
    )
    vllm_max_model_length: int | None = _vllm(
        "vllm_max_model_length",
        note="in tokens, prompt and completion together; higher needs more memory; null: as the model has it",
        limits=">= 1",
    )
    vllm_tensor_parallel_size: int = _vllm(
        "vllm_tensor_parallel_size", note="GPUs of a server; more hold a larger model", limits=">= 1"
    )
    base_url: str | None = _openai(
        None,
        "the address of a server with OpenAI's chat API, such as http://127.0.0.1:8000/v1; its key, if it wants one, "
        "is OPENAI_API_KEY in the environment",
    )
    served_model: str | None = _openai(None, "the name by which the server at base_url knows its model")
    max_requests: int | None = _openai(
        None,
        "most requests sent in a run, repeated and resumed ones included, those refused as too many (429) left out; "
        "higher may cost more; null: no limit",
        limits=">= 1",
    )
    max_total_tokens: int | None = _openai(
        None,
        "most tokens of prompts and completions in a run, as the server counts them; no request is sent beyond it, and "
        "those in flight are still answered; higher may cost more; null: no limit",
        limits=">= 1",
    )
    concurrency: int = own(
        32,
        "requests in flight to a server; more are faster, up to what the server takes",
        commands=PLAYING,
        limits=">= 1",
    )

    @property
    def served(self) -> str:
        """The model that a server samples in the place of the recipe's; '' where it is the recipe's."""
        return self.served_model or "" if self.engine == "openai" else ""

    @property
    def at_once(self) -> int | None:
        """Most conversations at a time; None: all. An answer that is paid for is on the disk with its conversation."""
        return 2 * self.concurrency if self.engine == "openai" else None

    @property
    def noise(self) -> str:
        """A line about sampling noise that is not a function of the attempt's identity; '' where it is."""
        if self.engine == "hf":
            return ""
        return (
            f"sampling: {self.engine} draws its own noise, so a repeated run plays other attempts; comparisons stay "
            f"paired by problem"
        )

    @property
    def command(self) -> tuple[str, ...]:
        """The words of `vllm_command`; a single one is read as a shell would read it; () for the default."""
        words = self.vllm_command or ()
        return tuple(shlex.split(words[0])) if len(words) == 1 else tuple(words)

    def conflicts(self) -> Iterator[Conflict]:
        """Yield what a served engine lacks, addresses that are none, and settings of a server that runs already."""
        for key in ("base_url", "served_model") if self.engine == "openai" else ():
            if not getattr(self, key):
                example = "such as http://127.0.0.1:8000/v1" if key == "base_url" else "the server's name of its model"
                yield ("engine", key), f"openai needs {key}, {example}"
        for key, variable in _KEY_OF.items():
            if reason := _no_address(getattr(self, key), variable):
                yield (key,), reason
        if reason := self._no_command():
            yield ("vllm_command",), reason
        if self.vllm_server_base_url:
            defaults = EngineSettings.__dataclass_fields__
            for key in SERVING:
                if getattr(self, key) != defaults[key].default:
                    yield (key,), "has no effect with vllm_server_base_url, a server that runs already: leave it out"

    def _no_command(self) -> str:
        """Return why `vllm_command` starts no server; '' if it may. Its words are not shown: one may be a secret."""
        if _SECRET.search(" ".join(self.vllm_command or ())):
            return (
                "holds a key; keys never go into recipes: a server that the run starts gets a random one, and for the "
                "Hub set HF_TOKEN in the environment instead"
            )
        try:
            words = self.command
        except ValueError:  # of shlex
            return "has a quote or a backslash without its counterpart: give a list of words"
        return "" if words or self.vllm_command is None else "is empty: give the words that start a vLLM server"


def key_from(variable: str) -> str:
    """Return a server's key from a variable of the environment, '' if it is not set; spaces around it are dropped.

    Raises UsageError, which does not show it, for a key that no header can hold.
    """
    key = os.environ.get(variable, "").strip()
    if all("!" <= letter <= "~" for letter in key):
        return key
    raise UsageError(
        f"{variable}: holds a space, a control character or a letter that is not ASCII, which no server's key does: "
        f"set it again in the environment"
    )


def _no_address(given: str | None, variable: str) -> str:
    """Return why a key's value is no address of a server; '' if it is one. variable: for the server's key."""
    if given is None:
        return ""
    try:
        parts = urlsplit(given)
        known = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # a port that is no number
        return "wants an address such as http://127.0.0.1:8000"
    if "@" in parts.netloc or parts.query:  # not shown: it may be a secret
        return f"holds a password or a key; keys never go into recipes, set {variable} in the environment instead"
    return "" if known else "wants an address such as http://127.0.0.1:8000"
