"""A finished run for others: the card beside its model, and, if asked for, uploads to the Hub.

What is uploaded is one folder: the model with its card, or the kept trajectories with theirs. `pushed.json` holds what
was uploaded, so that a repeated command uploads what is missing and nothing twice. Everything comes from files, and the
run is committed before: an upload that fails loses nothing.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bcft.config.schema import ModelSettings
from bcft.config.sharing import SharingSettings
from bcft.errors import BcftError, ServerError, UsageError
from bcft.reporting.cards import model_of
from bcft.reporting.hub import base_of, is_embedded, is_local
from bcft.runs.storage import MANIFEST, file_hash, read_json, storage, write_json, write_jsonl, write_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PUSHED = "pushed.json"
_STAGE = ".hub"
_OWN = ("metrics.json", "config.yaml")
"""Files of the run that its manifest holds beside those of the model."""
_STATUS = {
    401: "the Hub does not know this token: set HF_TOKEN to a valid one, or run `hf auth login`",
    403: "the token may not write there: give it the right to, or name another repository",
    404: "the Hub shows no such repository to this token",
    429: "too many requests: wait some minutes",
}
"""Status of an answer -> what it means."""


def check_push(sharing: SharingSettings, model: ModelSettings, run: Path, *, finished: bool) -> None:
    """Refuse before a run what could not be uploaded after it: offline, without a token, or to a place of others.

    finished: the run is done already, and counts only if an upload is missing. Raises UsageError.
    """
    if not sharing.push_to_hub or (finished and not missing(sharing, run)):
        return
    from huggingface_hub import HfApi, get_token, is_offline_mode  # noqa: PLC0415 - only those who upload wait for it

    later = "or leave push_to_hub out, and repeat the command with it later"
    if is_offline_mode():
        raise UsageError(f"push_to_hub: HF_HUB_OFFLINE is set: unset it, {later}")
    if get_token() is None:
        raise UsageError(
            f"push_to_hub: there is no token: set HF_TOKEN to one that may write, run `hf auth login`, {later}"
        )
    if "model" in sharing.repositories:
        _check_base(model)
    api = HfApi()
    with _failing(UsageError, "push_to_hub", f", {later}"):
        account = api.whoami()
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UsageError(f"push_to_hub: the token may only read: set HF_TOKEN to one that may write, {later}")
    owners = {str(account["name"]), *(str(organization["name"]) for organization in account.get("orgs", ()))}
    for kind, name in sharing.repositories.items():
        with _failing(UsageError, f"push_to_hub: {name}", f", {later}"):
            exists = _refuse_public(api, sharing, kind, name)
        if not exists and name.partition("/")[0] not in owners:
            raise UsageError(
                f"hub_{kind}_id: {name} is not of this token's account or organizations, which are "
                f"{', '.join(sorted(owners))}: name a repository of one of them"
            )


def write_card(run: Path, *, against: Path | None, anew: bool) -> None:
    """Write the card of a finished run's model; anew: also if it has one. against: as in `model_card`."""
    card = model_of(run) / "README.md"
    if anew or not card.is_file():
        from bcft.reporting.model_card import model_card  # noqa: PLC0415 - as in check_push

        write_text(card, model_card(run, against=against))


def push(sharing: SharingSettings, run: Path, *, command_line: str, against: Path | None) -> Iterator[str]:
    """Upload what is not uploaded yet of a finished run, and yield a line about each.

    Raises ServerError, which says how to repeat it, when the Hub does not take it.
    """
    wanted = missing(sharing, run)
    if not wanted:
        return
    from huggingface_hub import HfApi  # noqa: PLC0415 - as in check_push

    repeat = f". The run is finished and nothing is lost; the same command uploads it, and no more: {command_line}"
    for kind, name in wanted.items():
        api, folder = HfApi(), run / _STAGE
        try:
            if not _stage(run, folder, kind, name, against=against):
                yield "No trajectory was kept, so there is no dataset to upload"
                continue
            with _failing(ServerError, f"push_to_hub: the {kind} was not uploaded to {name}", repeat):
                api.create_repo(name, repo_type=kind, private=sharing.hub_private_repo, exist_ok=True)
                _refuse_public(api, sharing, kind, name)
                commit = api.upload_folder(
                    repo_id=name, repo_type=kind, folder_path=folder, commit_message="Upload with bcft"
                )
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        entry = {"repository": name, "manifest": file_hash(run / MANIFEST), "commit": str(commit.oid)}
        write_json(run / PUSHED, _pushed(run) | {kind: entry})
        place = f"{api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{name}"
        yield f"The {kind} is at {place}"


