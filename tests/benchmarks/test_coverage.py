"""The coverage benchmark counts what runs, randomises what is fresh, and marks what its rules say."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import _measure
from _measure import LAYER_SCALE
from _networks import TARGETS, Network, matching, randomise
from _render import COLUMNS, cells, markdown
from _tally import tally

ROOT = Path(__file__).parents[2]


def benchmark(name):
    """A benchmark as a module, under a name that is no package's."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


coverage, scaling = benchmark("coverage"), benchmark("scaling")


class Mixed(nn.Module):
    """One operator of every kind that is counted, and some that are not."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1, groups=1)
        self.up = nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(8)
        self.gamma = nn.Parameter(torch.full((8, 1, 1), 2.0))
        self.beta = nn.Parameter(torch.ones(1, 8, 1, 1))
        self.position = nn.Parameter(torch.randn(1, 8, 8, 8))
        self.layer_norm = nn.LayerNorm(4)
        self.plain = nn.LayerNorm(4, elementwise_affine=False)
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        """Class scores of a batch of images."""
        kernel = self.conv.weight / self.conv.weight.norm()  # of constants only, as a weight norm has it
        x = self.norm(F.conv2d(x, kernel, self.conv.bias, 2, 1)) * self.gamma + self.beta
        x = 0.5 * (x + self.position) + x.mean()
        x = self.up(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.plain(self.layer_norm(x))).chunk(3, -1)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None]) @ x.transpose(1, 2)[:, None]


def test_every_operator_is_counted_once():
    """Weights that are computed, numbers, position embeddings and a norm without a weight are no operators."""
    found = tally(Mixed().eval(), torch.randn(2, 3, 16, 16))
    kinds = {"conv": 2, "batch_norm": 1, "scale": 1, "shift": 1, "linear": 1, "layer_norm_affine": 1}
    assert {k: found.counts[k] for k in kinds} == kinds
    assert sum(found.counts.values()) == sum(kinds.values()) + 2  # an attention and a product of activations
    assert (found.at("batch_norm"), found.at("scale"), found.at("shift")) == (
        ["norm.running_mean"],
        ["gamma"],
        ["beta"],
    )


def test_multiply_accumulates_agree_with_torch():
    """Torch's own counter, which counts two operations for each, agrees on every kind of product."""
    net, image = Mixed().eval(), torch.randn(2, 3, 16, 16)
    # torch 2.13 has no formula for the attention kernel of CPUs, so it counts the products that attention is made of
    with FlopCounterMode(display=False) as peer, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        net(image)
    assert tally(net, image).macs == peer.get_total_flops() // 2 > 0


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("stages.0.blocks.1.gamma", True),
        ("layer_scale_1.1.gain", True),
        ("blocks.3.ls1.gamma", True),
        ("layers.0.layer_scale", True),
        ("xca.temperature", False),
        ("stem.false.weight", False),
    ],
)
def test_layer_scales_are_known_by_name(name, is_one):
    """What multiplies a branch is told from what multiplies an attention."""
    assert bool(LAYER_SCALE.search(name)) is is_one


