"""Conditions of sizes are trees of plain values, computed without running text."""

from __future__ import annotations

import math
import pickle

import pytest
import sympy
import torch
from torch.utils._sympy.functions import FloorDiv, Mod
from torch.utils._sympy.printers import PythonPrinter

from reptool.errors import CaptureError
from reptool.graph.conditions import holds, tree_of

X, Y = torch.empty(2, 4, 9, 11), torch.empty(7, 3)
# condition, its value for X and Y
CONDITIONS = [
    ("x.shape[2] == 9", True),
    ("x.shape[2] != 9", False),
    ("y.shape[0] < x.shape[2]", True),
    ("y.shape[0] <= 6", False),
    ("x.shape[3] > x.shape[2]", True),
    ("x.shape[3] >= 12", False),
    ("1 < x.shape[0] < 3", True),
    ("1 < x.shape[0] < 2", False),
    ("x.shape[2] % 4 == 1 and x.shape[3] // 4 == 2", True),
    ("x.shape[2] % 4 == 0 or x.shape[3] - 1 == -10", False),
    ("not (x.shape[0] == 2)", False),
    ("x.shape[0]**3 + 2*y.shape[1] == 14", True),
    ("x.shape[2] / 2 == 4.5", True),
    ("math.trunc(0.50000000000000000*torch.sym_float(x.shape[2])) == 4", True),
    ("math.ceil(x.shape[2] / 2) == 5", True),
    ("math.floor(x.shape[2] / 2) == 5", False),
    ("torch._sym_sqrt(x.shape[2]) == 3.0", True),
    ("max(x.shape[0], y.shape[1], 5) == 5", True),
    ("min(x.shape[0], y.shape[1]) == 3", False),
    ("abs(x.shape[0] - 5) == 3", True),
    ("round(x.shape[2] / 2) == 4", True),
    ("x.shape[0] < math.inf", True),
    ("(x.shape[0] & 3) == 2", True),
    ("True", True),
]


@pytest.mark.parametrize(("text", "value"), CONDITIONS)
def test_a_tree_has_the_value_of_its_text(text, value):
    """Every operator that torch prints is computed as Python does; the tree is plain and can be pickled."""
    tree = tree_of(text, ("x", "y"))
    assert holds(tree, (X, Y)) is value
    assert eval(text, {"math": math, "torch": torch}, {"x": X, "y": Y}) is value  # noqa: S307
    assert pickle.loads(pickle.dumps(tree)) == tree  # noqa: S301  # our own bytes


@pytest.mark.parametrize(
    "text",
    [
        "x.shape[-1] == 9",
        "x.shape[0] == z.shape[0]",
        "x.dim() == 4",
        "open('x')",
        "x.shape",
        "[1] == [1]",
        "'a' == 'a'",
    ],
)
def test_what_is_no_condition_of_sizes_is_refused(text):
    """Text that names anything but sizes, numbers and known operators is no condition; nothing of it runs."""
    with pytest.raises(CaptureError, match="it decides by a size"):
        tree_of(text, ("x", "y"))


def test_expressions_are_read_as_torch_prints_them():
    """The printer of torch and the reader here agree on divisions and remainders."""
    size = sympy.Symbol("size", integer=True, positive=True)
    for expression in (FloorDiv(size, 4) * 4, Mod(size, 5), FloorDiv(size + 3, 2) - Mod(size, 3), size**2 - 3 * size):
        text = PythonPrinter().doprint(expression).replace("size", "x.shape[2]")
        assert holds(tree_of(text, ("x",)), (X,)) == int(expression.subs(size, 9))
