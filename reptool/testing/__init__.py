"""The test kit of the algebra: random operators, operands that fit a rule, near misses, and the check against ``run``.

For a new rule, add the strategy of its operands to ``FITTING`` and hold ``check_rule`` to it on ``operands(rule)`` and
``near_misses(rule)``. Needs hypothesis, which only tests install; nothing else in the package imports this module.
"""

from reptool.testing.check import TOLERANCE, check_rule, inputs, require_equal
from reptool.testing.misses import changes, near_misses
from reptool.testing.nouns import borders, convs, norms, pools, scales, transposed_convs
from reptool.testing.strategies import FITTING, Operands, operands

__all__ = [
    "FITTING",
    "TOLERANCE",
    "Operands",
    "borders",
    "changes",
    "check_rule",
    "convs",
    "inputs",
    "near_misses",
    "norms",
    "operands",
    "pools",
    "require_equal",
    "scales",
    "transposed_convs",
]