def test_nothing_stays_fresh():
    """Statistics, gains and biases are drawn, kernels stay, and the scores keep their size."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(30))
    )
    kernel = net[0][0].weight.clone()
    network = Network("test/net", net.eval(), 16)
    randomise(network, 0)
    assert torch.equal(net[0][0].weight, kernel)
    assert not net.training
    for _, norm, _ in net:
        fresh = (norm.running_mean, 0.0), (norm.running_var, 1.0), (norm.weight, 1.0), (norm.bias, 0.0)
        assert all((tensor != value).all() for tensor, value in fresh)
        assert norm.momentum == 0.1
        assert not norm.training
    with torch.no_grad():
        assert 0.01 < net(network.images(2, 5)).abs().max() < 100


def test_a_network_that_ignores_its_image_is_refused():
    """A classifier of zeros would agree with anything: it is drawn too, and what ignores its image for good is an error."""
    torch.manual_seed(0)
    head = nn.Linear(48, 5)
    nn.init.zeros_(head.weight)
    randomise(Network("test/net", nn.Sequential(nn.Flatten(), head).eval(), 4), 0)
    assert head.weight.all()
    deaf = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Softmax(1), nn.Flatten(1), nn.AdaptiveAvgPool1d(1), nn.Linear(1, 5))
    with pytest.raises(ArithmeticError, match="same scores"):
        randomise(Network("test/net", deaf.eval(), 4), 0)


def test_a_fault_in_one_weight_is_an_error(monkeypatch):
    """The two forms agree to the last digits; with one weight changed by a millionth they do not."""
    torch.manual_seed(0)
    network = Network("test/net", nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), 8)
    randomise(network, 0)
    assert _measure._error(network) < 1e-12

    def faulty(module, example, fuse=_measure.reptool.fuse):
        fused = fuse(module, example)
        with torch.no_grad():
            next(fused.parameters())[0, 0, 0, 0] *= 1 + 1e-6
        return fused

    monkeypatch.setattr(_measure.reptool, "fuse", faulty)
    assert _measure._error(network) > coverage.LARGEST_ERROR


def figures(**changes):
    """The figures of a network in which everything went well."""
    form = {"conv": 5, "batch_norm": 0, "scale": 1, "shift": 0, "layer_scale": 0, "layer_norm_affine": 0}
    form |= {"macs": 10**9, "parameters": 10**6}
    found = {"size": 32, "error": 1e-15, "before": form, "fused": form, "timm": form, "left": [], "seconds": {}}
    found["seconds"] = {"capture": 2.0, "fuse": 0.5, "proof": 0.1}
    return found | changes


@pytest.mark.parametrize(
    ("name", "changes", "mark"),
    [
        ("timm/resnet18", {}, ""),
        ("timm/resnet18", {"error": 1e-8}, "FAULT"),
        ("timm/resnet18", {"error": float("nan")}, "FAULT"),
        ("timm/resnet18", {"latency": {"ratio": 1.3, "low": 1.06, "high": 1.5}}, "SLOWER"),
        ("timm/resnet18", {"latency": {"ratio": 1.3, "low": 1.04, "high": 1.5}}, ""),
        ("timm/resnet18", {"latency": {"failed": "fused", "why": "x"}}, "ERROR"),
        ("timm/resnet18", {"latency": {"failed": "unfused", "why": "x"}}, ""),
        ("timm/resnet18", {"fused": figures()["fused"] | {"batch_norm": 1}}, "MISSED"),
        ("timm/densenet121", {"fused": figures()["fused"] | {"batch_norm": 62}}, ""),
        ("timm/dpn68", {"fused": figures()["fused"] | {"conv": 6}}, "MISSED"),
        ("timm/convnext_tiny", {"fused": figures()["fused"] | {"layer_scale": 1}}, "MISSED"),
    ],
)
def test_marks(name, changes, mark):
    """Each rule marks what breaks it, and nothing that keeps it."""
    found = coverage.marks(name, figures(**changes))
    assert [text.partition(":")[0] for text in found] == ([mark] if mark else [])


def test_targets_are_of_networks_and_figures_that_exist():
    """Every target can be missed."""
    for name, target in TARGETS.items():
        assert matching([name]) == [name]
        assert set(target) <= {"norms_left", "layer_scales_left", "layer_norm_affines_left"}


def test_names():
    """A name without its package stands for all of that name; one that is not listed is refused."""
    assert matching(["resnet18", "timm/resnet18"]) == ["timm/resnet18", "torchvision/resnet18"]
    with pytest.raises(ValueError, match="not in the list: resnet9"):
        matching(["resnet9"])


def test_the_table_has_every_row():
    """A row that was measured and one that was not, and what is left with its reason."""
    left = [{"kind": "batch_norm", "at": "a", "why": ["merging would raise 1.5 to 2e+04 MMAC"]}]
    rows = [
        {"name": "timm/resnet18", "figures": figures(left=left), "marks": []},
        {"name": "timm/dpn68", "figures": None, "marks": ["TIMEOUT: more than 5 s"]},
    ]
    assert all(len(cells(row)) == len(COLUMNS) for row in rows)
    text = markdown(rows)
    assert "| timm/resnet18 | 1 | batch_norm | merging would raise N to N MMAC |" in text
    assert "- timm/dpn68: TIMEOUT: more than 5 s" in text


def test_growth_is_a_block_of_the_largest_over_a_block_before_it():
    """Capturing does not count."""
    results = {10: {"capture": 1, "fuse": 9, "proof": 9}, 100: {"capture": 1, "fuse": 1, "proof": 1}}
    results[1000] = {"capture": 9, "fuse": 30, "proof": 10}
    assert scaling.growth(results) == pytest.approx(2)


WITH = "v = peers.import_torchvision(); assert len(v.models.resnet18().layer1) == 2"
WITHOUT = "import torchvision as v; assert isinstance(v, peers._StandIn)"
HIDE = (
    "import sys, importlib.util as u; real = u.find_spec; sys.meta_path.insert(0, peers._Finder());"
    "u.find_spec = lambda name, *more: None if name == 'torchvision' else real(name, *more)"
)


@pytest.mark.peers
@pytest.mark.parametrize(("first", "then"), [("pass", WITH), (HIDE, WITHOUT)], ids=["with", "without"])
def test_timm_is_imported_with_torchvision_and_without(first, then):
    """It builds a network, in a process of its own in which every warning is an error."""
    code = f"import peers; {first}; t = peers.import_timm(); {then}; print(len(t.create_model('resnet18').layer1))"
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT / "tests", check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["2"]
