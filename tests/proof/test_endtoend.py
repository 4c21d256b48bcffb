"""The noise-calibrated check: quiet on correct networks, loud on gross faults, whatever the scale."""

from __future__ import annotations

import math

import pytest
import torch
from proof.nets import fused_net, training_net
from torch import nn

from reptool.proof import EndToEnd, Verdict, check_end_to_end, compare, inputs_for, verify_models
from reptool.proof.verdict import RegionProof

SIZE = [(8, 3, 10, 10)]


def _worst(reference, candidate, sizes=SIZE):
    checks = verify_models(reference, candidate, sizes, candidate)
    return max(check.ratio for check in checks), checks


def test_correct_networks_are_accepted():
    """Forty networks of two to nine blocks, fused in float64 and rounded once: T stays below 2 on all."""
    ratios = []
    for seed in range(40):
        net = training_net(seed, depth=2 + seed % 8)
        ratios.append(_worst(net, fused_net(net))[0])
    assert len(ratios) == 40
    assert min(ratios) > 0.2
    assert max(ratios) < 2


def test_further_sizes_are_calibrated_too():
    """One input at a time, and another image size, are held to copies of their own."""
    net = training_net(3)
    checks = _worst(net, fused_net(net), [(8, 3, 10, 10), (1, 3, 10, 10), (2, 3, 13, 17)])[1]
    assert [check.label for check in checks] == [
        "torch, batch 8, 10x10",
        "torch, batch 1, 10x10",
        "torch, batch 2, 13x17",
    ]
    assert all(check.passed for check in checks)


def _shift_bias(net):
    with torch.no_grad():
        net[0].bias += 1e-2
    return net


def _clip(net):
    net[3] = nn.Hardtanh(0, 0.5)
    return net


