"""What a run has asked of a server, counted on the disk as it happens, and the budgets that it holds to."""

import json
import os
from collections import Counter
from pathlib import Path
from threading import Lock

from bcft.config.engine import EngineSettings
from bcft.errors import UsageError
from bcft.runs.storage import storage, write_json

COUNTED = "usage.jsonl"
"""A line for each request sent, and one for each answer, until the sampling is complete."""
TOTAL = "usage.json"
_COUNTS = ("requests", "refused", "prompt_tokens", "completion_tokens")


class Usage:
    """Requests and tokens of a run, those of its interrupted starts included; safe to share among threads."""

    def __init__(self, directory: Path, settings: EngineSettings) -> None:
        self.path = directory / COUNTED
        self.settings = settings
        self.lock = Lock()
        self.counts = Counter(dict.fromkeys(_COUNTS, 0))
        self.answers = 0  # to this start
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        whole = [line for line in lines if line.endswith(b"\n")]
        for line in whole:
            self.counts.update(json.loads(line))
        if len(whole) < len(lines):  # a kill left the last one incomplete
            with storage(self.path):
                os.truncate(self.path, sum(map(len, whole)))

    @property
    def requests(self) -> int:
        """Requests sent."""
        return self.counts["requests"]

    @property
    def tokens(self) -> int:
        """Tokens of prompts and completions together."""
        return self.counts["prompt_tokens"] + self.counts["completion_tokens"]

    def send(self) -> None:
        """Count a request before it is sent. Raises UsageError when a budget is spent."""
        settings = self.settings
        with self.lock:
            used_requests = self.requests - self.counts["refused"]
            for key, used in (("max_requests", used_requests), ("max_total_tokens", self.tokens)):
                limit = getattr(settings, key)
                if limit is not None and used >= limit:
                    what = f"{used:,} of {limit:,} {key.rpartition('_')[2]} are used"
                    raise UsageError(f"{key}: {what}: raise it and resume with the same command")
            self._add(requests=1)

    def refused(self) -> None:
        """Count a request that the server refused as one too many for now: it costs nothing, and no budget."""
        with self.lock:
            self._add(refused=1)

    def answered(self, *, prompt: int, completion: int) -> None:
        """Count the tokens of an answer."""
        with self.lock:
            self.answers += 1
            self._add(prompt_tokens=prompt, completion_tokens=completion)

    def close(self) -> None:
        """Leave the total of a command that is complete: the next one in this directory counts from nothing."""
        if self.requests:
            write_json(self.path.with_name(TOTAL), dict(self.counts))
            self.path.unlink(missing_ok=True)

    def __str__(self) -> str:
        counts = self.counts
        asked = f"{self.requests:,} request{'' if self.requests == 1 else 's'}"
        asked += f" ({counts['refused']:,} refused as too many)" if counts["refused"] else ""
        return f"{asked}, {counts['prompt_tokens']:,} tokens of prompts, {counts['completion_tokens']:,} of completions"

    def _add(self, **counts: int) -> None:
        line = dict.fromkeys(_COUNTS, 0) | counts
        self.counts.update(line)
        # Written and not synced: it outlives the process, and a power cut costs a few lines.
        with storage(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
