"""The errors a user meets. Each message says what is wrong, which value, and what to do."""

from __future__ import annotations


class RaysynthError(Exception):
    """A run that could not be done; `exit_code` is what the command line returns for it."""

    exit_code = 1


class InputError(RaysynthError, ValueError):
    """The user's input is wrong: a recipe, a path, a value, an unfitting store or bundle."""

    exit_code = 2


class Refused(RaysynthError):
    """A policy forbids it, as long as nothing else is shown; no input would be right."""

    exit_code = 3


class UnreadableCase(InputError):
    """One case that cannot be used. Ingest puts it into quarantine and goes on.

    Args:
        rule: short stable name of the rule that was broken, for example `missing-slice`.
        reason: one line for people: what, which value, what to do.
    """

    def __init__(self, rule: str, reason: str) -> None:
        super().__init__(reason)
        self.rule = rule
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableCase], tuple[str, str]]:
        return type(self), (self.rule, self.reason)


class UnfitCheckpoint(InputError):
    """A run cannot go on from its checkpoint; every worker of the run finds that alike."""


class Diverged(RaysynthError):
    """Training lost its way; every worker of the run finds that alike."""


class Stopped(RaysynthError):
    """Training was asked to end before it had ended; the same command goes on."""


class StoreConflict(RaysynthError):
    """Somebody else wrote to the store meanwhile; what this run did stays on its own branch."""


class StoreFailed(RaysynthError):
    """The disk or bucket of a store refused: it is full, broken, forbidden or out of reach."""


class DamagedStore(RaysynthError):
    """Stored bytes are not the ones that were written: a checksum does not fit."""
