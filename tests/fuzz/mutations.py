"""Changes of bytes and of JSON that suit every format."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Iterator, MutableMapping, MutableSequence
from pathlib import Path
from typing import Any

NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 16, 127, 128, 255, 256, 1000, 65535, 65536, 10**6, 10**9),
    *(2**31 - 1, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, -(2**31), -(2**63), 2**64, 10**30),
)
FLOATS = (0.0, -0.0, 0.5, 1.0, -1.0, 1e-300, 1e38, 1e308, -1e308)
TEXTS = (
    *(
        "",
        " ",
        "x",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "a/b",
        "\x00",
        "\n",
        "\x1b[2J",
        "\u202e",
        "\ud7ff",
        "é" * 50,
    ),
    *("'", '"', "\\", "%s", "{}", "$(touch pwned)", "__import__('os').system('touch pwned')", "self", "None", "nan"),
)


def change_bytes(rng: random.Random, path: Path) -> None:
    """Changes the bytes of a file, or of one file of a folder."""
    if path.is_dir():
        path = rng.choice(sorted(file for file in path.rglob("*") if file.is_file()))
    path.write_bytes(changed(rng, path.read_bytes()))


def changed(rng: random.Random, data: bytes) -> bytes:
    """Bytes with one to eight changes."""
    found = bytearray(data)
    for _ in range(1 << rng.randrange(4)):
        at = rng.randrange(len(found) + 1)
        length = min(len(found) - at, 1 << rng.randrange(8))
        match rng.randrange(8):
            case 0:  # one bit
                if at < len(found):
                    found[at] ^= 1 << rng.randrange(8)
            case 1:
                found[at : at + length] = rng.randbytes(length)
            case 2:
                del found[at : at + length]
            case 3:
                found[at:at] = rng.randbytes(1 << rng.randrange(6))
            case 4:  # cut short
                del found[at:]
            case 5:  # a part again, elsewhere
                other = rng.randrange(len(found) + 1)
                found[other:other] = found[at : at + length]
            case 6:  # a number of any size
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(NUMBERS) % (1 << 8 * width)
                found[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case _:  # a digit of a text
                digits = [i for i, byte in enumerate(found[at : at + 4096], at) if 48 <= byte < 58]
                if digits:
                    found[rng.choice(digits)] = rng.randrange(48, 58)
    return bytes(found)


Place = tuple[MutableMapping[str, Any] | MutableSequence[Any], Any]


def places(content: Any) -> Iterator[Place]:
    """Every place of JSON below its root: what holds it, and its key or index there."""
    if isinstance(content, (dict, list)):
        for key, value in list(content.items() if isinstance(content, dict) else enumerate(content)):
            yield content, key
            yield from places(value)


def change_json(rng: random.Random, content: Any) -> None:
    """Changes one place of JSON, in place: to another value of its kind more often than to anything."""
    found = list(places(content))
    if not found:
        return
    # a list of many alike would take all changes: places are chosen by the key that they stand under
    keys = sorted({str(key) for _, key in found if not isinstance(key, int)})
    wanted = rng.choice(keys) if keys and rng.random() < 0.6 else None
    holder, key = rng.choice([place for place in found if wanted is None or str(place[1]) == wanted])
    value = holder[key]
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1:
            holder[key] = anything(rng)
        case 2 if isinstance(holder, list):
            holder.insert(key, value)
        case 2:
            holder[rng.choice(TEXTS)] = holder.pop(key)
        case 3 if isinstance(holder, list):
            other = rng.randrange(len(holder))
            holder[key], holder[other] = holder[other], value
        case 3 | 4:  # as it is elsewhere under the same key
            others = [each[k] for each, k in found if k == key]
            holder[key] = copy.deepcopy(rng.choice(others))
        case _:
            holder[key] = like(rng, value)


def as_json(content: Any) -> bytes:
    """JSON that may nest deeper than Python's limit, and hold what UTF-8 has no form of."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(50_000)
    try:
        return json.dumps(content).encode(errors="surrogatepass")
    finally:
        sys.setrecursionlimit(limit)


def like(rng: random.Random, value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 2, rng.choice(NUMBERS)))
    if isinstance(value, float):
        return rng.choice((value * 2, -value, rng.choice(FLOATS)))
    if isinstance(value, str):
        cut = rng.randrange(len(value) + 1)
        return rng.choice((value[:cut], value[:cut] + rng.choice(TEXTS) + value[cut:], rng.choice(TEXTS)))
    if isinstance(value, list):
        return rng.choice(([], value[:-1], value * 2, value[::-1], [value]))
    if isinstance(value, dict):
        return rng.choice(({}, dict(list(value.items())[1:]), dict(reversed(value.items()))))
    return anything(rng)


def anything(rng: random.Random) -> Any:
    """A value of any kind."""
    deep: Any = 0
    for _ in range(rng.choice((3, 50, 2000))):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    return rng.choice(
        (
            None,
            True,
            rng.choice(NUMBERS),
            rng.choice(FLOATS),
            rng.choice(TEXTS),
            [],
            {},
            [1, [2, [3]]],
            {"kind": 1},
            deep,
        )
    )
