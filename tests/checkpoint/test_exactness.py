"""Every family times every way of building its block: exact in float64, and in half precision rounded once."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import golden_vectors
import pytest
import torch
from checkpoint.reference_blocks import MAKERS, Cell, settled

from reptool.checkpoint import recipes, siblings
from reptool.checkpoint.blockwise import fuse_state_dict
from reptool.checkpoint.recipes import RECIPES
from reptool.errors import NotEquivalentError

EXACT = 1e-12
CELLS = {
    "dense": Cell(),
    "two groups": Cell(groups=2),
    "depthwise": Cell(groups=8),
    "stride 2": Cell(stride=2, groups=2),
    "depthwise, stride 2": Cell(stride=2, groups=8),
    "dilation 2": Cell(dilation=2),
    "depthwise, dilation 2": Cell(dilation=2, groups=8),
    "not square": Cell(window=(5, 3), groups=2),
    "not square, depthwise": Cell(window=(1, 7), groups=8),
    "even": Cell(window=(4, 2)),
    "without affine": Cell(affine=False, groups=2),
    "with biases": Cell(bias=True, groups=2),
}
ONE_GROUP, DEPTHWISE = (
    {name for name, c in CELLS.items() if c.groups == 1},
    {n for n, c in CELLS.items() if c.groups == 8},
)
EVEN, DILATED = {"even"}, {name for name, c in CELLS.items() if c.dilation > 1}
STRIDED = {name for name, c in CELLS.items() if c.stride > 1}
GIVEN_SIZE = {"not square, depthwise"} | EVEN
ALL = set(CELLS)

# families whose block is built in fewer ways: depthwise only, one group, one size, a norm's border that takes no bias
LIMITS = {
    "dbb": ALL - DILATED - EVEN - {"with biases"},
    "unireplknet (projection)": {"dense", "without affine"},
    "unireplknet (block)": DEPTHWISE - GIVEN_SIZE - DILATED,
    "unireplknet (small block)": DEPTHWISE - EVEN,
    "unireplknet (official)": DEPTHWISE - GIVEN_SIZE - DILATED,
    "repmixer": DEPTHWISE - STRIDED - EVEN,
    "repvit (layer)": ALL - EVEN,
    "repvit": DEPTHWISE - STRIDED - EVEN,
    "qarepvgg (plain)": ONE_GROUP - EVEN,
    "qarepvgg": ONE_GROUP - STRIDED - EVEN - DILATED,
    "yolor": {"dense"},
    "conv_bn": ALL,
}
ELSEWHERE = {"orepa", "repmlp", "repmlpnet", "repopt"}
"""Families with test files of their own, where this matrix of convolutions does not fit."""
MATRIX = [
    (title, name)
    for title in MAKERS
    for name in CELLS
    if name in LIMITS.get(title, LIMITS.get(title.partition(" ")[0], ALL - EVEN))
]


def errors(case, state, eps=1e-5):
    """The relative error of each fused convolution, run in float64, against its reference; and all fused tensors."""
    after, report = fuse_state_dict(state, eps=eps, assume=case.assume)
    assert not report.left
    assert all(row.error <= EXACT for row in report.rows)
    assert set(case.references) <= {row.fused for row in report.rows}
    x, found = case.inputs(1), {}
    for name, reference in case.references.items():
        got = case.cell.run(x, after[f"{name}.weight"].double(), after[f"{name}.bias"].double())
        found[name] = golden_vectors.relative_error(got, reference(x))
    return max(found.values()), {k: t for k, t in after.items() if k not in state or t is not state[k]}


def test_every_recipe_is_in_the_matrix():
    """A new family is entered, or has a file of its own; every cell is reached by several."""
    titles = {r.title for recipe in RECIPES for r in recipe.readings or (recipe,) if r.family not in ELSEWHERE}
    pairs = {f"{siblings.FAMILY} ({style.implementation})" for style in siblings._STYLES}
    assert titles | pairs == set(MAKERS)
    assert len(MATRIX) >= 200
    assert all(sum(name == cell for _, name in MATRIX) >= 4 for cell in CELLS)


@pytest.mark.parametrize(("title", "cell"), MATRIX, ids=[f"{t}-{c}" for t, c in MATRIX])
def test_a_block_is_exact(title, cell):
    """On random and on calibrated statistics the fused convolution equals the block to 1e-12; with another eps it does not."""
    torch.manual_seed(0)
    for calibrated in (False, True):
        case = settled(MAKERS[title](CELLS[cell]), calibrated=calibrated)
        with torch.no_grad():
            assert errors(case, case.module.state_dict())[0] <= EXACT
    if any(k.endswith("running_var") for k in case.module.state_dict()):
        assert errors(case, case.module.state_dict(), eps=1.1e-5)[0] > EXACT


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("title", MAKERS)
def test_halves_lose_no_more_than_the_cast(title, dtype):
    """Fused in float64 and rounded once: what is stored is the exact kernel's nearest number of the file's dtype."""
    torch.manual_seed(0)
    allowed = [name for t, name in MATRIX if t == title]
    case = settled(MAKERS[title](CELLS[allowed[0]]), calibrated=True)
    half = {k: t.to(dtype) if t.is_floating_point() else t for k, t in case.module.state_dict().items()}
    case.module.load_state_dict({k: t.double() if t.is_floating_point() else t for k, t in half.items()})
    with torch.no_grad():
        error, exact = errors(case, case.module.state_dict())
        rough, stored = errors(case, half)
    assert error <= EXACT
    assert stored.keys() == exact.keys()
    ulp = torch.finfo(dtype).eps
    for key, tensor in stored.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, exact[key].to(dtype))
        bound = torch.clamp(exact[key].abs() * ulp / 2, min=torch.finfo(dtype).smallest_normal * ulp)
        assert ((tensor.double() - exact[key]).abs() <= bound).all()
    assert EXACT < rough <= 10 * ulp


@pytest.mark.parametrize(
    ("title", "cell"),
    [("repvgg (official)", "dense"), ("replknet (timm)", "two groups"), ("conv_bn (sequence)", "even")],
)
def test_the_proof_sees_every_tap_and_border(title, cell, monkeypatch):
    """Negative control: the proof's image is no larger than the window; still, any tap, bias or border that is off fails."""
    case = settled(MAKERS[title](CELLS[cell]), calibrated=False)
    state, real = case.module.state_dict(), recipes.total
    assert proved(case, state)
    for tap in product(*map(range, window_of(case, state))):

        def off(paths, last=None, tap=tap):
            conv = real(paths, last)
            conv.kernel[(-1, -1, *tap)] += 1e-9 * conv.kernel.abs().max()
            return conv

        monkeypatch.setattr(recipes, "total", off)
        assert not proved(case, state)
    for fault in (
        lambda conv: replace(conv, bias=conv.bias + 1e-9 * conv.bias.abs().max()),
        lambda conv: replace(conv, padding_mode="replicate"),
        lambda conv: replace(conv, padding=((0, sum(conv.padding[0])), *conv.padding[1:])),
    ):
        monkeypatch.setattr(recipes, "total", lambda paths, last=None, fault=fault: fault(real(paths, last)))
        assert not proved(case, state)


def window_of(case, state):
    """The size of the case's one fused kernel."""
    after, _ = fuse_state_dict(state, assume=case.assume)
    return max((t.shape[2:] for k, t in after.items() if k not in state or t is not state[k]), key=len)


def proved(case, state):
    """Whether the fused kernel passes its proof."""
    try:
        fuse_state_dict(state, assume=case.assume)
    except NotEquivalentError:
        return False
    return True
