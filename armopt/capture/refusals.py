"""Why torch.export can't take a model: the case, the user's own line, and where docs/capture.md says what to do."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from armopt.errors import CaptureError, first_line
from armopt.ir import graph as g

_TORCH, _ARMOPT = str(Path(torch.__file__).parent), str(Path(__file__).parents[1])


@dataclass(frozen=True, slots=True)
class _Case:
    """What keeps models from being captured.

    Attributes:
        what: It, in a sentence.
        section: Of docs/capture.md.
        called: Functions that were running then: the end of their file's name, a colon, and how their own name begins.
        said: What torch says of it, its error's type first.
        names: Where torch's text has the name of what is in the way.
    """

    what: str
    section: str
    called: tuple[str, ...] = ()
    said: str = r"(?!)"
    names: str = r"(?!)"


#: The first that fits is told.
_CASES = (
    _Case(
        "it generates in a loop that decides on values, which one graph can't hold",
        "loops-that-generate",
        called=("transformers/generation/utils.py:",),
    ),
    _Case(
        "it packs sequences by lengths that are values of a tensor (pack_padded_sequence)",
        "packed-sequences",
        # a recurrent layer on padded tensors exports, so it is a packed sequence that it fails on
        called=("torch/nn/utils/rnn.py:pack_", "torch/nn/utils/rnn.py:pad_packed", "torch/nn/modules/rnn.py:forward"),
        said="_pack_padded_sequence|PackedSequence",
    ),
    _Case(
        "it takes or gives an object of a class that torch can't look into",
        "caches-and-other-objects",
        said="pytree-flattenable|is not a known type|[Uu]nsupported (?:input|output) type",
        names=r"<class '([\w.]+)'>",
    ),
    _Case(
        "it needs the value of a tensor (if, .item(), int(), range(), torch.equal), which a graph doesn't have",
        "values-of-tensors",
        said="data-dependent|data dependent|DataDependent|_local_scalar_dense",
    ),
    _Case(
        "it leaves PyTorch, where a graph can't follow (.numpy(), an address in memory)",
        "values-of-tensors",
        said=r"\.numpy\(\)|data pointer|data_ptr",
    ),
)


def explain(error: Exception, source: str) -> CaptureError:
    """The error for a model that torch.export can't take: the case where it is known, and torch's own first line.

    Args:
        error: torch's.
        source: What to call the model.
    """
    line = user_line(error)
    frames = [f"{frame.filename.replace(chr(92), '/')}:{frame.name}" for frame in _frames(error)]
    case = next((case for case in _CASES if _fits(case, frames, f"{type(error).__name__}: {error}")), None)
    said, section = first_line(error), ""
    if case is not None:
        named = re.search(case.names, str(error))
        what = f"{case.what} ({named[1]})" if named else case.what
        said, section = f"{what}. torch says: {said}", f"#{case.section}"
    return CaptureError(
        f"torch.export can't take the model whole: {said}",
        where=f"{source}: {line}" if line else source,
        hint=f"See docs/capture.md{section} for what to do",
    )


def user_line(error: BaseException) -> str:
    """The innermost line of the model's own code in an error's trace, with its text; empty where torch tells none.

    A line of the user's is preferred to one of an installed library's.
    """
    own = [f for f in _frames(error) if not f.filename.startswith((_TORCH, _ARMOPT, "<"))]
    users = [frame for frame in own if "site-packages" not in frame.filename]
    if not own:
        return g.line_in(str(error))
    frame = (users or own)[-1]
    code = f"`{frame.line}` in " if frame.line else ""
    return code + g.line_in(f'File "{frame.filename}", line {frame.lineno}')


def _fits(case: _Case, frames: Sequence[str], said: str) -> bool:
    return re.search(case.said, said) is not None or any(each in frame for each in case.called for frame in frames)


def _frames(error: BaseException | None) -> Iterator[traceback.FrameSummary]:
    """Those of an error and of what it came from, each outermost first: what came first is told last."""
    told: list[BaseException] = []
    while error is not None and error not in told:
        told.append(error)
        yield from traceback.extract_tb(error.__traceback__)
        error = error.__cause__ or error.__context__
