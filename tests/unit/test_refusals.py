"""What is said of models that can't be captured: the case, the user's own line, the page that says what to do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import armopt
from armopt import capture
from armopt.errors import CaptureError, InputError, first_line
from armopt.models import torchvision_ops

PAGE = Path(__file__).parents[2] / "docs" / "capture.md"
X = torch.randn(4, 8)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = self.lstm(packed)
        return pad_packed_sequence(y, batch_first=True)[0]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)


class Item(Layer):
    def forward(self, x: Tensor) -> Tensor:
        largest = x.abs().max().item()
        if largest > 3:
            x = x / largest
        return self.fc(x)


class Turns(Layer):
    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        for _ in range(int(turns)):
            x = self.fc(x)
        return x


class Branch(Layer):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            x = x + 1
        return self.fc(x)


class Cache:
    """No class that torch knows."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class GivesCache(Layer):
    def forward(self, x: Tensor) -> Any:
        return self.fc(x), Cache(x)


class TakesCache(Layer):
    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        return self.fc(x) + cache.keys


#: Model, inputs, words of the case, its section, and a piece of the line that is named.
CASES = {
    "packed": (
        *(Packed, (torch.randn(3, 5, 8), torch.tensor([5, 3, 2]))),
        *("pack_padded_sequence", "packed-sequences", "y, _ = self.lstm(packed)"),
    ),
    "item": (Item, (X,), ".item()", "values-of-tensors", "if largest > 3:"),
    "turns": (Turns, (X, torch.tensor(2)), "range()", "values-of-tensors", "for _ in range(int(turns)):"),
    "branch": (Branch, (X,), "if", "values-of-tensors", "if x.sum() > 0:"),
    "gives a cache": (GivesCache, (X,), "holds a Cache,", "caches-and-other-objects", ""),
    "takes a cache": (TakesCache, (X, Cache(X)), "holds a Cache,", "caches-and-other-objects", ""),
}


def anchors(page: str) -> set[str]:
    """Of the headings of a page, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", page, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", CASES)
def test_the_case_the_line_and_the_page(name: str) -> None:
    kind, inputs, words, section, line = CASES[name]
    with pytest.raises(InputError) as caught:
        capture.module(kind().eval(), inputs)
    said = str(caught.value)
    if caught.value.__cause__ is not None:  # else armopt saw it before torch.export did
        assert str(caught.value.__cause__).splitlines()[0] in said  # whole
    assert words in said
    assert f"docs/capture.md#{section}" in said
    assert section in anchors(PAGE.read_text())
    if line:
        assert re.search("`" + re.escape(line) + r".*` in \S*test_refusals\.py:\d+: ", said)


def test_the_pages_way_without_packing_gives_the_same() -> None:
    class Padded(Packed):
        def forward(self, x: Tensor, lengths: Tensor) -> Any:
            y, _ = self.lstm(x)
            last = y[torch.arange(len(y)), lengths - 1]
            return last, y * (torch.arange(y.shape[1]) < lengths[:, None])[..., None]

    packed = Packed().eval()
    padded = Padded().eval()
    padded.load_state_dict(packed.state_dict())
    inputs = CASES["packed"][1]
    last, found = capture.module(padded, inputs).graph_module(*inputs)
    reference = packed(*inputs)
    torch.testing.assert_close(found, reference)
    torch.testing.assert_close(
        last, torch.stack([row[int(n) - 1] for row, n in zip(reference, inputs[1], strict=True)])
    )


def test_generate_is_told_by_name() -> None:
    torchvision_ops.ensure_torchvision()
    import transformers

    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.GPT2LMHeadModel(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.model.generate(ids, max_new_tokens=3, do_sample=False)

    with pytest.raises(CaptureError, match=r"generates in a loop.*#loops-that-generate") as caught:
        capture.module(Writes().eval(), (torch.randint(0, 64, (1, 4)),))
    assert "self.model.generate(ids" in str(caught.value)


def test_the_page_has_each_case_by_the_name_that_users_search_for() -> None:
    page = PAGE.read_text()
    for words in ("pack_padded_sequence", ".item()", "generate()", "cache"):
        assert words in page


def test_a_models_own_error_names_its_line() -> None:
    class Wrong(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.T)

    with pytest.raises(InputError, match=r"at `return self\.fc\(x\.T\)` in \S*test_refusals\.py:\d+"):
        capture.module(Wrong().eval(), (X,))


def test_anothers_line_is_whole_or_left_out() -> None:
    words = "a message of words that go on and on "
    assert first_line(ValueError(words * 10)) == (words * 10).strip()
    assert first_line(ValueError("x" * 100_000)) == "ValueError"
    assert first_line(ValueError("")) == "ValueError"


class _Giving(nn.Module):
    def __init__(self, given: Any) -> None:
        super().__init__()
        self.fc, self.given = nn.Linear(4, 4), given

    def forward(self, x: torch.Tensor, taken: Any = None) -> Any:
        return self.fc(x), self.given


@pytest.mark.parametrize(
    "value", [{1}, range(3), 1j, b"", torch.float32, slice(1)], ids=lambda value: type(value).__name__
)
def test_what_a_bundle_can_not_describe_is_called_what_it_is(value: Any) -> None:
    name, x = type(value).__name__, torch.ones(2, 4)
    with pytest.raises(CaptureError, match=rf"^_Giving: output\[1\]: holds a {name}, which a bundle can't describe"):
        capture.module(_Giving(value).eval(), (x,), source="_Giving")
    with pytest.raises(CaptureError, match=rf"^_Giving: inputs\['args'\]\[1\]: holds a {name}, which"):
        capture.module(_Giving(None).eval(), (x, value), source="_Giving")


@pytest.mark.parametrize("call", [capture.module, armopt.compile], ids=["optimize", "compile"])
def test_a_call_that_fails_names_the_argument_of_each_front_end(call: Callable[..., Any]) -> None:
    with pytest.raises(InputError, match=r"dtypes of example_inputs \(--input\)"):
        call(_Giving(None).eval(), (torch.ones(2, 3),))
