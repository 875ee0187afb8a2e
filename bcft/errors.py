"""One exception per exit code: an error that a user can cause ends in one line and a number, never in a traceback."""


class BcftError(Exception):
    """A foreseen failure. `str(error)` is what the user reads: what was given, where, what to do.

    Several findings at once (a recipe with five mistakes) are several lines.
    """

    exit_code = 1

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows in a notebook: the lines, as on a command line."""
        return [f"bcft: error: {line}" for line in str(self).splitlines()]


class UsageError(BcftError):
    """The command line, the recipe, or a run directory that another recipe made."""

    exit_code = 2


class DataError(BcftError):
    """A dataset, a row, a tokenizer's template: input that cannot be trained on."""

    exit_code = 3


class FaultError(BcftError):
    """Rewards or environments failed more often than the run may tolerate."""

    exit_code = 4


class MismatchError(FaultError):
    """A server did not play the policy that is trained: what it sampled does not count."""


class DivergedError(BcftError):
    """A loss or a weight is no longer finite."""

    exit_code = 5


class LockedError(BcftError):
    """Another process works in the same run directory."""

    exit_code = 6


class StorageError(BcftError):
    """The disk is full, read-only or not writable by this user."""

    exit_code = 7


class ServerError(BcftError):
    """A server that samples is gone, or the Hub takes no upload; re-running the same command resumes the run."""

    exit_code = 8


class CheckpointError(BcftError):
    """Files on disk do not match their manifest, and nothing older does."""

    exit_code = 9


class Preempted(BcftError):  # noqa: N818 - not a fault
    """The run was asked to stop; re-running the same command resumes it."""

    exit_code = 75
