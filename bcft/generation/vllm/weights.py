"""The policy's weights on a vLLM server: saved, loaded there, checked; and a server that is gone brought back.

An adapter is loaded at run time, under a name for each version, onto a base that stays as it is: nothing is merged, so
a 4-bit base loses nothing. (`trl vllm-serve` merges adapters and sends whole weights over NCCL.) Full weights are a
directory that the server is started on anew.
"""

import json
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bcft.config.engine import EngineSettings
from bcft.errors import FaultError, ServerError, UsageError
from bcft.generation.vllm.base import save_base
from bcft.generation.vllm.checks import check_adapter, check_vocabulary, fingerprint, largest_rank, probe
from bcft.generation.vllm.client import Broken, Client, Refused
from bcft.generation.vllm.server import Server
from bcft.policy.loading import Policy, save_policy
from bcft.policy.shape import context_length
from bcft.runs.distributed import broadcast, rank, world_size
from bcft.runs.progress import Progress
from bcft.runs.storage import storage

MOST_RESTARTS = 3
"""Times that a server may end during a rollout and is brought back."""
_BASE = "bcft"
"""The name by which a server that this starts knows its model; adapters have names that begin with it."""
_NUMBERS = {"no": "", "bf16": "bfloat16", "fp16": "float16"}
_MOST_TRIES = 3
_LOOK = 1.0