def missing(sharing: SharingSettings, run: Path) -> dict[str, str]:
    """Return the repositories that do not have the run's result as it is now, by kind."""
    manifest, pushed = run / MANIFEST, _pushed(run)
    state = file_hash(manifest) if manifest.is_file() else ""
    entries = {kind: (entry["repository"], entry["manifest"]) for kind, entry in pushed.items()}
    return {kind: name for kind, name in sharing.repositories.items() if entries.get(kind) != (name, state)}


def _pushed(run: Path) -> dict[str, Any]:
    return read_json(run / PUSHED) if (run / PUSHED).is_file() else {}


def _stage(run: Path, folder: Path, kind: str, name: str, *, against: Path | None) -> bool:
    """Make the folder that is uploaded: links to files of the run, and what has to be written for others.

    Returns whether there is anything in it.
    """
    from bcft.reporting.dataset_card import SPLIT, dataset_card, dataset_rows  # noqa: PLC0415 - as in check_push
    from bcft.reporting.model_card import model_card  # noqa: PLC0415

    with storage(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    if kind == "dataset":
        write_jsonl(folder / SPLIT, dataset_rows(run))
        with (folder / SPLIT).open("rb") as lines:
            rows = sum(1 for _ in lines)
        write_text(folder / "README.md", dataset_card(run, name=name, rows=rows))
        return rows > 0
    model = model_of(run)
    files = [run / file for file in read_json(run / MANIFEST)["files"] if file not in _OWN]
    with storage(folder):
        for file in files:
            (folder / file.relative_to(model)).symlink_to(file.resolve())
    config = folder / "adapter_config.json"
    if config.exists() and is_embedded((values := read_json(config))["base_model_name_or_path"]):
        write_json(config, values | {"base_model_name_or_path": "bcft:tiny-math"})  # the path is of this machine
    write_text(folder / "README.md", model_card(run, name=name, against=against))
    return True


def _check_base(model: ModelSettings) -> None:
    """Raise UsageError for a new adapter whose base nobody else has."""
    name = model.model_name_or_path
    base = base_of(name) or (name if model.use_peft else "")
    embedded = base.startswith(("bcft:", "package:")) or is_embedded(base)
    if base and is_local(base) and not embedded:
        raise UsageError(
            f"hub_model_id: the adapter's base {base} is on this machine alone, so nobody could load the adapter: "
            "upload the base first and give its Hub id as model_name_or_path, or leave hub_model_id out"
        )


def _refuse_public(api: "HfApi", sharing: SharingSettings, kind: str, name: str) -> bool:
    """Return whether a repository exists. Raises UsageError if everybody can read it and that was not asked for."""
    from huggingface_hub.errors import RepositoryNotFoundError  # noqa: PLC0415 - as in check_push

    try:
        private = api.repo_info(name, repo_type=kind).private
    except RepositoryNotFoundError:
        return False
    if sharing.hub_private_repo and not private:
        raise UsageError(
            f"hub_{kind}_id: everybody can read {name}: set hub_private_repo: false if that is meant, or give another"
        )
    return True


@contextmanager
def _failing(raised: type[BcftError], before: str, after: str) -> Iterator[None]:
    """Raise an error with the reason why the Hub did not take something, between two texts."""
    from httpx2 import HTTPError  # noqa: PLC0415 - as in check_push

    try:
        yield
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # the last is of a large file
        raise raised(f"{before}: {_why(error)}{after}") from error


def _why(error: Exception) -> str:
    """Return in words why the Hub did not take something."""
    from httpx2 import HTTPError  # noqa: PLC0415 - as in check_push

    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    response = getattr(cause, "response", None)
    if response is not None:
        said = str(getattr(cause, "server_message", None) or "").strip().partition("\n")[0][:200]
        parts = [f"the Hub answers {response.status_code}", _STATUS.get(response.status_code, ""), said]
        return ": ".join(part for part in parts if part)
    if isinstance(cause, HTTPError | ConnectionError | TimeoutError):
        return f"the Hub does not answer ({type(cause).__name__}): check the network"
    return " ".join(str(cause).split())[:200] or type(cause).__name__
