"""Conditions of sizes as trees of plain values: read from what torch prints, computed without running text.

A tree is a number, ``(place, axis)`` for the size of an axis of a tensor, or ``(operator, *trees)``. It can be an argument
of a node, be pickled with it, and a compiler traces its evaluation as it traces any other Python.
"""

from __future__ import annotations

import ast
import math
import operator
from typing import TYPE_CHECKING, Any

import torch

from reptool.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

Tree = bool | int | float | tuple[Any, ...]

_COMPARED: dict[type[ast.AST], str] = {
    ast.Eq: "==",
    ast.NotEq: "!=",
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
}
_COMPUTED: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.BitXor: "^",
    ast.LShift: "<<",
    ast.RShift: ">>",
}
_ALONE: dict[type[ast.AST], str] = {ast.USub: "negative", ast.UAdd: "positive", ast.Not: "not"}

_BINARY: dict[str, Any] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
    "<<": operator.lshift,
    ">>": operator.rshift,
}
_UNARY: dict[str, Any] = {"negative": operator.neg, "positive": operator.pos, "not": operator.not_}
_CALLED: dict[str, Any] = {
    "max": max,
    "min": min,
    "abs": abs,
    "round": round,
    "float": float,
    "torch.sym_float": torch.sym_float,
    "torch._sym_sqrt": torch._sym_sqrt,  # type: ignore[attr-defined]  # noqa: SLF001  # torch prints it so
    **{f"math.{name}": getattr(math, name) for name in ("trunc", "floor", "ceil", "sqrt", "exp", "log", "log2", "pow")},
    **{
        f"math.{name}": getattr(math, name)
        for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan")
    },
}
_OPERATORS = {**_BINARY, **_UNARY, **_CALLED}
_NUMBERS = {"math.inf": math.inf, "math.nan": math.nan, "math.pi": math.pi, "math.e": math.e}


def tree_of(text: str, names: Sequence[str]) -> Tree:
    """The tree of a condition such as ``x.shape[2] > 5``, where ``names`` are the tensors by place.

    Raises:  CaptureError for an operator that is not known here
    """
    return _tree(ast.parse(text, mode="eval").body, tuple(names))


def holds(tree: Tree, tensors: Sequence[Tensor]) -> Any:
    """The value of a tree."""
    if not isinstance(tree, tuple):
        return tree
    kind = tree[0]
    if isinstance(kind, int):
        return tensors[kind].shape[tree[1]]
    if kind == "and":
        return all(holds(part, tensors) for part in tree[1:])
    if kind == "or":
        return any(holds(part, tensors) for part in tree[1:])
    return _OPERATORS[kind](*[holds(part, tensors) for part in tree[1:]])


def _tree(node: ast.AST, names: tuple[str, ...]) -> Tree:
    """One node of the syntax of a condition, and those below it."""
    match node:
        case ast.Constant(bool() | int() | float() as value):
            return value
        case ast.Subscript(ast.Attribute(ast.Name(name), "shape"), ast.Constant(int(axis))) if name in names:
            return names.index(name), axis
        case ast.BoolOp(kind, parts):
            return ("and" if isinstance(kind, ast.And) else "or", *(_tree(part, names) for part in parts))
        case ast.Compare(first, kinds, others):
            return _chain(first, kinds, others, names)
        case ast.BinOp(left, kind, right):
            return _COMPUTED[type(kind)], _tree(left, names), _tree(right, names)
        case ast.UnaryOp(kind, part):
            return _ALONE[type(kind)], _tree(part, names)
        case ast.Call(function, parts) if ast.unparse(function) in _CALLED:
            return (ast.unparse(function), *(_tree(part, names) for part in parts))
        case ast.Attribute() if ast.unparse(node) in _NUMBERS:
            return _NUMBERS[ast.unparse(node)]
    raise CaptureError(
        "cannot capture the model: it decides by a size",
        why=f"the operator in {ast.unparse(node)} is not known here",
        do="compute it once, before fusing, or report this with the model",
    )


def _chain(first: ast.expr, kinds: list[ast.cmpop], others: list[ast.expr], names: tuple[str, ...]) -> Tree:
    """A comparison; a chain such as ``1 < x < 5`` is all of its links."""
    sides = [_tree(side, names) for side in (first, *others)]
    links = [(_COMPARED[type(kind)], a, b) for kind, a, b in zip(kinds, sides[:-1], sides[1:], strict=True)]
    return links[0] if len(links) == 1 else ("and", *links)
