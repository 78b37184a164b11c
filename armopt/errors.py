"""The errors that armopt raises: what happened, where, and what to do next.

The core raises; only :mod:`armopt.cli` prints them and turns them into exit codes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Any


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
        return printable(f"{text}. {self.hint}" if self.hint else text)


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


#: What a terminal or a page obeys instead of showing it: control characters, line separators, marks that turn the
#: direction of writing or take no room, and halves of characters that no encoding has.
CONTROL = r"\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
_CONTROL = re.compile(f"[{CONTROL}]")


def printable(text: str, keep: str = "") -> str:
    """Text as it may be shown: what a terminal or a page would obey is written out, as ``\\x1b`` or ``\\u202e``.

    Args:
        text: Any text, such as what stands in a file.
        keep: Characters that stay: ``\\n`` where there may be several lines.
    """
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def for_page(value: Any) -> Any:
    """A value of a template's, as it may stand in a page: text without what :func:`printable` writes out."""
    return printable(value, keep="\n\t") if type(value) is str else value


#: A line of another library's that is longer says nothing to people: it holds a graph, or a file.
_LONGEST = 600


def first_line(error: BaseException) -> str:
    """The first line of another library's error that says something, less its full stop; its type where it is endless.

    An error of armopt's own says what to do next and is kept whole.
    """
    if isinstance(error, ArmoptError):
        return str(error)
    lines = (line.strip() for line in str(error).splitlines())
    said = next((line for line in lines if line), "").removesuffix(".")
    return printable(said) if 0 < len(said) <= _LONGEST else type(error).__name__


def close_names(name: str, known: Collection[str]) -> list[str]:
    """Up to three of the names known that come close to a wrong one; those first that it is the beginning of."""
    longer = sorted((other for other in known if name and other.startswith(name)), key=lambda each: (len(each), each))
    return list(dict.fromkeys((*longer, *difflib.get_close_matches(name, known, n=3))))[:3]


def unknown(kind: str, name: str, known: Collection[str], *, where: str = "", said: str = "") -> InputError:
    """The error for a name that is none of those `known`: which come close, and all there are.

    Args:
        kind: What such a name is of: ``target``, ``policy``…
        name: As a user wrote it.
        known: All names.
        where: The option or file that it stands in.
        said: How to say them all, if not as a list.
    """
    close = close_names(name.lower().replace("-", "").replace(" ", ""), known)
    meant = f"Did you mean {' or '.join(close)}? " if close else ""
    return InputError(f"unknown {kind} {name!r}", where=where, hint=f"{meant}Known are {said or ', '.join(known)}")