FAULTS = {
    "bias shifted by 1e-2": lambda net: _shift_bias(fused_net(net)),
    "branch dropped": lambda net: fused_net(net, without_point_in=1),
    "clipped activation": lambda net: _clip(fused_net(net)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_gross_faults_are_found(fault):
    """Every planted fault is found in every network, though the copies are made of the faulty one."""
    for seed in range(6):
        net = training_net(seed, depth=2 + seed)
        ratio, checks = _worst(net, FAULTS[fault](net))
        assert ratio > 2, seed
        assert checks[0].passed is False


def test_float64_networks_are_held_to_the_noise_of_both():
    """In float64 the reference is rounded as well: correct networks pass, and an error of 1e-12 does not."""
    for seed in range(10):
        net = training_net(seed, depth=2 + seed % 8).double()
        fused = fused_net(net)
        ratio, checks = _worst(net, fused)
        assert checks[0].resolution < 1e-14
        assert ratio < 2, seed
        with torch.no_grad():
            fused[0].weight.mul_(1 + 1e-12)
        assert _worst(net, fused)[0] > 10, seed


def test_a_fault_shared_by_copies_and_centre_is_hidden():
    """The negative control of the centre: copies measured against the reference itself would hide the fault."""
    reference = torch.randn(8, 10, dtype=torch.float64)
    faulty = (reference + 1e-3).float()
    copies = [faulty + 1e-7 * torch.randn(8, 10) for _ in range(4)]
    assert compare(reference, faulty, copies)[0] < 2
    assert compare(reference, faulty, copies, centre=faulty.double())[0] > 100


def test_ratio_does_not_depend_on_scale():
    """Outputs of 1e10 or 1e-10 give the same verdict."""
    reference = torch.randn(8, 10, dtype=torch.float64)
    for scale in (1e-10, 1.0, 1e10):
        r = reference * scale
        ratio, eps = compare(r, r.float(), [r.float() * (1 + 1e-7)])
        assert 0 < ratio < 2
        assert 5e-8 < eps < 2e-7


def _nan(x):
    x = x.clone()
    x[0, 0] = torch.nan
    return x


def test_inputs_that_are_not_floating_are_rows_of_the_example():
    """Every batch is made of the rows in turn, in their dtype, and floating inputs beside them are drawn."""
    seen = []

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(4, 6)

        def forward(self, ids, factor):
            seen.append((ids, factor))
            return self.table(ids) * factor

    model, example = Table().eval(), (torch.tensor([[3, 0], [1, 1], [2, 3]]), torch.zeros(3, 1, 1))
    checks = verify_models(model, model, [((4, 2), (4, 1, 1))], model, like=example)
    assert [c.passed for c in checks] == [True]
    assert {ids.dtype for ids, _ in seen} == {torch.int64}
    assert {tuple(ids[:, 0].tolist()) for ids, _ in seen} >= {(3, 1, 2, 3), (1, 2, 3, 1)}
    assert all(factor.any() for _, factor in seen)


R = torch.linspace(-1, 1, 40, dtype=torch.float64).view(4, 10)


@pytest.mark.parametrize(
    ("reference", "got", "detail"),
    [
        (R, _nan(R), "NaN or infinite"),
        (_nan(R), R, "NaN or infinite"),
        (R / 0, -R / 0, "NaN or infinite"),
        (R, R[:1], r"shape \(1, 10\) instead of \(4, 10\)"),
        (R, [R, R], "2 outputs"),
        ({"a": R}, {"b": R}, "instead of 1 outputs"),
        (R, R.long(), "torch.int64"),
    ],
)
def test_incomparable_results_fail(reference, got, detail):
    """Structure, shape, dtype kind and the places of NaN and infinity have to match; noise excuses none of them."""
    import re

    check = check_end_to_end("x", reference, got, [reference])
    assert check.passed is False
    assert re.search(detail, check.detail)


def test_matching_nan_is_not_an_error():
    """NaN at the same places is left out of the figures."""
    assert check_end_to_end("x", _nan(R), _nan(R).float(), [_nan(R).float()]).passed


def test_zero_everywhere_is_equal():
    """Nothing over nothing is no error, and something over nothing is infinite."""
    zero = torch.zeros(2, 3)
    assert compare(zero.double(), zero, [zero]) == (0.0, 0.0)
    assert compare(zero.double(), zero + 1, [zero])[0] == math.inf


def test_loud_noise_is_inconclusive():
    """Where copies differ by more than a thousandth nothing is concluded."""
    r = torch.randn(8, 10, dtype=torch.float64)
    check = check_end_to_end("x", r, r.float(), [r.float() * 1.01])
    assert check.passed is None
    assert Verdict(end_to_end=(check,)).inconclusive


def test_candidate_that_does_not_run_fails():
    """An exception of the runtime is a failed check with its first line."""

    def broken(x):
        raise ValueError("no kernel for 10x10")

    net = training_net(0)
    check = verify_models(net, broken, SIZE, net)[0]
    assert check.passed is False
    assert "no kernel for 10x10" in check.detail


def test_model_that_mixes_its_batch_is_compared_in_equal_batches():
    """A model whose result depends on the batch is not failed for being run in another one."""

    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x):
            return self.layer(x) + x.mean(0)

    model = Mixing().eval()
    assert all(c.passed for c in verify_models(model, model, [(8, 5), (1, 5)], model))


def test_inputs_are_seeded_and_not_alike():
    """Noise, a single entry in each channel, a constant and a ramp; the same for the same seed."""
    x = inputs_for((3, 6, 6), 8, seed=4)
    assert torch.equal(x, inputs_for((3, 6, 6), 8, seed=4))
    assert not torch.equal(x, inputs_for((3, 6, 6), 8, seed=5))
    assert [int(v.count_nonzero()) for v in x[1:3]] == [3, 108]
    assert float(x[2].std()) == 0
    assert len({v.numpy().tobytes() for v in x}) == 8


def test_verdict_adds_up():
    """Nothing checked is not passed; one failed part fails it and is the worst; to_dict is JSON."""
    import json

    good, bad = RegionProof("a", 1e-15, passed=True), RegionProof("b", 1e-3, passed=False)
    check = EndToEnd("torch, batch 8, 10x10", 0.9, 1e-7, passed=True, top1_agreement=1.0)
    assert not Verdict().passed
    assert Verdict(regions=(good,), end_to_end=(check,)).passed
    verdict = Verdict(regions=(good, bad), end_to_end=(check,), artefact=("no opset",))
    assert not verdict.passed
    assert verdict.worst_region is bad
    assert json.loads(json.dumps(verdict.to_dict()))["schema_version"] == 1
    assert "NOT equivalent" in verdict.summary()
    assert "1 of 2 regions proved; worst: FAILED  region b" in verdict.summary()
    assert "0.90 x rounding noise" in verdict.summary()
