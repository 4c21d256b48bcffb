"""What a fused module can do, and what of the original it leaves alone."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from blocks import Lambda, Sum, conv_norm, error, noise, operators, randomised, repvgg_block
from graph.nets import Pyramid, net
from torch import nn

from reptool.fusion import fuse
from reptool.proof.region import stored_is_rounded

IMAGE = (2, 4, 9, 11)
CONV = nn.Conv2d


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_of_the_result(dtype):
    """half() of a fused model holds the exact weights rounded to float32, then once more, and runs; a cast stays."""
    model, x = randomised(nn.Sequential(net(), Lambda(lambda s, x: x.float().softmax(1)))), noise(*IMAGE)
    fused = fuse(model.float(), (x.float(),))
    wanted = [p.to(dtype) for p in fused.parameters()]
    halved = fused.to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(halved.parameters(), wanted, strict=True))
    assert halved(x.to(dtype)).dtype == torch.float32


def test_model_keeps_flags_hooks_and_gradients():
    """Fusing leaves requires_grad, gradients, training flags, attributes and hook tables of the original alone."""
    model, x = net(), noise(*IMAGE)
    model[1][0].weight.requires_grad_(requires_grad=False)
    model(x).sum().backward()
    before = [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    tables = [{k: copy.copy(v) for k, v in vars(m).items() if "hook" in k or k == "training"} for m in model.modules()]
    names = [set(vars(m)) for m in model.modules()]
    fuse(model, (x,))
    after = [(p.requires_grad, p.grad) for p in model.parameters()]
    assert all(a == c and (b is d is None or torch.equal(b, d)) for (a, b), (c, d) in zip(before, after, strict=True))
    assert tables == [{k: v for k, v in vars(m).items() if "hook" in k or k == "training"} for m in model.modules()]
    assert names == [set(vars(m)) for m in model.modules()]


def test_result_learns():
    """A few steps of training on a fused model lower its loss; every weight takes part, and train() changes nothing."""
    model, x = net().float(), noise(8, *IMAGE[1:]).float()
    fused = fuse(model, (x,))
    assert torch.equal(fused.train()(x), fused.eval()(x))
    before = [p.detach().clone() for p in fused.parameters()]
    optimiser, losses = torch.optim.SGD(fused.parameters(), lr=1e-3), []
    for _ in range(5):
        losses.append(fused(x).square().mean())
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]
    assert not any(torch.equal(a, b) for a, b in zip(before, fused.parameters(), strict=True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_fusing_where_gradients_are_off(context):
    """A model that is fused without gradients gives the same weights."""
    model, x = net(), noise(*IMAGE)
    with context():
        fused = fuse(model, (x,))
    other = fuse(model, (x,))
    assert all(torch.equal(a, b) for a, b in zip(fused.parameters(), other.parameters(), strict=True))
    assert all(p.requires_grad for p in fused.parameters())


def test_copies_are_independent():
    """A deep copy and a pickle have the report, the operators and the values, and weights of their own."""
    fused, x = fuse(net(), (noise(*IMAGE),)), noise(*IMAGE)
    wanted = fused(x)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):  # noqa: S301  # our own bytes
        assert operators(other) == operators(fused)
        assert other.fusion.to_dict() == fused.fusion.to_dict()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        assert torch.equal(fused(x), wanted)


def test_state_dict_fits_plain_layers():
    """The state_dict of a fused sequence loads, strictly, into the ordinary layers it describes."""
    model, x = randomised(nn.Sequential(conv_norm(4, 8, 3), nn.ReLU(), conv_norm(8, 4, 1))), noise(*IMAGE)
    fused = fuse(model, (x,))
    conv = {name: nn.Sequential(layer) for name, layer in (("0", CONV(4, 8, 3)), ("2", CONV(8, 4, 1)))}
    plain = nn.Sequential(conv["0"], nn.ReLU(), conv["2"]).double()
    plain.load_state_dict(fused.state_dict(), strict=True)
    assert error(fused, plain, x) == 0


def test_print_and_code_are_readable():
    """print(fused) shows ordinary layers under the model's own names; its code has one line a call, in those names."""
    model = randomised(Lambda(lambda s, x: s.head(s.stem(x).mean((2, 3))), stem=repvgg_block(4), head=nn.Linear(4, 3)))
    fused = fuse(model, (noise(*IMAGE),))
    shown = str(fused)
    assert "(stem): " in shown
    assert "Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))" in shown
    assert "(head): Linear(in_features=4, out_features=3, bias=True)" in shown
    lines = [line.strip() for line in fused.code.strip().splitlines()]
    calls = sum(operators(fused).values())
    assert lines[0].startswith("def forward(self, ")
    assert sum(" = " in line for line in lines) <= calls + 1
    assert "self.head(" in fused.code
    assert not any(word in fused.code for word in ("_tensor_constant", "arg0_1", "p_stem", "_param_constant"))


@pytest.mark.parametrize(
    "build", [net, Pyramid, lambda: Sum(conv_norm(4, 4, 3), conv_norm(4, 4, 3))], ids=["net", "pyramid", "sum"]
)
def test_second_fuse_does_nothing_more(build):
    """A fused module fuses to the same operators under the same names, bit for bit."""
    torch.manual_seed(0)
    model = randomised(build())
    inputs = (noise(2, 4, 16, 16), noise(2, 4))[: 2 if isinstance(model, Pyramid) else 1]
    once = fuse(model, inputs)
    again = fuse(once, inputs)
    assert operators(again) == operators(once)
    assert not again.fusion.regions
    assert again.state_dict().keys() == once.state_dict().keys()
    assert all(
        stored_is_rounded(a, b) for a, b in zip(once.state_dict().values(), again.state_dict().values(), strict=True)
    )
    assert math.isclose(error(once, again, *inputs), 0)
