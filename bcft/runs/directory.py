"""The run directory: one process at a time, one recipe, and beside the results what they were made with."""

import fcntl
import functools
import hashlib
import importlib.util
import logging
import os
import platform
import re
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from bcft.config.keys import KEYS
from bcft.errors import BcftError, LockedError, Preempted, UsageError
from bcft.runs.distributed import world_size
from bcft.runs.drift import GRADING, MODEL
from bcft.runs.storage import (
    MANIFEST,
    committed,
    finished,
    plain,
    read_json,
    read_yaml,
    storage,
    write_json,
    write_jsonl,
    write_text,
)
from bcft.types import Problem

PACKAGES = ("bcft", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes", "math-verify")
MAY_DIFFER = frozenset(
    {
        *("output_dir", "against", "report_to", "run_name", "project", "disable_tqdm", "dataloader_num_workers"),
        *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("per_device_eval_batch_size", "logging_steps", "logging_strategy", "logging_first_step"),
        *("save_steps", "save_strategy", "save_total_limit"),
        *("vllm_server_base_url", "vllm_server_timeout", "vllm_command", "vllm_gpu_memory_utilization"),
        *("vllm_tensor_parallel_size", "base_url", "max_requests", "max_total_tokens", "concurrency"),
    }
)
"""Keys that a resumed run may change: they alter no figure and no weight."""
PATHS = frozenset({"model_name_or_path", "dataset_name", "replay_dataset", "chat_template_path"})
"""Keys whose value may be a path, which can be spelled in several ways."""


class RunDirectory:
    """The directory of a run, held by this process.

    recipe: the keys that decide the result. writes: only rank 0 does. allow_drift: a resumed run may differ from what
    the directory was started with; `drift` holds the keys that do, and words for what else does. command_line: what
    started it, as text. `prolonged`: there are more rounds to play than the run was started with.
    """

    def __init__(
        self,
        path: Path,
        *,
        command: str,
        recipe: Mapping[str, Any],
        writes: bool = True,
        allow_drift: bool = False,
        command_line: str = "",
    ) -> None:
        self.path = path
        self.command = command
        self.command_line = command_line
        self.recipe = recipe
        self.writes = writes
        self.allow_drift = allow_drift
        self.drift: frozenset[str] = frozenset()
        self.prolonged = False
        self._opened = time.time()
        self._started = False

    @property
    def finished(self) -> bool:
        """Whether a run was committed here. Raises CheckpointError when one of its files has changed since."""
        return finished(self.path)

    def check_recipe(self) -> None:
        """Raise UsageError that lists the keys that differ, if a run was started here with another recipe.

        More rounds than before prolong a run; fewer would undo some, and are another recipe.
        """
        file = self.path / "config.yaml"
        if not file.is_file():
            return
        before = read_yaml(file)
        keys = sorted((before.keys() | self.recipe.keys()) - MAY_DIFFER)
        values = {key: (_value(before, key), _value(self.recipe, key)) for key in keys}
        differing = {key: pair for key, pair in values.items() if not _same(key, *pair)}
        self.prolonged = _more(*differing.get("num_rounds", (0, 0)))
        if self.prolonged:
            del differing["num_rounds"]
        lines = [f"{key} was {old!r}, now {new!r}" for key, (old, new) in differing.items()]
        if _more(*reversed(differing.get("num_rounds", (0, 0)))):
            lines.append("num_rounds may be raised, to prolong the run, and not lowered")
        repaired = frozenset(
            key for key, pair in differing.items() if key in GRADING and _names(pair[0]) == _names(pair[1])
        )
        self._check_drift(frozenset(differing), lines, "another recipe", repaired=repaired)

    def check_data(self, digest: str) -> None:
        """Raise UsageError if a run was started here with data of another hash."""
        file = self.path / "versions.json"
        if file.is_file() and read_json(file)["data"] != digest:
            self._check_drift(frozenset({"the data"}), ["the dataset's rows have changed"], "other data")

    def check_versions(self) -> None:
        """Raise UsageError if a run was started here with other packages, processes, or weights in its model's file."""
        file = self.path / "versions.json"
        if not file.is_file():
            return
        before, now = read_json(file), versions(self.recipe)
        old, new = ({**seen["packages"], "processes": seen["world_size"]} for seen in (before, now))
        # What a recipe's data or model adds may not have been recorded yet.
        old = {**{name: new[name] for name in new if name not in PACKAGES}, **old}
        drift = [f"{name} was {old.get(name, '')}, now {new[name]}" for name in new if old.get(name, "") != new[name]]
        self._check_drift(frozenset({"versions"} if drift else ()), drift, "other versions or processes")
        was, is_now = before.get("weights"), now.get("weights")
        if was and is_now and was != is_now:
            old_file, new_file = (f"{seen['bytes']:,} bytes, SHA-256 {seen['sha256'][:12]}" for seen in (was, is_now))
            lines = [f"it had {old_file}, now {new_file}"]
            self._check_drift(frozenset({"model_name_or_path"}), lines, "another GGUF file of the same name")

    def _check_drift(
        self, drift: frozenset[str], lines: Sequence[str], what: str, *, repaired: frozenset[str] = frozenset()
    ) -> None:
        """Raise UsageError with the lines unless drift is allowed.

        Whatever is allowed, a finished run that is not prolonged is not made anew, and committed rounds are continued
        with the model and the grading that they have. repaired: keys that name the same functions with other source:
        such a run continues, as one does whose functions are named by dotted paths.
        """
        listed = ";\n  ".join(lines)
        started = f"{self.path} was started with {what} ({listed})"
        remedy = "give another output_dir, or remove it"
        if drift and self.finished and not self.prolonged:
            raise UsageError(f"{started}: it is finished: {remedy}")
        if (fixed := sorted((drift - repaired) & (GRADING | MODEL))) and committed(self.path / "round_001"):
            again = ", or grade its rollouts again with `bcft refilter`" if drift & GRADING else ""
            raise UsageError(f"{started}: its rounds were made with {', '.join(fixed)}: give another output_dir{again}")
        if drift and not self.allow_drift:
            raise UsageError(f"{started}: {remedy}, or pass --allow-drift")
        self.drift |= drift - repaired

    def changed_functions(self, functions: Sequence[str]) -> str:
        """Return a note if a run was started here with other source of these functions; '' if not.

        A recipe names a function, so a repaired one resumes the run. functions: as `rewards.base.described` says.
        """
        file = self.path / "versions.json"
        before = read_json(file).get("functions", []) if file.is_file() else []
        changed = [name for name in functions if name not in before and _names(name) in map(_names, before)]
        if not changed:
            return ""
        names = ", ".join(str(_names(name)) for name in changed)
        return f"rewards: {names} changed since the run was started; what was graded before keeps its old grades"

    def record(self, problems: Sequence[Problem], digest: str, *, functions: Sequence[str] = ()) -> None:
        """Write what the results depend on: recipe, versions, hardware, and the problems that are attempted.

        digest: a hash of the data; functions: those that grade, with a hash of their source. A prolonged run is
        unfinished from here on, and keeps its other files.
        """
        if not self.writes:
            return
        (self.path / MANIFEST).unlink(missing_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(dict(self.recipe), allow_unicode=True))
        write_json(self.path / "versions.json", {**versions(self.recipe), "data": digest, "functions": list(functions)})
        rows = ({**problem.columns, "problem_id": problem.id, "prompt": problem.prompt} for problem in problems)
        write_jsonl(self.path / "problems.jsonl", map(plain, rows))
        self.write_status("running")

    def write_status(self, state: str, *, exit_code: int = 0, message: str = "") -> None:
        """Write `status.json`: what a launcher that loses exit codes can still read."""
        self._started = True
        if self.writes and self.path.is_dir():
            write_json(
                self.path / "status.json",
                {
                    "state": state,
                    "exit_code": exit_code,
                    "message": message,
                    "command": self.command,
                    "command_line": self.command_line,
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "seconds": round(time.time() - self._opened, 1),
                },
            )

    def close(self, state: str, *, exit_code: int, message: str) -> None:
        """Write how the command ended; a refused command says nothing about a run that is here already."""
        if self._started or not (self.path / "status.json").exists():
            self.write_status(state, exit_code=exit_code, message=message)


@contextmanager
def open_run(
    path: Path,
    *,
    command: str,
    recipe: Mapping[str, Any],
    writes: bool = True,
    allow_drift: bool = False,
    debug: bool = False,
    command_line: str = "",
) -> Iterator[RunDirectory]:
    """Hold a directory while the run works in it, and leave its outcome in `status.json`.

    Raises LockedError when another process holds it, StorageError when it cannot be written.
    """
    run = RunDirectory(
        path, command=command, recipe=recipe, writes=writes, allow_drift=allow_drift, command_line=command_line
    )
    if not writes:
        with quiet_libraries(debug=debug):
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
        state, code, message = "failed", BcftError.exit_code, "unexpected error; see the traceback"
        try:
            with quiet_libraries(debug=debug):
                yield run
            state, code, message = "done", 0, ""
        except BcftError as error:
            code, message = error.exit_code, str(error)
            raise
        except KeyboardInterrupt:
            code, message = Preempted.exit_code, "interrupted"
            raise
        finally:
            state = "preempted" if code == Preempted.exit_code else state
            run.close(state, exit_code=code, message=message)


_LIBRARIES = (
    r"(bcft|torch|transformers|trl|peft|accelerate|datasets|bitsandbytes|huggingface_hub|safetensors|tokenizers|"
    r"math_verify|latex2sympy2_extended|sympy|numpy|pandas|pyarrow|matplotlib)(\.|$)"
)
"""Modules whose warnings a user can do nothing about."""


@contextmanager
def quiet_libraries(*, debug: bool) -> Iterator[None]:
    """Hide the libraries' notes to their own developers from users, unless `debug`; users' own code may warn."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    with warnings.catch_warnings():
        if not debug:
            logger.setLevel(logging.ERROR)
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", category=UserWarning, module=_LIBRARIES)
        try:
            yield
        finally:
            logger.setLevel(before)


def versions(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a result depends on besides the recipe: packages, Python, hardware, the weights of a GGUF file."""
    import torch  # noqa: PLC0415 - commands check recipe and data before they load it

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    named = [str(recipe.get(key) or "") for key in ("dataset_name", "replay_dataset")]
    generated = any(name.startswith("reasoning-gym:") for name in named)
    gguf = recipe.get("gguf_file") or str(recipe.get("model_name_or_path")).endswith(".gguf")
    more = [package for package, used in (("reasoning-gym", generated), ("gguf", gguf)) if used]
    file = _gguf_file(recipe)
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in (*PACKAGES, *more)},
        **({"weights": _digest(file, file.stat().st_mtime_ns, file.stat().st_size)} if file else {}),
        "cpu": _cpu(),
        "cpus": os.cpu_count() or 0,
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "world_size": world_size(),
    }


