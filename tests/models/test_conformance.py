"""Every network and block of the zoo, small, held to what is asked of all of them; and every card to its integers."""

from __future__ import annotations

import copy
import json

import model_cases
import pytest
import torch
from stir import NORMS, stirred
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import reptool
from reptool.fusion import verify_fused
from reptool.models import card, create_model, list_models
from reptool.testing.count import multiply_accumulates, operators_left, parameter_count

CASES = model_cases.cases()
EXACT = 1e-11
BLOCKS = list_models(blocks=True)
NAMES = [*list_models(), *BLOCKS]


AGAIN = {
    "fastvit_t8",
    "mobileone_s0-without classifier",
    "replknet_31b-no small kernel",
    "rest_lite_stem7",
    "bam_resnet50",
    "cbam_resnet50",
    "eca_resnet50",
    "eca_resnet50t",
    "se_resnet50",
    "epsanet50_large",
    "danet_resnet101-main",
    "acnet_densenet121",
    "dbb_resnet50",
    "repmlp_res50_bottleneck",
    "unireplknet_a-layer scales",
}
"""Further forms of classes that are in the table already: for `make slow`, so that `make test` stays short."""


def case_table(cases=CASES):
    """The cases as a table of parameters."""
    marked = [pytest.param(c, id=str(c), marks=pytest.mark.slow if str(c) in AGAIN else ()) for c in cases]
    return pytest.mark.parametrize("case", marked)


EVERY_OPSET = {"dbb_block", "mha_block", "resmlp_block"}
"""A block of every kind, at every opset also in `make test`: convolutions, attention, tokens. The others, for `make slow`."""


def opset_table():
    """The blocks that are exported at other opsets than the default, as a table of parameters."""
    blocks = [c for c in CASES if c.opsets]
    marks = {str(c): () if str(c) in EVERY_OPSET else pytest.mark.slow for c in blocks}
    return pytest.mark.parametrize("case", [pytest.param(c, id=str(c), marks=marks[str(c)]) for c in blocks])


def build(case, seed: int = 0) -> nn.Module:
    """The small network, freshly initialised from a seed."""
    torch.manual_seed(seed)
    return create_model(case.name, **case.arguments)


def inputs(shapes, batch: int = 2, seed: int = 1) -> tuple[Tensor, ...]:
    """Random float64 inputs."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes)


def run(model: nn.Module, given: tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs, in order."""
    with torch.no_grad():
        return tree_leaves(model(*(x.clone() for x in given)))


