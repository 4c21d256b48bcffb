"""The RepVGG, RepVGGplus and ACNet networks against their papers' figures and the official code's own numbers."""

from __future__ import annotations

import copy
import json

import golden_vectors
import pytest
import torch
from torch import Tensor, nn

from reptool.models import card, create_model, list_models
from reptool.models.rep import ACB, RepVGGBlock, RepVGGplusBlock
from reptool.testing.count import multiply_accumulates, parameter_count

# name -> learnable numbers of the training form at its published size
PARAMETERS = {
    "repvgg_a0": 9_108_968,
    "repvgg_a1": 14_092_264,
    "repvgg_a2": 28_210_600,
    "repvgg_b0": 15_817_960,
    "repvgg_b1": 57_415_016,
    "repvgg_b1g2": 45_782_376,
    "repvgg_b1g4": 39_966_056,
    "repvgg_b2": 89_022_376,
    "repvgg_b2g2": 70_846_376,
    "repvgg_b2g4": 61_758_376,
    "repvgg_b3": 123_085_288,
    "repvgg_b3g2": 96_911_848,
    "repvgg_b3g4": 83_825_128,
    "repvgg_d2se": 133_334_836,
    "repvggplus_l2pse": 146_062_864,
    "acnet_cifarquick": 149_226,
    "acnet_vgg16": 24_810_570,
    "acnet_resnet56": 1_429_434,
    "acnet_resnet18": 19_028_520,
    "acnet_wrn16_8": 18_172_538,
    "acnet_alexnet": 63_884_200,
    "acnet_densenet40": 1_608_490,
    "acnet_densenet121": 9_415_400,
    "repvgg": 9_108_968,
    "repvggplus": 146_062_864,
}

# listing -> the registered name that must have exactly these keys
LISTINGS = {
    **{
        f"repvgg-official-repvgg-{name.removeprefix('repvgg_')}-train": name
        for name in PARAMETERS
        if name.startswith("repvgg_")
    },
    "repvggplus-official-repvggplus-l2pse-train": "repvggplus_l2pse",
    "acnet-official-resnet18-train": "acnet_resnet18",
    "acnet-official-vgg16-cifar-train": "acnet_vgg16",
    "acnet-official-wrn16-8-cifar-train": "acnet_wrn16_8",
}

# small networks of every class: name, arguments, image height and width (odd or not square)
SMALL = [
    ("repvgg", {"num_blocks": [1, 2, 2, 1], "widths": [8, 8, 8, 16, 16], "num_classes": 5}, (33, 47)),
    (
        "repvgg",
        {"num_blocks": [1, 2, 1, 1], "widths": [16, 16, 16, 16, 16], "groups": 2, "squeeze_excite": True},
        (47, 64),
    ),
    ("repvggplus", {"num_blocks": [1, 1, 2, 1], "widths": [8, 8, 8, 8, 16], "num_classes": 5}, (65, 79)),
    (
        "repvggplus",
        {"num_blocks": [1, 1, 2, 1], "widths": [8, 8, 8, 8, 16], "auxiliary_heads": False},
        (64, 96),
    ),
    ("acnet_cifarquick", {"widths": [8, 8, 8], "num_classes": 5}, (31, 33)),
    ("acnet_vgg16", {"widths": [4, 4, 4, 4, 4, 4, 4, 8, 8, 8, 8, 8, 8]}, (33, 47)),
    ("acnet_resnet56", {"num_blocks": [1, 2, 1], "widths": [8, 8, 16]}, (21, 31)),
    ("acnet_resnet18", {"num_blocks": [1, 2, 1, 1], "widths": [8, 8, 16, 16], "num_classes": 5}, (67, 45)),
    ("acnet_wrn16_8", {"num_blocks": [1, 2, 1], "widths": [4, 8, 8, 16]}, (21, 31)),
    ("acnet_densenet40", {"depths": [2, 2, 1], "width": 6, "growth": 4}, (21, 31)),
]
SMALL_IDS = [f"{name}-{index}" for index, (name, _, _) in enumerate(SMALL)]

