"""What an error of the Hub means for the user, in one line that says what to do.

Errors are recognized by the names of their classes, so that this module loads no library.
"""

from collections.abc import Iterator

SITE = "https://huggingface.co"


def hub_reason(error: BaseException, name: str, *, kind: str = "model", revision: str = "") -> str:
    """Return what is wrong with a repository and what to do; '' when the Hub did not cause the error.

    name: the repository's id; kind: `model` or `dataset`; revision: the one asked for.
    """
    chain = {cls.__name__: cause for cause in _causes(error) for cls in type(cause).__mro__}
    page = f"{SITE}/{name}" if kind == "model" else f"{SITE}/{kind}s/{name}"
    if gated := chain.get("GatedRepoError"):
        if _status(gated) == 401:
            return f"it is gated: ask for access at {page}, then set HF_TOKEN or run `hf auth login`"
        return f"it is gated, and this account has no access yet: ask at {page}, or wait until it is granted"
    if "RevisionNotFoundError" in chain:
        return f"the Hub has no revision {revision!r} of it: see {page}/tree/main"
    if missing := chain.get("RepositoryNotFoundError"):
        if _status(missing) == 401:
            return (
                "the Hub shows no such repository to this machine: check the spelling; if it is private, set HF_TOKEN "
                f"or run `hf auth login` with an account that may read {page}"
            )
        return f"the Hub has no such {kind} repository: check the spelling, or give a directory that exists"
    if "OfflineModeIsEnabled" in chain or ("LocalEntryNotFoundError" in chain and _offline()):
        return "it is not on this machine, and HF_HUB_OFFLINE is set: unset it, or download it first with `hf download`"
    if "HFValidationError" in chain:
        return "this is neither a directory that exists nor a Hub id such as owner/name"
    if answered := chain.get("HfHubHTTPError"):
        return _answer(_status(answered), page)
    if chain.keys() & {"LocalEntryNotFoundError", "ConnectionError", "ConnectError", "TimeoutException"}:
        return "it is not on this machine, and the Hub does not answer: check the network, or give a directory"
    return ""


def _answer(status: int, page: str) -> str:
    if status == 401:
        return "the Hub does not know this account: set HF_TOKEN to a valid token, or run `hf auth login`"
    if status == 403:
        return f"this account may not read it: ask for access at {page}, or give HF_TOKEN the right to read it"
    if status == 429:
        return "the Hub answers 429, too many requests: wait some minutes, or set HF_TOKEN for a higher limit"
    return f"the Hub answers {status}: try again later"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what caused it, the outermost last, so that the first cause of a class is kept."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    yield from reversed(chain)


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _offline() -> bool:
    from huggingface_hub import is_offline_mode  # noqa: PLC0415 - loaded already where it raised the error

    return bool(is_offline_mode())