def error(ours: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest relative difference of any output."""
    assert [x.shape for x in ours] == [x.shape for x in wanted]
    pairs = zip(ours, wanted, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-300)) for a, b in pairs)


@case_table()
def test_same_seed_same_weights(case):
    """The initial weights depend on the seed and on nothing else, and the arguments survive JSON."""
    first, again, other = (build(case, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not first or not all(torch.equal(first[key], other[key]) for key in first)
    rebuilt = create_model(case.name, **json.loads(json.dumps(dict(case.arguments))))
    rebuilt.load_state_dict(first, strict=True)


@case_table()
def test_a_sample_gives_the_same_alone_and_in_a_batch(case):
    """In eval mode, at the case's sizes, a batch of one is a row of a batch of three, and not another row."""
    model = stirred(build(case))
    for shapes in (case.shapes, case.other):
        if shapes is not None:
            batch = inputs(shapes, 3)
            whole, alone = run(model, batch), run(model, tuple(x[1:2] for x in batch))
            assert error(alone, [y[1:2] for y in whole]) < EXACT
            assert error(alone, [y[2:3] for y in whole]) > EXACT


@case_table()
def test_gradients_reach_every_parameter(case):
    """A training step moves every parameter but those that no output depends on, which the case names with the reason."""
    idle = set.intersection(*(without_gradient(case, seed) for seed in range(3)))  # a ReLU may be dead for one draw
    assert idle == {key for key, _ in build(case).named_parameters() if key.endswith(tuple(case.idle))}


def without_gradient(case, seed: int) -> set[str]:
    """The parameters that a random sum of the outputs does not depend on, for one draw of weights and inputs."""
    model = stirred(build(case, seed), seed).train()
    outputs = tree_leaves(model(*inputs(case.shapes, 4, seed)))
    generator = torch.Generator().manual_seed(2)
    sum((y * torch.randn(y.shape, generator=generator, dtype=y.dtype)).sum() for y in outputs).backward()
    grads = {key: value.grad for key, value in model.named_parameters()}
    largest = max((g.abs().max() for g in grads.values() if g is not None), default=torch.ones(()))
    return {key for key, g in grads.items() if g is None or g.abs().max() <= EXACT * largest}


@case_table()
def test_it_is_scripted_and_exported(case):
    """torch.jit.script and torch.export take the training form, and give its output on other samples."""
    model, given = stirred(build(case)), inputs(case.shapes, seed=3)
    wanted = run(model, given)
    example = inputs(case.shapes, seed=4)
    exported = torch.export.export(model, example).module()
    for other in (torch.jit.script(model), exported):
        assert error(run(other, given), wanted) < EXACT
    assert error(run(exported, example), wanted) > EXACT


@case_table()
def test_it_is_fused_and_equal(case):
    """Fused, it is equal in float64 also at another size, and holds the operators the case names; a block's fault is caught."""
    model = stirred(build(case))
    fused = reptool.fuse(model, inputs(case.shapes, seed=5))
    assert fused.fusion.worst_error <= 1e-12
    for shapes in (case.shapes, case.other):
        if shapes is not None:
            given = inputs(shapes, 3)
            assert error(run(fused, given), run(model, given)) < EXACT
    assert operators_left(fused) == dict(sorted(case.left.items()))
    if case.name in BLOCKS:
        require_that_a_fault_is_caught(case, model, fused)


@case_table([c for c in CASES if c.name not in BLOCKS])
@pytest.mark.slow
def test_a_fault_in_a_network_is_caught(case):
    """What holds of the blocks holds of the networks made of them; those read each graph three times more."""
    model = stirred(build(case))
    require_that_a_fault_is_caught(case, model, reptool.fuse(model, inputs(case.shapes, seed=5)))


def require_that_a_fault_is_caught(case, model: nn.Module, fused: nn.Module) -> None:
    """Fused, it passes; with one weight off by a hundred-thousandth it does not."""
    assert not verify_fused(model, fused, inputs(case.shapes)).problems
    mutant = copy.deepcopy(fused)
    largest = max(mutant.parameters(), key=lambda p: p.numel())
    with torch.no_grad():
        largest.view(-1)[largest.abs().argmax()] *= 1 + 1e-5
    assert verify_fused(model, mutant, inputs(case.shapes)).problems


@case_table()
def test_no_fault_hides_behind_first_values(case):
    """Control: what the equality is tested on has no fresh norm and no scalar that is zero."""
    model = stirred(build(case))
    assert not any((m.running_var == 1).all() for m in model.modules() if isinstance(m, NORMS))
    assert not any((p == 0).all() for p in model.parameters())


def fused_in_float32(case) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The small network, fused as it would be shipped, and an example of its inputs."""
    example = tuple(x.float() for x in inputs(case.shapes))
    return reptool.fuse(stirred(build(case)).float(), example), example


@case_table([c for c in CASES if not c.label])
def test_it_is_exported_fused_and_run(case, tmp_path):
    """ONNX and TorchScript are written after they ran and agreed, at two batch sizes and where it is open two images."""
    fused, example = fused_in_float32(case)
    for file_format in ("onnx", "torchscript"):
        path = tmp_path / f"net.{file_format}"
        reptool.export(fused, path, example, format=file_format, dynamic=case.dynamic)
        assert path.stat().st_size


@opset_table()
def test_it_is_exported_at_every_opset(case, tmp_path):
    """A fused block is written at each opset beside the default, after it ran and agreed, and the file says which."""
    fused, example = fused_in_float32(case)
    for opset in case.opsets:
        report = reptool.export(fused, tmp_path / f"{opset}.onnx", example, opset=opset, dynamic=case.dynamic)
        assert report.record.opset == opset


@pytest.mark.parametrize("name", NAMES)
def test_card_counts_are_exact(name):
    """The training form has exactly the parameters and the multiply-accumulates of its card."""
    claims = card(name)
    with torch.device("meta"):
        model = create_model(name)
    assert parameter_count(model) == claims.parameters
    assert multiply_accumulates(model, *[(1, *claims.input)] * claims.arity) == claims.macs


def test_every_name_has_a_case():
    """No network or block escapes: each is in the table, or differs from one that is in it by numbers only."""
    covered = {case.name for case in CASES}
    assert {str(case) for case in CASES} >= AGAIN
    assert {str(case) for case in CASES if case.opsets} > EVERY_OPSET
    families = {reptool.models.family_of(name) for name in covered}
    assert all(name in covered for name in BLOCKS)
    assert {reptool.models.family_of(name) for name in list_models()} - {"repvgg", "repvggplus", "acnet"} <= families


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in NAMES if reptool.models.family_of(n) not in {"repvgg", "repvggplus", "acnet"}]
)
def test_card_holds_at_full_size(name):
    """At full size, fused, parameters, multiply-accumulates and operators are those of the card."""
    claims = card(name)
    torch.manual_seed(0)
    example = tuple(torch.randn(1, *claims.input) for _ in range(claims.arity))
    fused = reptool.fuse(stirred(create_model(name)).float(), example)
    assert fused.fusion.worst_error <= 1e-12
    assert operators_left(fused) == dict(sorted(claims.deploy.items()))
    assert parameter_count(fused) == claims.deploy_parameters
    assert multiply_accumulates(fused, *example) == claims.deploy_macs