def _gguf_file(recipe: Mapping[str, Any]) -> Path | None:
    """Return the GGUF file on this machine that a recipe names; None where it names none, or it is not there.

    A file on the Hub is fixed by `model_revision`, as other models are.
    """
    name, file = str(recipe.get("model_name_or_path") or ""), str(recipe.get("gguf_file") or "")
    places = [name]
    if name.startswith("package:"):
        package, _, file = name.removeprefix("package:").partition("/")
        try:
            found = importlib.util.find_spec(package) if package.isidentifier() else None
        except ValueError:  # a module without a place, such as __main__
            found = None
        places = list((found and found.submodule_search_locations) or ())
    paths = (Path(place, file) for place in places)
    return next((p for p in paths if p.suffix == ".gguf" and p.is_file() and os.access(p, os.R_OK)), None)


@functools.lru_cache(maxsize=8)
def _digest(file: Path, changed: int, size: int) -> dict[str, Any]:  # noqa: ARG001 - the key
    """Return size and SHA-256 of a file, which is read again when it was changed."""
    with file.open("rb") as content:
        return {"bytes": size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _names(value: Any) -> Any:
    """Return the names of Python functions without the hashes of their source."""
    if isinstance(value, list | tuple):
        return [_names(item) for item in value]
    return re.sub(r"@[0-9a-f]{8}\b.*$", "", value) if isinstance(value, str) else value


def _value(recipe: Mapping[str, Any], key: str) -> Any:
    """Return a key's value; its default where the recipe leaves it out."""
    return recipe[key] if key in recipe or key not in KEYS else KEYS[key].default


def _same(key: str, old: Any, new: Any) -> bool:
    """Return whether two values mean the same: a path may be spelled in several ways."""
    if old == new or key not in PATHS:
        return bool(old == new)
    try:
        return Path(str(old)).samefile(str(new))
    except OSError:
        return False


def _more(old: Any, new: Any) -> bool:
    """Return whether both are numbers of rounds and the second is higher."""
    return isinstance(old, int) and isinstance(new, int) and new > old


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
