"""A call's arguments, put where they were when the model was captured, whichever way they are given now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from armopt.errors import InputError
from armopt.ir import nesting


class Arguments:
    """What a model takes, as it was captured."""

    def __init__(self, inputs: nesting.Inputs, tensors: Sequence[str]) -> None:
        """Prepares for calls.

        Args:
            inputs: How the arguments nest the tensors.
            tensors: The tensors' names, for messages.
        """
        self._inputs = inputs
        self._tree = inputs.tree
        self._positional = len(inputs.args)
        self._hint = f"The model was captured with: {', '.join(tensors) or 'no tensor'}"

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The tensors of a call, in the order of the graph's inputs.

        Raises:
            InputError: An argument is missing, unknown, given twice, or not what the model was captured with.
        """
        given, named = list(args), dict(kwargs)
        fits = len(given) == self._positional and named.keys() == self._inputs.kwargs.keys()
        if not fits and (wrong := self._arrange(given, named)):
            raise InputError("; ".join(wrong), where="inputs", hint=self._hint)
        return nesting.flatten(self._tree, {"args": given, "kwargs": named}, "inputs")

    def _arrange(self, given: list[Any], named: dict[str, Any]) -> list[str]:
        """Moves arguments to where they were captured, and fills in constants; says what is wrong with them."""
        names, expected = self._inputs.names, self._inputs.kwargs
        most = max(self._positional, len(names))
        if len(given) > most:
            return [f"too many inputs: {len(given)} by position, where the model takes {most}"]
        wrong = [f"{name} is given twice, by position and by name" for name in names[: len(given)] if name in named]
        if wrong:
            return wrong
        named |= zip(names[self._positional :], given[self._positional :], strict=False)
        del given[self._positional :]
        missing = self._fill_places(given, named)
        missing += self._fill_names(named)
        if missing:
            wrong.append(f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
        others = {name: named.pop(name) for name in list(named) if name not in expected}
        refused = [self._refusal(name, value) for name, value in others.items()]
        return [*wrong, *(reason for reason in refused if reason)]

    def _fill_places(self, given: list[Any], named: dict[str, Any]) -> list[str]:
        """Appends what was captured by position and is given by name, or constant; gives back the names of the rest."""
        missing = []
        for place in range(len(given), self._positional):
            item = self._inputs.args[place]
            name = self._inputs.names[place] if place < len(self._inputs.names) else f"input {place}"
            constant = item.value if isinstance(item, nesting.Constant) else None
            if name not in named and not isinstance(item, nesting.Constant):
                missing.append(name)
            given.append(named.pop(name, constant))
        return missing

    def _fill_names(self, named: dict[str, Any]) -> list[str]:
        """Fills in the arguments that were captured by name; the names of those that are missing."""
        left = {name: item for name, item in self._inputs.kwargs.items() if name not in named}
        named |= {name: item.value for name, item in left.items() if isinstance(item, nesting.Constant)}
        return [name for name, item in left.items() if not isinstance(item, nesting.Constant)]

    def _refusal(self, name: str, value: Any) -> str | None:
        """Why an argument can't be given that the model was captured without; None where it is the default."""
        default = self._inputs.defaults.get(name)
        if default is None:
            known = name in self._inputs.names
            return f"the model was captured without {name}" if known else f"the model takes no input {name}"
        if nesting.holds(default, value):
            return None
        said = repr(default.value) if isinstance(default, nesting.Constant) else "its default"
        shown = repr(value) if isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"
        return f"the model was captured with {said} for {name}, not with {shown}"
