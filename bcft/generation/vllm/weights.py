"""The policy's weights on a vLLM server: saved, loaded there, checked; and a server that is gone brought back.

An adapter is loaded at run time, under a name for each version, onto a base that stays as it is: nothing is merged, so
a 4-bit base loses nothing. (`trl vllm-serve` merges adapters and sends whole weights over NCCL.) Full weights are a
directory that the server is started on anew; so is another base. A server that runs already reads full weights anew,
if it has the endpoints for it, and each time that others may have restarted it.
"""

import gc
import json
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bcft.config.engine import EngineSettings
from bcft.errors import BcftError, FaultError, ServerError, UsageError
from bcft.generation.vllm.base import save_base
from bcft.generation.vllm.checks import check_adapter, check_vocabulary, fingerprint, largest_rank, probe
from bcft.generation.vllm.client import Broken, Client, Refused
from bcft.generation.vllm.requests import served_model
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
_TAKES_NONE = (
    "vllm_server_base_url: that server plays other weights and takes no new ones: train an adapter with use_peft: "
    "true, or leave vllm_server_base_url out, and the run starts a server of its own; one that is started with "
    "VLLM_SERVER_DEV_MODE=1 has endpoints for it, which vLLM makes for its developers"
)


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
        self._played = ("", "")  # the fingerprints of what the server plays, and of the base below it
        self._base = ""  # the fingerprint of the base below adapters on a server that this has started
        self._adapter: Path | None = None
        self._reloaded: Path | None = None  # full weights that a server which runs already has read
        self._arguments: list[str] = []

    def sync(self, policy: Policy) -> None:
        """Let the server play the policy's weights, unless it does; call it before each rollout, on every process.

        Raises UsageError for weights that vLLM or the server cannot take, ServerError when it does not start or answer,
        FaultError when it does not play the policy.
        """
        self._restarts = 0
        failed: BcftError | None = None
        if rank() == 0:
            try:
                self._sync_with_retries(policy)
            except BcftError as error:  # for the other processes, which wait
                failed = error
        elif self.server is not None:
            _free_memory()
        place = (self.client.url, self.client.key, self.model, self.context, self._reloaded)
        failed, place = broadcast((failed, place))
        if failed is not None:
            raise failed
        if rank() > 0:
            url, key, self.model, self.context, self._reloaded = place
            self.client = Client(url, key=key)

    def mend(self, broken: Broken, policy: Policy) -> bool:
        """Bring a server back that is gone; return whether it was.

        Raises ServerError when it is gone too often, FaultError when it plays something else afterwards.
        """
        if self._healthy():
            if broken.connection and not policy.adapter and self.server is None:
                self._restore(policy)
                self.starts += 1
            return False
        self._restarts += 1
        if self._restarts > MOST_RESTARTS:
            raise ServerError(f"the vLLM server has ended {self._restarts} times in a rollout: {self._why(broken)}")
        if self.server is not None:
            self.say(f"vLLM: the server does not answer ({self._why(broken)}); it is started again")
            self._start()
        else:
            self._wait(broken)
            self._restore(policy)
        self.starts += 1
        return True

    def _healthy(self) -> bool:
        """Return whether the server answers; one whose process runs may be busy, and is asked several times."""
        for _ in range(_MOST_TRIES):
            if self.client.healthy():
                return True
            if self.server is None or not self.server.running():
                return False
            time.sleep(_LOOK)
        return False

    def restore_adapter(self, policy: Policy) -> None:
        """Load the adapter again on a server that has lost it: it was restarted by others. Raises FaultError if not."""
        self._restarts += 1
        lost = rank() == 0 and (self._adapter is None or self.server is not None)
        if lost or self._restarts > MOST_RESTARTS:
            raise FaultError(f"the vLLM server has no model {self.model!r} any more")
        if rank() == 0:
            self._restore(policy)
        else:
            time.sleep(_LOOK)  # process 0 finds out as well
        self.starts += 1

    def close(self) -> None:
        """End the server, or unload the adapter from one that keeps running, and remove the saved weights."""
        if self.server is not None:
            self.server.stop()
        elif self._adapter is not None and rank() == 0:
            self._unload(self.model)
        if rank() == 0:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _sync_with_retries(self, policy: Policy) -> None:
        for tries in range(_MOST_TRIES):
            if self._synced(policy, last=tries == _MOST_TRIES - 1):
                return
            time.sleep(_LOOK)

    def _synced(self, policy: Policy, *, last: bool) -> bool:
        """Sync; return False to try again: an answer broke, and the server is there or can be started again.

        last: raise ServerError then.
        """
        try:
            self._sync(policy)
        except Refused as refused:
            raise FaultError(f"the vLLM server refused a request: {refused}") from refused
        except Broken as broken:
            if last or (self.server is None and not self.client.healthy()):
                raise ServerError(f"the vLLM server does not answer: {self._why(broken)}") from broken
            return False
        return True

    def _sync(self, policy: Policy) -> None:
        if policy.adapter:
            check_adapter(policy)
        played, base = fingerprint(policy), fingerprint(policy, base=True)
        if (played, base) == self._played and (self.server is None or self.server.running()):
            if self.server is None and not policy.adapter:
                self._confirm(policy)
            return
        self._played = ("", "")
        before, place = self._adapter, self.directory / played
        with Progress(self.label("vLLM, saving the weights")), storage(place):
            if self._first:
                shutil.rmtree(self.directory, ignore_errors=True)  # of a run that was killed
            place.mkdir(parents=True, exist_ok=True)
            save_policy(policy, place)
        if self.server is not None:
            self._serve(policy, place, base)
        self._take_card(policy)
        if self.server is None and policy.adapter:
            self._load(place)
        check_vocabulary(policy, self.client, self.model)
        self._probe(policy, place)
        if before is not None and before != place:
            self._unload(_name_of(before))
        if policy.adapter:
            self._reloaded = None
        else:
            self._adapter = None
        for old in self.directory.iterdir():
            if old.name not in (played, _BASE):
                shutil.rmtree(old, ignore_errors=True)
        self._played, self._first = (played, base), False

    def _probe(self, policy: Policy, place: Path) -> None:
        """Check that the server plays the policy; give full weights to one that runs already and plays others."""
        fixed = self.server is None and not policy.adapter
        if fixed and not self._reload(place) and not self._first:
            raise UsageError(_TAKES_NONE)  # a probe cannot tell these weights from those of a few steps later
        try:
            probe(policy, self.client, self.model, context=self.context)
        except FaultError as fault:
            if fixed and self._reloaded is None:
                raise UsageError(_TAKES_NONE) from fault
            raise

    def _confirm(self, policy: Policy) -> None:
        """Check that a server plays full weights which it has been given: others may have restarted it since."""
        if self._reloaded is not None:
            self._reload(self._reloaded)
        probe(policy, self.client, self.model, context=self.context)

    def _serve(self, policy: Policy, place: Path, base: str) -> None:
        """Start a server on the weights, or load an adapter into one that runs on its base and has room for it.

        base: its fingerprint, '' for full weights.
        """
        assert self.server is not None
        arguments = self._arguments_for(policy, str(self.directory / _BASE if policy.adapter else place))
        fits = policy.adapter and base == self._base and arguments == self._arguments
        if fits and self.server.running() and self.client.healthy():
            self._load(place)
            return
        self._arguments, self._base, self._adapter, self.model = arguments, base, None, _BASE
        if policy.adapter:
            self._save_base(policy)
            self._adapter, self.model = place, _name_of(place)
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
        _free_memory()
        self.client = self.server.start(arguments, port=self.server.port if world_size() > 1 else 0)
        return None

    def _save_base(self, policy: Policy) -> None:
        """Write the base of an adapter as it is in memory.

        What its name stands for may differ from it: a GGUF file, another revision, another precision. Of a base in 4
        bits the server gets the numbers that its layers multiply with.
        """
        place = self.directory / _BASE
        with Progress(self.label("vLLM, saving the base")), storage(place):
            shutil.rmtree(place, ignore_errors=True)  # of another base
            save_base(policy, place)

    def _load(self, place: Path) -> None:
        """Load an adapter under a name of its own: the server's prefix cache goes by the name."""
        name = _name_of(place)
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
        except Broken as broken:
            if broken.connection or not self.client.healthy():
                raise
            # What an engine cannot load is a server's error, too.
            raise FaultError(f"the vLLM server does not load the adapter: {broken}") from broken
        self._adapter, self.model = place, name

    def _unload(self, name: str) -> None:
        try:
            self.client.post("/v1/unload_lora_adapter", {"lora_name": name}, seconds=60)
        except (Refused, Broken):  # it is gone already, and nothing asks for it any more
            return

    def _restore(self, policy: Policy) -> None:
        """Give a server that others have restarted what it is to play. Raises ServerError when it does not take it."""
        for tries in range(_MOST_TRIES):
            try:
                if self._adapter is not None:
                    self._load(self._adapter)
                elif not policy.adapter:
                    self._confirm(policy)
                return
            except Refused as refused:
                raise FaultError(f"the vLLM server refused a request: {refused}") from refused
            except Broken as broken:
                if tries == _MOST_TRIES - 1:
                    raise ServerError(f"the vLLM server does not answer: {self._why(broken)}") from broken
                self._wait(broken)
            time.sleep(_LOOK)

    def _reload(self, place: Path) -> bool:
        """Let a server that runs already read full weights, through endpoints that vLLM has for its developers.

        Return whether it has them.
        """
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(place)}}
        try:
            self.client.post("/collective_rpc", call)
            self.client.post("/reset_prefix_cache", {})
        except Refused as refused:
            if refused.status not in (404, 405):
                raise
            self._reloaded = None
            return False
        except Broken as broken:
            if broken.connection or not self.client.healthy():
                raise
            raise FaultError(
                f"the vLLM server does not read the weights at {place}, where it must find them as well: {broken}"
            ) from broken
        self._reloaded = place
        return True

    def _take_card(self, policy: Policy) -> None:
        """Note how many tokens both read, and by which name the server knows its model."""
        name, length = served_model(self.client)
        own = context_length(policy.model.config)
        self.context = min(own, length or own)
        if not policy.adapter:
            self.model = name

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


def _name_of(place: Path) -> str:
    """Return the name by which a server knows a saved adapter."""
    return f"{_BASE}-{place.name}"


def _free_memory() -> None:
    """Give a GPU's memory back that nothing holds: vLLM does not start where its share is not free."""
    gc.collect()
    torch.cuda.empty_cache()
