"""Dimensions besides the batch: by the command line and from Python, between their buckets and beyond their range."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import armopt
from armopt.capture import dimensions
from armopt.capture.dimensions import Dimension, Example
from armopt.cli.app import app
from armopt.compiler.captured_model import capture_model
from armopt.errors import CaptureError, InputError

HERE = "tests.unit.test_dimensions"
IDS = ["--input", "input_ids=1xtokens:int64:50", "--input", "mask=1xtokens"]


class Reader(nn.Module):
    """Ids and a mask of any length up to 64."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(50, 32), nn.Embedding(64, 32)
        self.fc, self.head = nn.Linear(32, 32), nn.Linear(32, 8)
        self.register_buffer("numbers", torch.arange(64)[None])

    def forward(self, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids) + self.positions(self.numbers[:, : input_ids.shape[1]])
        scores = (x @ x.transpose(1, 2)).masked_fill(mask[:, None, :] == 0, -1e9)
        result: torch.Tensor = self.head(torch.relu(self.fc(scores.softmax(-1) @ x)))
        return result


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc(x.reshape(-1, 32))
        return result


def reader() -> nn.Module:
    torch.manual_seed(0)
    return Reader().eval()


def fixed() -> nn.Module:
    return Fixed().eval()


def call(rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + 100 * tokens)
    return torch.randint(0, 50, (rows, tokens), generator=generator), torch.ones(rows, tokens)


def check(bundle: Path) -> None:
    """Every size that is allowed runs, the nearest bucket's plan, and gives what the model does."""
    model, loaded = reader(), armopt.load(bundle)
    assert isinstance(loaded, armopt.Model)
    for rows, tokens, at in ((1, 1, (1, 8)), (3, 20, (4, 32)), (4, 32, (4, 32)), (9, 64, (4, 32))):
        given = call(rows, tokens)
        assert tuple(loaded.bucket(list(given)).values()) == at
        cosine = torch.nn.functional.cosine_similarity(loaded(*given).flatten(), model(*given).flatten(), 0)
        assert cosine > 0.999
    with pytest.raises(InputError, match="input input_ids: dimension 1 is 65, the model takes up to 64"):
        loaded(*call(1, 65))
    with pytest.raises(InputError, match="input mask: dimension 1 is 7, but tokens is 8 by dimension 1 of input"):
        loaded(call(1, 8)[0], call(1, 7)[1])


@pytest.mark.filterwarnings("ignore::armopt.ArmoptWarning")
def test_from_the_command_line(tmp_path: Path) -> None:
    asked = [*IDS, "--dim", "tokens=1..64", "--at", "tokens=8,32", "--batch", "1,4", "-o", str(tmp_path / "b")]
    done = CliRunner().invoke(app, ["optimize", "--model", f"{HERE}:reader", *asked])
    assert done.exit_code == 0, done.output
    assert done.output.count("kernels   at batch") == 4
    check(tmp_path / "b")


@pytest.mark.filterwarnings("ignore::armopt.ArmoptWarning")
def test_from_python_and_of_a_file_of_samples(tmp_path: Path) -> None:
    tokens = Dimension("tokens", 1, 64, at=(8, 32))
    given = Example(call(2, 8), dims={0: {1: tokens}, 1: {1: tokens}})
    armopt.optimize(reader(), given, batch=(1, 4), output=tmp_path / "b").require()
    check(tmp_path / "b")
    ids, mask = call(2, 16)
    save_file({"input_ids": ids, "mask": mask}, tmp_path / "x.safetensors")
    asked = [*IDS, "--inputs", str(tmp_path / "x.safetensors"), "--dim", "tokens=1..64", "--at", "tokens=8,32"]
    asked += ["--batch", "1,4", "-o", str(tmp_path / "c")]
    done = CliRunner().invoke(app, ["optimize", "--model", f"{HERE}:reader", *asked])
    assert done.exit_code == 0, done.output
    check(tmp_path / "c")


def test_an_exported_program_keeps_its_dimensions_and_gets_names(tmp_path: Path) -> None:
    s = torch.export.Dim("length", min=1, max=64)
    program = torch.export.export(reader(), call(2, 8), dynamic_shapes=({1: s}, {1: s}))
    torch.export.save(program, tmp_path / "m.pt2")
    asked = ["--input", "input_ids=2xtokens:int64:50", "--input", "mask=2xtokens", "--at", "tokens=8,32"]
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "m.pt2"), *asked])
    assert done.exit_code == 0, done.output
    assert "tokens=8:" in done.output
    assert "tokens=32:" in done.output
    wrong = ["plan", str(tmp_path / "m.pt2"), "--input", "input_ids=rowsxtokens:int64:50", *asked[2:], "--at", "rows=2"]
    error = CliRunner().invoke(app, wrong).exception
    assert "dimension 0 of input input_ids is 2 in the model, so 'rows' can't vary" in str(error)
    wrong = [
        "plan",
        str(tmp_path / "m.pt2"),
        *asked[:2],
        "--input",
        "mask=2xwords",
        "--at",
        "tokens=8",
        "--at",
        "words=8",
    ]
    error = CliRunner().invoke(app, wrong).exception
    assert "'words' and 'tokens' are one dimension in the model. Give both the same name" in str(error)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ([], "dimension 'tokens': its size is not known. Say it with --dim tokens=1..512"),
        (
            ["--dim", "tokens=1..65", "--at", "tokens=8"],
            "not take all sizes of tokens. Give --dim tokens=1..64",
        ),
        (["--dim", "tokens=1-64"], "--dim: can't read 'tokens=1-64'. Write NAME=LEAST..MOST: tokens=1..512"),
        (["--at", "tokens=8;16"], "--at: can't read"),
        (["--dim", "tokens=1..64", "--at", "tokens=8,80"], "dimension 'tokens': 80 is not in 1..64"),
        (["--dim", "tokens=0..64"], "can't go from 0 to 64"),
        (["--dim", "tokens=1..64", "--at", "words=8"], "no dimension is called 'words'. Those that vary are tokens"),
    ],
)
def test_what_can_not_be_is_said(asked: list[str], said: str) -> None:
    error = CliRunner().invoke(app, ["plan", "--model", f"{HERE}:reader", *IDS, *asked]).exception
    assert isinstance(error, InputError)
    assert said in str(error)


