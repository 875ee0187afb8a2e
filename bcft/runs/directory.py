"""The run directory: one process at a time, one recipe, and what was run on what, beside the results."""

import fcntl
import logging
import os
import platform
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from bcft.config.loader import Recipe
from bcft.errors import BcftError, LockedError, Preempted, UsageError
from bcft.runs.distributed import world_size
from bcft.runs.storage import plain, read_json, storage, write_json, write_jsonl, write_text
from bcft.types import Demonstration

PACKAGES = ("bcft", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "math-verify")
MAY_DIFFER = frozenset(
    {
        *(
            "output_dir",
            "against",
            "report_to",
            "run_name",
            "disable_tqdm",
            "dataloader_num_workers",
            "per_device_eval_batch_size",
        ),
        *("logging_steps", "logging_strategy", "logging_first_step", "save_steps", "save_strategy", "save_total_limit"),
    }
)
"""Keys a resumed run may change: they alter no figure and no weight."""


class RunDirectory:
    """The directory of a run, held by this process. Only rank 0 writes."""

    def __init__(self, recipe: Recipe, path: Path, *, writes: bool) -> None:
        self.path = path
        self.recipe = recipe
        self.writes = writes
        self.started = time.time()
        self.begun = False
        self.drifted = False
        """Whether recipe, data or versions differ from what the directory was begun with, as --allow-drift permits."""

    def check_recipe(self) -> None:
        """Raise UsageError that lists the keys that differ, if a run was begun here with another recipe."""
        file = self.path / "config.yaml"
        if not file.is_file():
            return
        before, now = yaml.safe_load(file.read_text(encoding="utf-8")) or {}, self.recipe.resolved()
        keys = sorted((before.keys() | now.keys()) - MAY_DIFFER)
        drift = [f"{k} was {before.get(k)!r}, now {now.get(k)!r}" for k in keys if before.get(k) != now.get(k)]
        self._refuse(drift, "was begun with another recipe")

    def check_data(self, digest: str) -> None:
        """Raise UsageError if a run was begun here with data of another hash."""
        file = self.path / "versions.json"
        if file.is_file() and read_json(file)["data"] != digest:
            self._refuse(["the dataset's rows have changed"], "was begun with other data")

    def check_versions(self) -> None:
        """Raise UsageError if a run goes on here with other packages or another number of processes than before."""
        file = self.path / "versions.json"
        if not file.is_file():
            return
        then, now = ({**found["packages"], "processes": found["world_size"]} for found in (read_json(file), versions()))
        drift = [f"{name} was {then.get(name, '')}, now {now[name]}" for name in now if then.get(name, "") != now[name]]
        self._refuse(drift, "was begun with other versions or processes")

    def _refuse(self, drift: Sequence[str], reason: str) -> None:
        if drift and "allow-drift" not in self.recipe.flags:
            raise UsageError(
                f"{self.path} {reason} ({'; '.join(drift)}): "
                f"give another output_dir, or remove it, or pass --allow-drift"
            )
        self.drifted = self.drifted or bool(drift)

    def record(self, problems: Sequence[Demonstration], digest: str) -> None:
        """Write what the results will stand on: recipe, versions, hardware, and the problems that are attempted."""
        if not self.writes:
            return
        write_text(self.path / "config.yaml", yaml.safe_dump(self.recipe.resolved(), allow_unicode=True))
        write_json(self.path / "versions.json", {**versions(), "data": digest})
        rows = ({**d.problem.columns, "problem_id": d.problem.id, "prompt": d.problem.prompt} for d in problems)
        write_jsonl(self.path / "problems.jsonl", map(plain, rows))
        self.status("running")

    def status(self, state: str, *, exit_code: int = 0, message: str = "") -> None:
        """Write `status.json`: what a launcher that loses exit codes can still read."""
        self.begun = True
        if self.writes and self.path.is_dir():
            status = {"state": state, "exit_code": exit_code, "message": message, "command": self.recipe.command}
            write_json(
                self.path / "status.json",
                {
                    **status,
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "seconds": round(time.time() - self.started, 1),
                },
            )


@contextmanager
def open_run(recipe: Recipe, path: Path, *, writes: bool = True) -> Iterator[RunDirectory]:
    """Hold a directory while the run works in it, and leave its outcome in `status.json`.

    Raises LockedError when another process holds it, StorageError when it cannot be written.
    """
    run = RunDirectory(recipe, path, writes=writes)
    if not writes:
        with quiet_libraries(recipe):
            yield run
        return
    with storage(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        lock = (run.path / ".lock").open("a+", encoding="utf-8")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise LockedError(f"{run.path} is in use by {holder}: wait for it, or give another output_dir") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        state, code, message = "failed", BcftError.exit_code, "an error nobody foresaw: see the traceback"
        try:
            with quiet_libraries(recipe):
                yield run
            state, code, message = "done", 0, ""
        except BcftError as error:
            code, message = error.exit_code, str(error)
            raise
        except KeyboardInterrupt:
            code, message = Preempted.exit_code, "interrupted"
            raise
        finally:
            # A command that was refused says nothing of the run that is here already.
            if run.begun or not (run.path / "status.json").exists():
                run.status("preempted" if code == Preempted.exit_code else state, exit_code=code, message=message)


@contextmanager
def quiet_libraries(recipe: Recipe) -> Iterator[None]:
    """Keep the libraries' notes to their own developers from the user's eyes; `--debug` shows them."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    with warnings.catch_warnings():
        if "debug" not in recipe.flags:
            logger.setLevel(logging.ERROR)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", UserWarning)
        try:
            yield
        finally:
            logger.setLevel(before)


def versions() -> dict[str, Any]:
    """Return what a result depends on besides the recipe: packages, Python, hardware."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "cpus": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "world_size": world_size(),
    }


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
