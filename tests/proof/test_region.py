"""The proof of one region, each claim beside the fault it must catch."""

from __future__ import annotations

import pytest
import torch

from reptool.proof import prove_region, stored_is_rounded


def _images(count=2):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 3, 7, 7, generator=generator),) for _ in range(count)]


def test_equal_forms_are_proved():
    """Distributivity holds to rounding, and float32 inputs are doubled."""
    proof = prove_region("stem", lambda x: 3 * (x + 1), lambda x: 3 * x + 3, _images())
    assert proof.passed
    assert proof.error < 1e-15
    assert "stem" in str(proof)


@pytest.mark.parametrize(
    ("fused", "detail"),
    [
        (lambda x: 3 * x * (1 + 1e-11), ""),
        (lambda x: (3 * x)[:, :2], "shape (2, 2, 7, 7) instead of (2, 3, 7, 7)"),
        (lambda x: 3 * x + float("nan"), "the fused form is not finite"),
        (lambda x: 3 * x.float(), "not in float64"),
    ],
)
def test_unequal_forms_are_named(fused, detail):
    """A relative error of 1e-11, a shape, a NaN and a narrower dtype each fail, with the reason."""
    proof = prove_region("stage1.0", lambda x: 3 * x, fused, _images())
    assert not proof.passed
    assert detail in proof.detail


def test_nan_on_both_sides_is_not_equal():
    """NaN proves nothing."""
    assert not prove_region("a", lambda x: x / 0 * 0, lambda x: x / 0 * 0, _images()).passed


def test_masks_and_numbers_are_equal_or_not():
    """What is not floating has no rounding: one entry that differs, or another type, is a fault."""
    assert prove_region("mask", lambda x: x > 0, lambda x: ~(x <= 0), _images()).passed
    assert not prove_region("mask", lambda x: x > 0, lambda x: x >= x.max(), _images()).passed
    assert not prove_region("mask", lambda x: x > 0, lambda x: (x > 0).long(), _images()).passed


def test_fault_on_one_of_several_inputs_is_found():
    """Every input counts, not only the first."""
    inputs = [(torch.zeros(1),), (torch.ones(1),)]
    assert not prove_region("a", lambda x: x, lambda x: x * 2, inputs).passed
    assert not prove_region("a", lambda x: x, lambda x: x, []).passed


def test_stored_is_rounded_is_bitwise():
    """The rounded tensor is accepted; one ulp, an overflow, a shape and a zero's sign are not."""
    exact = torch.randn(50, dtype=torch.float64)
    stored = exact.float()
    assert stored_is_rounded(exact, stored)
    assert stored_is_rounded(exact, exact.half())
    moved = stored.clone()
    moved[7] = torch.nextafter(moved[7], torch.tensor(torch.inf))
    assert not stored_is_rounded(exact, moved)
    assert not stored_is_rounded(exact, stored[:-1])
    huge = torch.tensor([1e300], dtype=torch.float64)
    assert not stored_is_rounded(huge, huge.float())
    assert not stored_is_rounded(torch.zeros(1, dtype=torch.float64), -torch.zeros(1))


def test_entries_that_are_not_floating_stay_as_they_are():
    """A mask is a mask on both sides."""
    masked = lambda x, m: x.masked_fill(m, 0.0)  # noqa: E731
    entries = (torch.randn(2, 3), torch.tensor([[True, False, True], [False, True, False]]))
    assert prove_region("masked", masked, masked, [entries]).passed
    assert not prove_region("masked", masked, lambda x, m: x.masked_fill(~m, 0.0), [entries]).passed
