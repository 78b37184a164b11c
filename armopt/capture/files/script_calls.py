"""How large the code of a TorchScript archive grows once every call is replaced by what it calls, as capture does.

Forty functions that each call the next one twice are a short text, and would never come to an end.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from armopt.capture.files.script_code import UnshownError, dotted

#: Calls of the model once all are replaced: that of a large network has some hundred thousand.
_MOST_CALLS = 500_000


@dataclass(frozen=True, slots=True)
class _Class:
    methods: dict[str, ast.FunctionDef] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)


class _Declared:
    """What the code declares, by whole names."""

    def __init__(self, sources: Mapping[str, ast.Module]) -> None:
        self.functions: dict[str, ast.FunctionDef] = {}
        self.classes: dict[str, _Class] = {}
        for name, tree in sources.items():
            place = name.removeprefix("code/").removesuffix(".py").replace("/", ".")
            for statement in tree.body:
                if isinstance(statement, ast.FunctionDef):
                    self.functions[f"{place}.{statement.name}"] = statement
                elif isinstance(statement, ast.ClassDef):
                    self.classes[f"{place}.{statement.name}"] = _described(statement)

    def called(self, name: str) -> Iterator[ast.FunctionDef]:
        """What a whole name calls: a function, or what makes an object."""
        if name in self.functions:
            yield self.functions[name]
        elif name in self.classes and "__init__" in self.classes[name].methods:
            yield self.classes[name].methods["__init__"]

    def method(self, kinds: set[str], name: str) -> Iterator[ast.FunctionDef]:
        """The methods of a name that one of these classes has; of all where the class is not known."""
        for kind in kinds or self.classes:
            if kind in self.classes and name in self.classes[kind].methods:
                yield self.classes[kind].methods[name]


def _described(statement: ast.ClassDef) -> _Class:
    found = _Class()
    for each in statement.body:
        match each:
            case ast.FunctionDef():
                found.methods[each.name] = each
            case ast.AnnAssign(target=ast.Name(id=name), annotation=kind):
                found.types[name] = dotted(kind)
            case ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value=str(name)))], value=kind):
                found.types[name] = dotted(kind)
    return found


class _Sizes:
    def __init__(self, declared: _Declared) -> None:
        self._declared = declared
        self._known: dict[ast.FunctionDef, int] = {}
        self._open: set[ast.FunctionDef] = set()

    def of(self, function: ast.FunctionDef) -> int:
        """Calls in a function and in all that it calls.

        Raises:
            UnshownError: They are too many, or don't come to an end.
        """
        if function in self._open:
            raise UnshownError(f"a call of {function.name} within itself")
        if function not in self._known:
            self._open.add(function)
            kinds = self._kinds(function)
            calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
            inside = (max(map(self.of, self._called(call.func, kinds)), default=0) for call in calls)
            self._known[function] = len(calls) + sum(inside)
            self._open.discard(function)
        if self._known[function] > _MOST_CALLS:
            raise UnshownError(f"{self._known[function]} calls within {function.name}")
        return self._known[function]

    def _kinds(self, function: ast.FunctionDef) -> dict[str, set[str]]:
        """Which classes or functions a name of a function may stand for."""
        found = {arg.arg: {dotted(arg.annotation)} for arg in function.args.args if arg.annotation is not None}
        assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
        for node in sorted(assigned, key=lambda each: (each.lineno, each.col_offset)):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, set()).update(self._kind(node.value, found))
        return found

    def _kind(self, value: ast.expr, known: Mapping[str, set[str]]) -> set[str]:
        match value:
            case ast.Name(id=name):
                return known.get(name, set())
            case ast.Call(func=ast.Name(id="getattr"), args=[holder, ast.Constant(value=str(name))]):
                return self._attribute(holder, name, known)
            case ast.Call(func=ast.Attribute() as made) if dotted(made) in self._declared.classes:
                return {dotted(made)}
            case ast.Attribute(value=holder, attr=name):
                whole = dotted(value)
                return {whole} if whole.startswith("__torch__.") else self._attribute(holder, name, known)
        return set()

    def _attribute(self, holder: ast.expr, name: str, known: Mapping[str, set[str]]) -> set[str]:
        classes = (self._declared.classes.get(kind) for kind in self._kind(holder, known))
        return {each.types[name] for each in classes if each is not None and name in each.types}

    def _called(self, function: ast.expr, kinds: Mapping[str, set[str]]) -> Iterator[ast.FunctionDef]:
        match function:
            case ast.Name(id=name):
                for kind in kinds.get(name, set()):
                    yield from self._declared.called(kind)
            case ast.Attribute(value=holder, attr=name):
                whole = dotted(function)
                if whole.startswith("__torch__."):
                    yield from self._declared.called(whole)
                elif not whole.startswith(("torch.", "ops.")):
                    yield from self._declared.method(self._kind(holder, kinds), name)


def check_sizes(sources: Mapping[str, ast.Module]) -> None:
    """Refuses code that grows too large.

    Raises:
        UnshownError: Naming a function.
    """
    declared = _Declared(sources)
    sizes = _Sizes(declared)
    for function in declared.functions.values():
        sizes.of(function)
    for each in declared.classes.values():
        for method in each.methods.values():
            sizes.of(method)
