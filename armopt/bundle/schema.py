"""JSON <-> records: the one place that decodes what a bundle says. What does not fit is refused with its place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from armopt.errors import BundleError

_Record = TypeVar("_Record")
#: A message of msgspec: what is wrong, and where.
_MISFIT = re.compile(r"(?P<what>.*?)(?: - at (?P<place>.*))?", re.DOTALL)

#: How msgspec says what armopt.ir.records.Line takes.
_LINE = re.compile(r"str matching regex .*\\x1f.*")


def decode(data: bytes, kind: type[_Record], where: str | Path) -> _Record:
    """A record from JSON.

    Raises:
        BundleError: It is no JSON, or does not fit; the message names the field.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise misfit(error, where) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"is no JSON: {error}", where=str(where), hint="Copy the bundle again") from None


def convert(content: Any, kind: type[_Record], where: str | Path) -> _Record:
    """A record from JSON that is decoded already.

    Raises:
        BundleError: It does not fit; the message names the field.
    """
    try:
        return msgspec.convert(content, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise misfit(error, where) from None


def builtins(record: Any) -> Any:
    """A record as dictionaries, lists, strings and numbers."""
    return msgspec.to_builtins(record, str_keys=True)


def encode(record: Any) -> bytes:
    """A record as JSON in one line. The order of fields stays: it is part of what a model takes and returns."""
    return (json.dumps(builtins(record), allow_nan=False) + "\n").encode()


def misfit(error: Exception, where: str | Path) -> BundleError:
    """The error for JSON that does not fit: ``manifest.json: plan[0].nodes[3].shape: expected array, got str``."""
    if isinstance(error, RecursionError):
        what, place = "nests too deeply", ""
    else:
        match = _MISFIT.fullmatch(str(error))
        assert match is not None
        what = _LINE.sub("one line without control characters", match["what"].replace("`", ""))
        place = (match["place"] or "").replace("`", "").replace("$.", "").replace("$", "")
    where = f"{where}: {place}" if place else str(where)
    return BundleError(what[:1].lower() + what[1:], where=where, hint="Make the bundle again")
