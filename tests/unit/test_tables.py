"""Tables of what users can name."""

from __future__ import annotations

import math

import pytest

from armopt.errors import InputError, close_names
from armopt.tables import Line, Table


def table() -> Table[float]:
    return Table("number", Line("one", 1.0), Line("pi", "math:pi", "pi (3.14)"))


def test_values_are_imported_where_they_are_text() -> None:
    found = table()
    assert dict(found) == {"one": 1.0, "pi": math.pi}
    assert found.find("pi") == math.pi
    assert len(found) == 2


def test_help_says_what_lines_say() -> None:
    assert table().help() == "one or pi (3.14)"
    assert table().help("none") == "one, pi (3.14) or none"
    assert Table("number", Line("one", 1.0)).help() == "one"


def test_an_unknown_name_says_which_come_close_and_all_there_are() -> None:
    with pytest.raises(InputError, match=r"^--n: unknown number 'P-i'\. Did you mean pi\? Known are one, .* or none"):
        table().find("P-i", where="--n", also=("none",))


def test_a_line_is_added_in_its_place_and_taken_out() -> None:
    found = table()
    found.register(Line("two", 2.0), before="pi")
    found.register(Line("ten", 10.0))
    assert list(found) == ["one", "two", "pi", "ten"]
    with pytest.raises(InputError, match="there is a number 'two' already"):
        found.register(Line("two", 2.0))
    with pytest.raises(InputError, match="unknown number 'six'"):
        found.register(Line("seven", 7.0), before="six")
    found.unregister("two")
    found.unregister("ten")
    assert dict(found) == dict(table())
    with pytest.raises(KeyError):
        found.unregister("two")


def test_names_that_one_is_the_beginning_of_come_first() -> None:
    known = ("gcvit_tiny", "davit_tiny", "mvitv2_tiny", "vit_tiny_patch16_224")
    assert close_names("vit_tiny", known)[0] == "vit_tiny_patch16_224"
