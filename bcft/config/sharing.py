"""The keys of what is uploaded to the Hub when a run is finished. They decide no result: no file of a run has them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from bcft.config.declare import TRAINING, Conflict, Settings, library, own

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class SharingSettings(Settings):
    """What is uploaded, and where to."""

    push_to_hub: bool = library(
        "push_to_hub",
        note="here once, when the run is finished; give hub_model_id, or hub_dataset_id, or both; the token is that of "
        "HF_TOKEN or `hf auth login`",
        commands=TRAINING,
    )
    hub_model_id: str | None = library("hub_model_id", note="as owner/name; for the trained model", commands=TRAINING)
    hub_dataset_id: str | None = own(
        None,
        "the repository, as owner/name, of the trajectories that were kept, each with reward, decision, round and pass "
        "rate",
        commands=("filtered",),
    )
    hub_private_repo: bool = library(
        "hub_private_repo", default=True, note="false: everybody may read it", commands=TRAINING
    )

    @property
    def repositories(self) -> dict[str, str]:
        """The repositories to upload to, by the kind that the Hub has for each; empty without `push_to_hub`."""
        named = {"model": self.hub_model_id, "dataset": self.hub_dataset_id}
        return {kind: name for kind, name in named.items() if name and self.push_to_hub}

    def conflicts(self) -> Iterator[Conflict]:
        """Yield an upload without a repository, and a name that is none."""
        if self.push_to_hub and not (self.hub_model_id or self.hub_dataset_id):
            yield ("push_to_hub",), "needs hub_model_id, the repository as owner/name"
        for key in ("hub_model_id", "hub_dataset_id"):
            name = getattr(self, key)
            if name is not None and not _ID.fullmatch(name):
                yield (key,), f"wants owner/name, not {name!r:.80}"
