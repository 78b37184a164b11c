"""Files: read where they may be missing, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from armopt.errors import InputError


def write(path: Path, text: str, option: str) -> None:
    """Writes a file by renaming: whoever reads it sees the old one or the new one.

    Args:
        path: Where it goes; its folder has to be there.
        text: What it holds, written as UTF-8.
        option: What a user would choose another place with.

    Raises:
        InputError: The place can't be written; nothing is left there.
    """
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            Path(temporary).chmod(0o644)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise InputError(
            f"can't be written: {error.strerror}", where=str(path), hint=f"Choose another place with {option}"
        ) from None


def read_or_empty(path: str | Path) -> str:
    """The text of a file of the system, such as one below /proc; empty where it can't be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