def test_a_model_that_fixes_a_dimension_is_named() -> None:
    asked = ["--input", "x=2xwords", "--dim", "words=1..64", "--at", "words=32"]
    error = CliRunner().invoke(app, ["plan", "--model", f"{HERE}:fixed", *asked]).exception
    assert isinstance(error, CaptureError)
    assert "words" in str(error)


def test_an_example_names_tensors_and_dimensions_that_are_there() -> None:
    tokens = Dimension("tokens", 1, 8)
    with pytest.raises(InputError, match=r"no tensor 'words' among the example inputs\. The example inputs are ids"):
        Example({"ids": torch.zeros(2, 2)}, {"words": {1: tokens}}).axes()
    with pytest.raises(InputError, match="input ids has 2 dimensions, so none of number 2"):
        Example({"ids": torch.zeros(2, 2)}, {"ids": {2: tokens}}).axes()
    with pytest.raises(InputError, match="is no name of a dimension"):
        Dimension("max")
    given = dict(zip(("input_ids", "mask"), call(2, 8), strict=True))
    two = {"input_ids": {1: Dimension("tokens", 1, 4)}, "mask": {1: tokens}}
    with pytest.raises(InputError, match="'tokens': has two ranges"):
        armopt.optimize(reader(), Example(given, two), output="never")
    assert dimensions.parse(["tokens=2..9"], ["tokens=3,4"]) == {"tokens": Dimension("tokens", 2, 9, (3, 4))}
    assert dimensions.parse([], ["tokens=3", "tokens=4"])["tokens"].at == (3, 4)
    with pytest.raises(InputError, match="tokens is given twice"):
        dimensions.parse(["tokens=2..9", "tokens=3..4"], [])


@pytest.mark.parametrize("batch", [(8,), (1, 8)])
def test_sizes_of_a_batch_that_has_another_name_are_not_passed_over(batch: tuple[int, ...]) -> None:
    given = Example((torch.zeros(2, 4),), {0: {0: Dimension("rows", at=(2, 4))}})
    with pytest.raises(InputError, match=r"--batch: the first dimension is called 'rows'.*--at rows=1,8"):
        capture_model(nn.Linear(4, 4), given, batch=batch)


def test_what_nobody_named_goes_by_its_number() -> None:
    """torch's own names (s27) are other ones each time."""
    model, given = reader(), call(2, 8)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    captured = capture_model(torch.export.export(model, given, dynamic_shapes=(free, free))).parts[0].captured
    assert [spec.shape for spec in captured.input_specs] == [("batch", "dim1")] * 2
    assert [symbol.name for symbol in captured.symbols] == ["batch", "dim1"]
    with pytest.raises(InputError, match=r"the model takes \[any, any\] int64"):
        capture_model(torch.export.export(model, given, dynamic_shapes=(free, free)), (given[0].float(), given[1]))


def test_sizes_of_a_batch_that_is_fixed_are_not_passed_over() -> None:
    with pytest.raises(InputError, match=r"no dimension is called 'batch'.*--batch 1,8"):
        capture_model(nn.Linear(4, 4), (torch.zeros(2, 4),), dims={"batch": Dimension("batch", at=(1, 8))})


class Halving(nn.Module):
    """Takes images of an even height alone."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ConvTranspose2d(16, 3, 4, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.up(self.down(x))  # type: ignore[no-any-return]


def test_sizes_that_have_to_be_multiples_are_said(tmp_path: Path) -> None:
    model, x = Halving().eval(), torch.randn(1, 3, 32, 48)
    example = armopt.Example((x,), {0: {2: armopt.Dimension("rows")}})
    with pytest.raises(CaptureError, match=r"only some sizes of rows: rows = 2\*_rows\. .*armopt\.compile"):
        armopt.optimize(model, example, output=tmp_path / "b")
    half = torch.export.Dim("half", min=1)
    program = torch.export.export(model, (x,), dynamic_shapes=({2: 2 * half},))
    torch.export.save(program, tmp_path / "halving.pt2")
    for given in (program, tmp_path / "halving.pt2"):
        with pytest.raises(CaptureError, match=r"dimension 2 of input x varies as 2\*s\d+, which not all sizes fit"):
            armopt.optimize(given, output=tmp_path / "b")
