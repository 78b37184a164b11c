"""The errors that armopt raises: what happened, where, and what to do next.

The core raises; only :mod:`armopt.cli` prints them and turns them into exit codes.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection


class ArmoptError(Exception):
    """Base of every error that armopt raises on purpose.

    Args:
        what: What happened, in one sentence without a final full stop.
        where: The file, node, input or setting concerned; empty where `what` names it.
        hint: The next step that mends it.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}. {self.hint}" if self.hint else text


class InputError(ArmoptError):
    """A model, an input, an option or a bundle that can't be used as given."""


class CaptureError(InputError):
    """A model that torch.export could not take whole."""


class BundleError(InputError):
    """A bundle that is damaged, incomplete, or of an unknown schema."""


class HostError(ArmoptError):
    """This host lacks what the bundle or the command needs."""

    exit_code = 3


class AccuracyError(ArmoptError):
    """An accuracy gate failed."""

    exit_code = 4


class PassError(ArmoptError):
    """A pass broke an invariant of the graph: a bug in armopt, not in the model."""

    exit_code = 1


class ArmoptWarning(UserWarning):
    """Something that costs speed or says that this host is not the target."""


def first_line(error: BaseException, most: int = 300) -> str:
    """The first line of another library's error that says something, `most` characters of it; its type if none does.

    An error of armopt's own says what to do next and is kept whole.
    """
    if isinstance(error, ArmoptError):
        return str(error)
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)[:most]


def unknown(kind: str, name: str, known: Collection[str], *, where: str = "", said: str = "") -> InputError:
    """The error for a name that is none of those `known`: which come close, and all there are.

    Args:
        kind: What such a name is of: ``target``, ``policy``…
        name: As a user wrote it.
        known: All names.
        where: The option or file that it stands in.
        said: How to say them all, if not as a list.
    """
    close = difflib.get_close_matches(name.lower().replace("-", "").replace(" ", ""), known, n=3)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    return InputError(f"unknown {kind} {name!r}", where=where, hint=f"{meant}Known are {said or ', '.join(known)}")
