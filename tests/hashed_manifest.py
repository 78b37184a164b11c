"""Manifests as whoever can change a bundle would write them: with a true digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def hashed(content: Mapping[str, Any]) -> bytes:
    """The bytes of a manifest with this content: sorted JSON, with the sha256 of all else as its digest."""
    content = {key: value for key, value in content.items() if key != "digest"}
    return _text(content | {"digest": hashlib.sha256(_text(content)).hexdigest()})


def _text(content: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(content, sort_keys=True, indent=1)}\n".encode()