ACB_2019 = {"asymmetric_length": 3}
# golden case -> our constructor's arguments where they are spelled otherwise than the published one's
BLOCK_ARGUMENTS = {
    "acnet-acb2019-k3-lastbn": {**ACB_2019, "last_bn": True},
    "acnet-acb2019-k5": ACB_2019,
    "acnet-acb2020-k5-lastbn": {"last_bn": True},
}
NETWORK_ARGUMENTS = {
    "acnet-cifarquick-narrow": ("acnet_cifarquick", {"widths": [8, 8, 16]}),
    "acnet-resnet8-narrow": ("acnet_resnet56", {"num_blocks": [1, 1, 1], "widths": [8, 16, 32]}),
    "acnet-vgg16-narrow": ("acnet_vgg16", {"widths": [6, 6, 8, 8, 8, 8, 8, 12, 12, 12, 12, 12, 12]}),
    "repvgg-net-se": (
        "repvgg",
        {"num_blocks": [1, 1, 1, 1], "widths": [16, 16, 32, 64, 128], "squeeze_excite": True, "num_classes": 10},
    ),
    "repvgg-net-w0125": ("repvgg", {"num_blocks": [1, 2, 2, 1], "widths": [8, 8, 16, 32, 64], "num_classes": 10}),
    "repvgg-net-w025-g2": (
        "repvgg",
        {
            "num_blocks": [1, 2, 2, 1],
            "widths": [16, 16, 32, 64, 128],
            "groups": 2,
            "grouped_layers": [2, 4],
            "num_classes": 10,
        },
    ),
    "repvggplus-net-pse": (
        "repvggplus",
        {"num_blocks": [1, 1, 2, 1], "widths": [16, 16, 16, 32, 64], "num_classes": 10},
    ),
}
GOLDEN = golden_vectors.names("repvgg-", "repvggplus-", "acnet-")
EXACT = 1e-11


def on_meta(name: str, **arguments) -> nn.Module:
    """Build a network without storage, however large it is."""
    with torch.device("meta"):
        return create_model(name, **arguments)


def block_for(name: str, golden: golden_vectors.Golden) -> nn.Module:
    """Build the block a golden case was made with, from the arguments in its metadata."""
    arguments = {key: value for key, value in golden.constructor.items() if key != "use_last_bn"}
    if name.startswith("acnet"):
        return ACB(**arguments, **BLOCK_ARGUMENTS.get(name, {}))
    arguments.pop("padding")
    if name.startswith("repvggplus"):
        arguments.pop("kernel_size")
        return RepVGGplusBlock(squeeze_excite=arguments.pop("use_post_se"), **arguments)
    return RepVGGBlock(squeeze_excite=arguments.pop("use_se", False), **arguments)


def build_golden(name: str, golden: golden_vectors.Golden) -> nn.Module:
    """Build the block or network a golden case was made with."""
    if name not in NETWORK_ARGUMENTS:
        return block_for(name, golden)
    architecture, arguments = NETWORK_ARGUMENTS[name]
    return create_model(architecture, **arguments)


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return what the model gives, by name."""
    with torch.no_grad():
        output = model(x)
    return output if isinstance(output, dict) else {"output": output}


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest relative error of any output."""
    assert set(actual) == set(expected)
    return max(golden_vectors.relative_error(actual[key], expected[key]) for key in expected)


