"""Symbolic expressions of a .pt2: what sizes depend on. torch reads them with sympy, which runs Python.

So they go through a grammar first: numbers, names of symbols and arithmetic on them, as torch writes them today,
``Add(FloorDiv(Symbol('s77', positive=True, integer=True), Integer(2)), Integer(-1))``, and as it did, ``s0//2 - 1``.
"""

from __future__ import annotations

import ast
import math
import re

#: Characters of one expression. A detection model of ten stages has some thousand.
_MOST = 20_000
#: Terms that an expression may have once it is multiplied out, which sympy does.
_MOST_TERMS = 500
_SYMBOL = re.compile(r"[A-Za-z_]\w{0,60}", re.ASCII)
#: Symbols as torch names them; another name could be a function of sympy's.
_BARE = re.compile(r"[suz][fs]?\d{1,6}")
_ASSUMPTIONS = frozenset({"positive", "integer", "nonnegative", "real", "negative", "nonpositive", "zero"})
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Div)
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_FUNCTIONS = """
FloorDiv ModularIndexing Where PythonMod Mod CleanDiv CeilToInt FloorToInt CeilDiv FloatTrueDiv IntTrueDiv TruncToFloat
TruncToInt RoundToInt ToFloat Max Min max min Abs floor ceiling Identity Equality Unequality StrictLessThan LessThan
StrictGreaterThan GreaterThan Eq Ne Lt Le Gt Ge And Or Not
"""
#: Functions that give one term, whatever is in them.
_OPAQUE = frozenset(_FUNCTIONS.split())
_MOST_POWER = 8
_MOST_DIGITS = 19


class UnreadableError(Exception):
    """An expression that is none of these."""


def checked(text: str) -> str:
    """The expression, written anew from what was understood of it.

    Raises:
        UnreadableError: It holds anything but arithmetic on sizes, or more of it than a model has.
    """
    if len(text) > _MOST:
        raise UnreadableError(f"the symbolic expression {text[:40]!r}… of {len(text)} characters")
    try:
        tree = ast.parse(text, mode="eval").body
        terms = _terms(tree)
        written = ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError, UnreadableError) as error:
        found = f", in which is {error}" if isinstance(error, UnreadableError) else ""
        raise UnreadableError(f"the symbolic expression {text[:80]!r}{found}") from None
    if terms > _MOST_TERMS:
        raise UnreadableError(f"the symbolic expression {text[:80]!r} of more than {_MOST_TERMS} terms")
    return written


def _terms(node: ast.expr) -> int:
    """How many terms an expression has once it is multiplied out."""
    match node:
        case ast.Constant(value=bool()):
            return 1
        case ast.Constant(value=int(value)) if len(str(abs(value))) <= _MOST_DIGITS:
            return 1
        case ast.Constant(value=float()):
            return 1
        case ast.Name(id=name) if _BARE.fullmatch(name) or name in ("true", "false", "int_oo"):
            return 1
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
            return _terms(operand)
        case ast.BinOp(left=left, op=op, right=right):
            return _of_operator(left, op, right)
        case ast.Compare(left=left, ops=[op], comparators=[right]) if isinstance(op, _COMPARISONS):
            return _bounded(_terms(left) + _terms(right), opaque=True)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            return _of_call(name, args, keywords)
    raise UnreadableError(f"{ast.unparse(node)[:80]!r}")


def _of_operator(left: ast.expr, op: ast.operator, right: ast.expr) -> int:
    if isinstance(op, ast.Pow):
        return _power(left, right)
    if not isinstance(op, _OPERATORS):
        raise UnreadableError(type(op).__name__)
    terms = _terms(left), _terms(right)
    if isinstance(op, ast.Add | ast.Sub):
        return _bounded(sum(terms))
    return _bounded(terms[0] * terms[1], opaque=not isinstance(op, ast.Mult))


def _power(base: ast.expr, exponent: ast.expr) -> int:
    text = ast.unparse(exponent)
    match = re.fullmatch(r"(?:Integer\()?(-?\d)\)?", text)
    if match is None or int(match[1]) > _MOST_POWER:
        raise UnreadableError(f"a power of {text[:40]}")
    return _bounded(_terms(base) ** abs(int(match[1])))


def _of_call(name: str, args: list[ast.expr], keywords: list[ast.keyword]) -> int:
    if name == "Symbol":
        return _symbol(args, keywords)
    if name == "Float":
        return _float(args, keywords)
    if keywords:
        raise UnreadableError(f"{name} by {keywords[0].arg!r}")
    if name in ("Integer", "Rational"):
        return _integers(args)
    if name in ("Pow", "PowByNatural") and len(args) == 2:
        return _power(*args)
    if name not in ("Add", "Mul") and name not in _OPAQUE:
        raise UnreadableError(f"a call of {name[:40]!r}")
    terms = [_terms(arg) for arg in args]
    return _bounded(math.prod(terms) if name == "Mul" else sum(terms), opaque=name in _OPAQUE)


def _float(args: list[ast.expr], keywords: list[ast.keyword]) -> int:
    """``Float('0.5', precision=53)``: its digits stand there as text."""
    if not args or not re.fullmatch(r"'-?[\d.]{1,40}(?:e[-+]?\d{1,3})?'", ast.unparse(args[0])):
        raise UnreadableError("a Float of something else")
    _assumed(keywords, frozenset({"precision"}))
    return 1


def _integers(args: list[ast.expr]) -> int:
    if not all(re.fullmatch(r"-?\d{1,19}", ast.unparse(arg)) for arg in args):
        raise UnreadableError("an Integer of something else")
    return 1


def _symbol(args: list[ast.expr], keywords: list[ast.keyword]) -> int:
    match args:
        case [ast.Constant(value=str(name))] if _SYMBOL.fullmatch(name):
            _assumed(keywords, _ASSUMPTIONS)
            return 1
    raise UnreadableError("a Symbol of something else")


def _assumed(keywords: list[ast.keyword], known: frozenset[str]) -> None:
    for keyword in keywords:
        value = keyword.value
        if keyword.arg not in known or not isinstance(value, ast.Constant) or not isinstance(value.value, (bool, int)):
            raise UnreadableError(f"an assumption {keyword.arg!r}")


def _bounded(terms: int, *, opaque: bool = False) -> int:
    if terms > _MOST_TERMS:
        raise UnreadableError(f"a part of more than {_MOST_TERMS} terms")
    return 1 if opaque else terms
