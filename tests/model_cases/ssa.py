"""Simplified scaled dot-product attention."""

from model_cases import BLOCK_OPSETS, Case, Vector
from reptool.models.attention.simplified import SimplifiedScaledDotProductAttention as Simplified

CASES = [
    Case(
        "ssa_block",
        {"d_model": 16, "h": 2},
        ((5, 16), (7, 16), (7, 16)),
        {"Linear": 1, "MatMul": 2, "Softmax": 1},
        ((9, 16), (3, 16), (3, 16)),
        opsets=BLOCK_OPSETS,
    ),
]

GOLDEN = {
    "ssa-collection-self-d32-h4": Vector(lambda: Simplified(32, 4), call=lambda model, x: model(x, x, x)),
    "ssa-collection-cross-d24-h3": Vector(lambda: Simplified(24, 3)),
    "ssa-collection-single-d16-h1": Vector(lambda: Simplified(16, 1), call=lambda model, x: model(x, x, x)),
}