def test_every_rep_network_is_in_the_table():
    """No registered network of these families escapes the parameter table, and none in it is missing."""
    assert {name for family in ("repvgg", "repvggplus", "acnet") for name in list_models(family)} == set(PARAMETERS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_is_the_published_one(name):
    """The training form has exactly the known number of parameters, and so says its card."""
    assert parameter_count(on_meta(name)) == card(name).parameters == PARAMETERS[name]


def test_parameter_count_sees_another_width():
    """Control: one class fewer, one group more, or no auxiliary heads change the count."""
    assert parameter_count(on_meta("repvgg_a0", num_classes=999)) == PARAMETERS["repvgg_a0"] - 1281
    assert parameter_count(on_meta("repvgg", groups=2)) < PARAMETERS["repvgg"]
    assert parameter_count(on_meta("repvggplus_l2pse", auxiliary_heads=False)) == 140_099_224


@pytest.mark.parametrize("name", PARAMETERS)
def test_multiply_accumulates_are_those_on_the_card(name):
    """One image of the card's size costs exactly what the card says."""
    assert multiply_accumulates(on_meta(name), (1, *card(name).input)) == card(name).macs


def test_multiply_accumulates_tell_variants_apart():
    """Control: the next variant's cost is not this one's."""
    assert multiply_accumulates(on_meta("repvgg_b1g2"), (1, 3, 224, 224)) != card("repvgg_b1g4").macs


def test_every_official_listing_is_checked():
    """The table of listings covers all training listings of official code that lie in the golden folder."""
    families = ("repvgg-", "repvggplus-", "acnet-")
    stored = [n for n in golden_vectors.listing_names("", "train") if n.startswith(families) and "-official-" in n]
    assert sorted(LISTINGS) == stored


@pytest.mark.parametrize("listing", LISTINGS)
def test_state_dict_is_the_official_one(listing):
    """Names, shapes and order of the state dict are those of the official code at full size."""
    ours = [(key, tuple(value.shape)) for key, value in on_meta(LISTINGS[listing]).state_dict().items()]
    assert ours == list(golden_vectors.load_listing(listing).items())


def test_listing_comparison_sees_order_and_shape():
    """Control: a variant of the same names has other shapes, and a reversed state dict another order."""
    official = list(golden_vectors.load_listing("repvgg-official-repvgg-a0-train").items())
    other = [(key, tuple(value.shape)) for key, value in on_meta("repvgg_a1").state_dict().items()]
    assert [key for key, _ in other] == [key for key, _ in official]
    assert other != official
    assert official[::-1] != official


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_output_is_reproduced(name):
    """With the official weights the network gives the official float64 output; with one weight moved it does not."""
    golden = golden_vectors.load(name)
    model = golden_vectors.load_into(build_golden(name, golden), golden)
    assert worst(run(model, golden.input), golden.outputs) < EXACT
    with torch.no_grad():
        next(value for value in model.parameters() if value.dim() == 4).view(-1)[0] += 1e-3
    assert worst(run(model, golden.input), golden.outputs) > EXACT


def test_auxiliary_heads_come_after_the_main_one():
    """RepVGGplus gives its outputs in the official order, in both modes, and only the main one without heads."""
    name, arguments, size = SMALL[2]
    model = create_model(name, **arguments)
    heads = ["main", "stage1_aux", "stage2_aux", "stage3_first_aux"]
    x = torch.randn(2, 3, *size)
    assert list(run(model.train(), x)) == list(run(model.eval(), x)) == heads
    assert list(run(create_model(name, **arguments, auxiliary_heads=False).eval(), x)) == ["main"]


def test_golden_eps_matters():
    """Control: the case made with eps 1e-3 is missed with torch's default eps."""
    golden = golden_vectors.load("repvgg-block-eps1e-3")
    model = golden_vectors.load_into(block_for("repvgg-block-eps1e-3", golden), golden)
    model.rbr_identity.eps = 1e-5
    assert worst(run(model, golden.input), golden.outputs) > EXACT


def test_golden_weights_load_only_into_their_network():
    """Control: a state dict with one key more or fewer is refused."""
    golden = golden_vectors.load("repvgg-net-w0125")
    golden.train.pop("linear.bias")
    with pytest.raises(RuntimeError, match=r"linear\.bias"):
        golden_vectors.load_into(build_golden("repvgg-net-w0125", golden), golden)


def test_golden_cases_are_all_there():
    """The cases of these families are found, so that an empty folder does not pass."""
    assert len(GOLDEN) == 26


@pytest.mark.parametrize(("name", "arguments", "size"), SMALL, ids=SMALL_IDS)
def test_same_seed_same_weights(name, arguments, size):
    """The initial weights depend on the seed and on nothing else."""

    def weights(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return list(create_model(name, **arguments).state_dict().values())

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def unreached(model: nn.Module, x: Tensor, keep: list[str] | None = None) -> list[str]:
    """Name the parameters that get no gradient from the outputs."""
    outputs = model(x)
    outputs = outputs if isinstance(outputs, dict) else {"output": outputs}
    sum(value.square().sum() for key, value in outputs.items() if keep is None or key in keep).backward()
    return [key for key, value in model.named_parameters() if value.grad is None or not torch.count_nonzero(value.grad)]


@pytest.mark.parametrize(("name", "arguments", "size"), SMALL, ids=SMALL_IDS)
def test_gradients_reach_every_parameter(name, arguments, size):
    """A training step moves every parameter."""
    torch.manual_seed(0)
    model = create_model(name, **arguments).double().train()
    assert unreached(model, torch.randn(4, 3, *size, dtype=torch.float64)) == []


def test_gradient_check_sees_an_unused_head():
    """Control: a loss that leaves out one auxiliary head leaves its parameters without gradient."""
    name, arguments, size = SMALL[2]
    torch.manual_seed(0)
    model = create_model(name, **arguments).double().train()
    lost = unreached(model, torch.randn(2, 3, *size, dtype=torch.float64), ["main", "stage2_aux", "stage3_first_aux"])
    assert lost == [key for key, _ in model.named_parameters() if key.startswith("stage1_aux")]


@pytest.mark.parametrize(("name", "arguments", "size"), SMALL, ids=SMALL_IDS)
def test_images_may_be_odd_not_square_and_alone(name, arguments, size):
    """In eval mode an image gives the same scores alone and in a batch, at an odd or oblong size."""
    torch.manual_seed(0)
    model = create_model(name, **arguments).double().eval()
    images = torch.randn(3, 3, *size, dtype=torch.float64)
    batch, alone = run(model, images), run(model, images[1:2])
    assert worst(alone, {key: value[1:2] for key, value in batch.items()}) < EXACT
    assert worst(alone, {key: value[2:3] for key, value in batch.items()}) > EXACT


@pytest.mark.parametrize(("name", "arguments", "size"), SMALL, ids=SMALL_IDS)
def test_networks_are_traced_and_exported(name, arguments, size):
    """torch.jit.trace and torch.export take the training form, and give its output on another image."""
    torch.manual_seed(0)
    model = create_model(name, **arguments).double().eval()
    first, second = torch.randn(2, 2, 3, *size, dtype=torch.float64)
    traced = torch.jit.trace(model, (first,), strict=False)
    exported = torch.export.export(model, (first,)).module()
    expected = run(model, second)
    assert worst(run(traced, second), expected) < EXACT
    assert worst(run(exported, second), expected) < EXACT
    assert worst(run(model, first), expected) > EXACT


@pytest.mark.parametrize(("name", "arguments", "size"), SMALL, ids=SMALL_IDS)
def test_arguments_survive_json(name, arguments, size):
    """A network is rebuilt from its arguments as JSON gives them back, and takes the weights of the first."""
    rebuilt = create_model(name, **json.loads(json.dumps(arguments)))
    rebuilt.load_state_dict(create_model(name, **arguments).state_dict(), strict=True)


@pytest.mark.parametrize("name", ["repvgg", "repvggplus"])
def test_squeeze_excite_sees_the_whole_oblong_image(name):
    """The gate changes with any pixel of a map twice as wide as high, and does not mix images of a batch."""
    torch.manual_seed(0)
    block = (RepVGGBlock if name == "repvgg" else RepVGGplusBlock)(16, 16, squeeze_excite=True).double().eval()
    x = torch.randn(2, 16, 6, 12, dtype=torch.float64)
    moved = x.clone()
    moved[0, :, -1, -1] += 10.0
    before, after = run(block, x)["output"], run(block, moved)["output"]
    assert golden_vectors.relative_error(after[0, :, :3, :3], before[0, :, :3, :3]) > EXACT
    assert golden_vectors.relative_error(after[1], before[1]) < EXACT


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Fold a norm into its convolution's kernel and bias."""
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    return conv.weight * gain[:, None, None, None], norm.bias - norm.running_mean * gain


def add_to_skeleton(block: ACB, length: int) -> tuple[Tensor, Tensor]:
    """Make the one kernel and bias an ACB stands for."""
    kernel, bias = folded(block.square_conv, block.square_bn)
    kernel, centre = kernel.clone(), kernel.shape[-1] // 2
    taps = slice(centre - length // 2, centre + length // 2 + 1)
    vertical, vertical_bias = folded(block.ver_conv, block.ver_bn)
    horizontal, horizontal_bias = folded(block.hor_conv, block.hor_bn)
    kernel[:, :, taps, centre] += vertical[:, :, :, 0]
    kernel[:, :, centre, taps] += horizontal[:, :, 0, :]
    return kernel, bias + vertical_bias + horizontal_bias


# kernel size, short kernels' length, stride, padding, dilation, groups: borders of both signs, on both axes
ACB_CASES = [
    (3, 3, 1, 1, 1, 1),
    (3, 3, 1, 0, 1, 2),
    (3, 3, 2, 2, 1, 1),
    (5, 5, 1, 1, 1, 1),
    (5, 5, 2, 0, 1, 2),
    (5, 3, 1, 2, 1, 1),
    (5, 3, 2, 0, 1, 1),
    (3, 3, 1, 2, 2, 1),
    (3, 3, 2, 1, 2, 1),
    (5, 3, 1, 1, 2, 1),
    (7, 1, 1, 3, 1, 4),
]


@pytest.mark.parametrize("case", ACB_CASES)
def test_acb_is_one_convolution(case):
    """At any padding, dilation, stride and short length the branches act on the square kernel's skeleton."""
    kernel_size, length, stride, padding, dilation, groups = case
    torch.manual_seed(0)
    block = ACB(4, 8, kernel_size, stride, padding, dilation=dilation, groups=groups, asymmetric_length=length).double()
    for norm in (block.square_bn, block.ver_bn, block.hor_bn):
        for value, low in ((norm.weight, 0.5), (norm.bias, -1), (norm.running_mean, -1), (norm.running_var, 0.5)):
            nn.init.uniform_(value, low, 1.5)
    x = torch.randn(2, 4, 13, 16, dtype=torch.float64)
    kernel, bias = add_to_skeleton(block, length)

    def one(image: Tensor) -> Tensor:
        return nn.functional.conv2d(image, kernel, bias, stride, padding, dilation, groups)

    actual = run(block.eval(), x)["output"]
    assert golden_vectors.relative_error(actual, one(x)) < EXACT
    assert golden_vectors.relative_error(actual, one(x.roll(1, 2))) > EXACT


@pytest.mark.parametrize(("kernel_size", "length"), [(4, None), (5, 2), (3, 5)])
def test_acb_without_a_centre_is_refused(kernel_size, length):
    """Even kernels, and short kernels longer than the square one, are refused with their values."""
    with pytest.raises(ValueError, match=rf"kernel_size={kernel_size} and asymmetric_length=\d has no centre"):
        ACB(4, 4, kernel_size, asymmetric_length=length)


def test_cifar_hosts_start_their_norms_at_a_third():
    """The branches' norms begin at 1/3 in the CIFAR hosts and at 1 in the ImageNet one."""

    def gains(name: str, arguments: dict) -> set[float]:
        model = create_model(name, **arguments)
        blocks = [module for module in model.modules() if isinstance(module, ACB)]
        return {round(value, 6) for block in blocks for value in block.square_bn.weight.tolist()}

    for name, arguments, _ in SMALL[4:]:
        assert gains(name, arguments) == ({1.0} if name == "acnet_resnet18" else {0.333333})


def test_forward_leaves_its_input_alone():
    """No block writes over the image it is given."""
    for name, arguments, size in SMALL:
        model = create_model(name, **arguments).eval()
        x = torch.randn(1, 3, *size)
        kept = copy.deepcopy(x)
        run(model, x)
        assert torch.equal(x, kept)