class Weights:
    """What a server plays, and where it is.

    server: one to start; None for one that runs at `vllm_server_base_url` and is left running. directory: where weights
    are saved for it, and removed again. say: prints a line; label: from a phase to the label of its progress.
    """

    client: Client
    model: str
    """The name to give in requests."""

    def __init__(
        self,
        settings: EngineSettings,
        directory: Path,
        server: Server | None,
        *,
        key: str = "",
        say: Callable[[str], None] = lambda _: None,
        label: Callable[[str], str] = str,
    ) -> None:
        self.settings = settings
        self.say = say
        self.label = label
        self.directory = directory.absolute()
        self.server = server
        self.client = Client(settings.vllm_server_base_url or "http://127.0.0.1", key=key)
        self.model = _BASE
        self.context = 0
        self.starts = 0
        self._restarts = 0
        self._first = True
        self._played = ""  # the fingerprint of what the server plays
        self._adapter: Path | None = None
        self._arguments: list[str] = []

    def sync(self, policy: Policy) -> None:
        """Let the server play the policy's weights, unless it does; call it before each rollout, on every process.

        Raises UsageError for weights that vLLM or the server cannot take, ServerError when it does not start or answer,
        FaultError when it does not play the policy.
        """
        self._restarts = 0
        if rank() == 0:
            tries = 0
            while not self._synced(policy, last=tries == _MOST_TRIES - 1):
                tries += 1
                time.sleep(_LOOK)
        place = broadcast((self.client.url, self.client.key, self.model, self.context))
        if rank() > 0:
            url, key, self.model, self.context = place
            self.client = Client(url, key=key)

    def mend(self, broken: Broken) -> bool:
        """Bring a server back that is gone; return whether it was. Raises ServerError when it is gone too often."""
        if self._well():
            return False
        self._restarts += 1
        if self._restarts > MOST_RESTARTS:
            raise ServerError(f"the vLLM server has ended {self._restarts} times in a rollout: {self._why(broken)}")
        if self.server is not None:
            self.say(f"vLLM: the server does not answer ({self._why(broken)}); it is started again")
            self._start()
        else:
            self._wait(broken)
            self._restore_adapter()
        self.starts += 1
        return True

    def _well(self) -> bool:
        """Return whether the server answers; one whose process runs may be busy, and is asked several times."""
        for _ in range(_MOST_TRIES):
            if self.client.healthy():
                return True
            if self.server is None or not self.server.running():
                return False
            time.sleep(_LOOK)
        return False

    def restore_adapter(self) -> None:
        """Load the adapter again on a server that has lost it: it was restarted by others. Raises FaultError if not."""
        self._restarts += 1
        lost = rank() == 0 and (self._adapter is None or self.server is not None)
        if lost or self._restarts > MOST_RESTARTS:
            raise FaultError(f"the vLLM server has no model {self.model!r} any more")
        if rank() == 0:
            self._restore_adapter()
        else:
            time.sleep(_LOOK)  # process 0 finds out as well
        self.starts += 1

    def close(self) -> None:
        """End the server, or unload the adapter from one that goes on, and remove the saved weights."""
        if self.server is not None:
            self.server.stop()
        elif self._adapter is not None and rank() == 0:
            self._unload(self.model)
        if rank() == 0:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _synced(self, policy: Policy, *, last: bool) -> bool:
        """Sync; return False when an answer of a healthy server broke. last: raise ServerError then."""
        try:
            self._sync(policy)
        except Refused as refused:
            raise FaultError(f"the vLLM server refused a request: {refused}") from refused
        except Broken as broken:
            if last or not self.client.healthy():
                raise ServerError(f"the vLLM server does not answer: {self._why(broken)}") from broken
            return False
        return True

    def _sync(self, policy: Policy) -> None:
        if policy.adapter:
            check_adapter(policy)
        played = fingerprint(policy)
        if played == self._played and (self.server is None or self.server.running()):
            return
        self._played = ""
        before, place = self._adapter, self.directory / played
        with Progress(self.label("vLLM, saving the weights")), storage(place):
            if self._first:
                shutil.rmtree(self.directory, ignore_errors=True)  # of a run that was killed
            place.mkdir(parents=True, exist_ok=True)
            save_policy(policy, place)
        if self.server is not None:
            self._serve(policy, place)
        elif policy.adapter:
            self._load(place)
        self._take_card(policy)
        check_vocabulary(policy, self.client, self.model)
        self._probe(policy, place)
        if before is not None and before != place:
            self._unload(f"{_BASE}-{before.name}")
        for old in self.directory.iterdir():
            if old.name not in (played, _BASE):
                shutil.rmtree(old, ignore_errors=True)
        self._played, self._first = played, False

    def _probe(self, policy: Policy, place: Path) -> None:
        """Check that the server plays the policy; give full weights to one that runs already and plays others."""
        fixed = self.server is None and not policy.adapter
        if fixed and not self._first:
            self._reload(place)
        try:
            probe(policy, self.client, self.model, context=self.context)
        except FaultError:
            if not (fixed and self._first):
                raise
            self._reload(place)
            probe(policy, self.client, self.model, context=self.context)

    def _serve(self, policy: Policy, place: Path) -> None:
        """Start a server on the weights, or load an adapter into the one that runs."""
        assert self.server is not None
        if policy.adapter and self.server.running() and self.client.healthy():
            self._load(place)
            return
        model = self._save_base(policy) if policy.adapter else str(place)
        self._arguments = self._arguments_for(policy, model)
        if policy.adapter:
            self._adapter, self.model = place, f"{_BASE}-{place.name}"
        self._start()

    def _arguments_for(self, policy: Policy, model: str) -> list[str]:
        settings, precision = self.settings, policy.precision
        numbers = _NUMBERS[precision.autocast] or str(precision.weights).removeprefix("torch.")
        arguments = [
            "--model", model, "--served-model-name", _BASE, "--dtype", numbers,
            "--generation-config", "vllm", "--logprobs-mode", "raw_logprobs",
            "--gpu-memory-utilization", str(settings.vllm_gpu_memory_utilization),
            "--tensor-parallel-size", str(settings.vllm_tensor_parallel_size),
        ]  # fmt: skip
        if settings.vllm_max_model_length:
            arguments += ["--max-model-len", str(settings.vllm_max_model_length)]
        if precision.device == "cpu":
            arguments.append("--enforce-eager")  # compiling takes longer than it saves
        if policy.adapter:
            # The next adapter is loaded before this one is unloaded.
            arguments += ["--enable-lora", "--max-lora-rank", str(largest_rank(policy)), "--max-cpu-loras", "2"]
        return arguments

    def _start(self) -> None:
        """Start the server on the weights it is to play, under the port that other processes know."""
        if self.server is None or rank() > 0:
            return self._wait(Broken("it is being started"))
        arguments = [*self._arguments, "--seed", str(secrets.randbelow(2**31))]  # else each start repeats its noise
        if self._adapter is not None:
            arguments += ["--lora-modules", json.dumps({"name": self.model, "path": str(self._adapter)})]
        self.client = self.server.start(arguments, port=self.server.port if world_size() > 1 else 0)
        return None

    def _save_base(self, policy: Policy) -> str:
        """Write the base of an adapter as it is in memory; return its place.

        What its name stands for may differ from it: a GGUF file, another revision, another precision. Of a base in 4
        bits the server gets the numbers that its layers multiply with.
        """
        place = self.directory / _BASE
        with Progress(self.label("vLLM, saving the base")), storage(place):
            save_base(policy, place)
        return str(place)

    def _load(self, place: Path) -> None:
        """Load an adapter under a name of its own: the server's prefix cache goes by the name."""
        name = f"{_BASE}-{place.name}"
        try:
            self.client.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(place)})
        except Refused as refused:
            if refused.status == 404 and "adapter" in str(refused).lower():
                raise UsageError(
                    f"vllm_server_base_url: that server finds no adapter at {place}: it must run where it can read the "
                    f"run's directory under the same path"
                ) from refused
            if refused.status in (404, 405):
                raise UsageError(
                    "vllm_server_base_url: that server takes no adapters: start it with --enable-lora and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or leave vllm_server_base_url out"
                ) from refused
            if "already been loaded" not in str(refused):
                raise FaultError(f"the vLLM server does not load the adapter: {refused}") from refused
        except Broken as broken:  # what an engine cannot load is a server's error, too
            raise FaultError(f"the vLLM server does not load the adapter: {broken}") from broken
        self._adapter, self.model = place, name

    def _unload(self, name: str) -> None:
        try:
            self.client.post("/v1/unload_lora_adapter", {"lora_name": name}, seconds=60)
        except (Refused, Broken):  # it is gone already, and nothing asks for it any more
            return

    def _restore_adapter(self) -> None:
        if self._adapter is not None:
            self._load(self._adapter)

    def _reload(self, place: Path) -> None:
        """Let a server that runs already read full weights, through endpoints that vLLM has for its developers."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(place)}}
        try:
            self.client.post("/collective_rpc", call)
            self.client.post("/reset_prefix_cache", {})
        except Refused as refused:
            raise UsageError(
                "vllm_server_base_url: that server plays other weights and takes no new ones: train an adapter with "
                "use_peft: true, or leave vllm_server_base_url out, and the run starts a server of its own; one that "
                "is started with VLLM_SERVER_DEV_MODE=1 has endpoints for it, which vLLM makes for its developers"
            ) from refused

    def _take_card(self, policy: Policy) -> None:
        """Note how many tokens both read, and by which name the server knows its model."""
        cards = self.client.get("/v1/models")["data"]
        card: dict[str, Any] = next(card for card in cards if not card.get("parent"))
        own = context_length(policy.model.config)
        self.context = min(own, int(card.get("max_model_len") or own))
        if not policy.adapter:
            self.model = str(card["id"])

    def _wait(self, broken: Broken) -> None:
        """Wait for a server that others start."""
        deadline = time.monotonic() + self.settings.vllm_server_timeout
        with Progress(self.label("waiting for the vLLM server")):
            while not self.client.healthy():
                if time.monotonic() > deadline:
                    raise ServerError(f"the vLLM server at {self.client.url} does not answer: {broken}")
                time.sleep(_LOOK)

    def _why(self, broken: Broken) -> str:
        if self.server is None or rank() > 0:
            return f"{broken}, at {self.client.url}"
        return f"{self.server.reason()}: see {self.server.log}"
