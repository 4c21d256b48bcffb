"""Whole networks of the zoo, recognised from the keys and shapes of a state_dict.

An architecture knows how its key names differ between implementations and how its constructor's arguments follow from
the shapes. What it infers is then held against the network itself: every key and shape must fit, or the file is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from reptool.checkpoint.deploy import Shapes, deployed_shapes, form_of, places
from reptool.checkpoint.known import DEPLOYED
from reptool.checkpoint.names.repvgg import NAMINGS, OFFICIAL
from reptool.checkpoint.nearest import some, unknown_network
from reptool.checkpoint.networks import recognise_network
from reptool.errors import InputError, UnknownModelError
from reptool.models import create_model, family_of, natural_order
from reptool.models.rep.repvgg import VARIANTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from reptool.checkpoint.naming import Naming


@dataclass(frozen=True)
class Recognition:
    """What a state_dict is: the network and its arguments, whose key names it has, and its form.

    ``renamed`` maps our keys to the file's, ``dropped`` are keys that only training uses.
    """

    model: str
    arguments: dict[str, Any]
    naming: Naming
    form: str
    renamed: dict[str, str] = field(repr=False, default_factory=dict)
    dropped: tuple[str, ...] = field(repr=False, default=())

    @property
    def implementation(self) -> str:
        """Whose names the keys are."""
        return self.naming.implementation

    @property
    def family(self) -> str:
        """The network's family."""
        return family_of(self.model)

    @property
    def num_classes(self) -> int:
        """Entries of the classifier."""
        return int(self.arguments["num_classes"])

    def file_name(self, key: str) -> str:
        """One of our keys as the file has it, or would have it."""
        return self.renamed.get(key) or self.naming.their_name(key)

    def again(self, shapes: Mapping[str, tuple[int, ...]]) -> Recognition:
        """The same network in another form or under other names; of two with the same deploy form, the name stays.

        Raises:  as ``recognise``; UnknownModelError if it is another network
        """
        named = self.model if self.family in DEPLOYED or not self.arguments else None
        found = recognise(shapes, named)
        if found.model != self.model:
            raise UnknownModelError(f"a {found.model}, and no {self.model}", at=next(iter(shapes), ""))
        return replace(found, arguments=self.arguments)

    def build(self) -> nn.Module:
        """The network in training form, without weights: on the meta device, unless it computes constants there."""
        network = _on_meta(self.model, self.arguments)
        stored = network.state_dict().keys()
        if all(name in stored for name, _ in network.named_buffers()):
            return network
        return create_model(self.model, **self.arguments).eval()


def _repvgg(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    layers = _convs(shapes, r"(stage\d)(?:\.(\d+))?\.(?:rbr_dense\.conv|rbr_reparam)\.weight")
    depths = tuple(sum(1 for stage, _ in layers if stage == f"stage{s}") for s in range(1, 5))
    widths = tuple(layers[f"stage{s}", "0" if s else None][0] for s in range(5))
    before, groups = 3, {}
    for index, shape in enumerate(layers.values()):
        if before != shape[1]:
            groups[index] = before // shape[1]
        before = shape[0]
    arguments: dict[str, Any] = {
        "num_blocks": depths,
        "widths": widths,
        "groups": max(groups.values(), default=1),
        "squeeze_excite": any(".se." in k for k in shapes),
    }
    name = next((n for n, a in VARIANTS.items() if a == arguments), "repvgg")
    if name == "repvgg" and groups:
        arguments["grouped_layers"] = tuple(groups)
    return name, ({} if name != "repvgg" else arguments)


def _repvggplus(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    layers = _convs(shapes, r"(stage\w+?)(?:\.blocks\.(\d+))?\.(?:rbr_dense\.conv|rbr_reparam)\.weight")
    stages = ("stage1", "stage2", "stage3_first", "stage3_second", "stage4")
    one, two, half, rest, four = (sum(1 for stage, _ in layers if stage == s) for s in stages)
    widths = (layers["stage0", None][0], *(layers[s, "0"][0] for s in ("stage1", "stage2", "stage3_first", "stage4")))
    depths = (one, two, half + rest, four)
    heads = any(k.startswith("stage1_aux.") for k in shapes)
    published = depths == (8, 14, 24, 1) and widths == (64, 160, 320, 640, 2560)
    arguments: dict[str, Any] = {"auxiliary_heads": heads}
    if not published:
        excite = any("post_se" in k for k in shapes)
        arguments |= {"num_blocks": depths, "widths": widths, "squeeze_excite": excite}
    return "repvggplus_l2pse" if published else "repvggplus", arguments


def _cifarquick(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    layers = _convs(shapes, r"conv(\d)\.acb()\.(?:square|fused)_conv\.weight")
    return "acnet_cifarquick", {"widths": tuple(s[0] for s in layers.values())}


def _vgg16(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    layers = _convs(shapes, r"stem\.conv(\d+)\.acb()\.(?:square|fused)_conv\.weight")
    return "acnet_vgg16", {"widths": tuple(s[0] for s in layers.values())}


def _cifar_resnet(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    layers = _convs(shapes, r"stage(\d)\.block(\d+)\.conv2\.(?:square|fused)_conv\.weight")
    return "acnet_resnet56", _residual(layers, 3)


def _resnet18(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    layers = _convs(shapes, r"stage(\d)\.(\d+)\.conv2\.(?:square|fused)_conv\.weight")
    return "acnet_resnet18", _residual(layers, 4)


def _wide_resnet(shapes: Shapes) -> tuple[str, dict[str, Any]]:
    stem = _convs(shapes, r"(conv1)()\.(?:square|fused)_conv\.weight")
    layers = _convs(shapes, r"stage(\d)\.block(\d+)\.conv2\.acb\.(?:square|fused)_conv\.weight")
    last = {stage: (int(block or 0), shape[0]) for (stage, block), shape in layers.items()}
    depths, widths = zip(*(last[stage] for stage in "123"), strict=True)
    return "acnet_wrn16_8", {"num_blocks": depths, "widths": (stem["conv1", ""][0], *widths)}


def _residual(layers: dict[tuple[str, str | None], tuple[int, ...]], stages: int) -> dict[str, Any]:
    numbers = [str(s) for s in range(1, stages + 1)]
    depths = tuple(sum(1 for stage, _ in layers if stage == s) for s in numbers)
    return {"num_blocks": depths, "widths": tuple(layers[s, "0"][0] for s in numbers)}


def _convs(shapes: Shapes, pattern: str) -> dict[tuple[str, str | None], tuple[int, ...]]:
    """The kernels whose keys match, by the pattern's two groups, in the network's order: a file may have another."""
    found = ((re.fullmatch(pattern, k), s) for k, s in shapes.items())
    layers = {(m[1], m[2]): s for m, s in found if m}
    return dict(sorted(layers.items(), key=lambda item: natural_order(f"{item[0][0]}.{item[0][1] or 0}")))


@dataclass(frozen=True)
class Architecture:
    """A family of networks: the keys that betray it, in the official names, and how to infer its arguments."""

    mark: str
    infer: Callable[[Shapes], tuple[str, dict[str, Any]]]
    classifier: str
    training_only: str = ""


ARCHITECTURES = (
    Architecture(r"stage1\.blocks\.0\.rbr_\w+\.", _repvggplus, "linear", r"stage\w+_aux\."),
    Architecture(r"stage1\.0\.rbr_\w+\.", _repvgg, "linear"),
    Architecture(r"stem\.conv1\.acb\.(square|fused)_conv\.", _vgg16, "linear2"),
    Architecture(r"conv1\.acb\.(square|fused)_conv\.", _cifarquick, "fc2"),
    Architecture(r"stage1\.block1\.conv1\.acb\.", _wide_resnet, "linear"),
    Architecture(r"stage1\.conv1\.(square|fused)_conv\.", _cifar_resnet, "linear"),
    Architecture(r"stage1\.0\.conv1\.acb\.(square|fused)_conv\.", _resnet18, "linear"),
)


def recognise(shapes: Mapping[str, tuple[int, ...]], model: str | None = None) -> Recognition:
    """The network a state_dict belongs to, from its keys and shapes; ``model`` overrides the network's name.

    Raises:  UnknownModelError if nothing known has such keys; InputError if keys are missing, unexpected or of another
             shape than the network's
    """
    published = recognise_network(shapes, model, DEPLOYED.__contains__)
    if published is not None:
        return Recognition(
            published.name, dict(published.arguments), published.naming, published.form, dict(published.renamed)
        )
    naming = next((n for n in NAMINGS if n.fits(shapes)), OFFICIAL)
    renamed = {naming.own_name(k): k for k in shapes}
    official: Shapes = {new: tuple(shapes[old]) for new, old in renamed.items()}
    known = next((a for a in ARCHITECTURES if any(re.match(a.mark, k) for k in official)), None)
    alone = not naming.arguments or all(re.match(r"stage\d\.", k) for k in official)
    if model is None and not (known and alone):  # a backbone with more behind it is another network
        raise unknown_network(official)
    name, arguments = _inferred(known, official, model, naming.arguments)
    dropped = tuple(
        old for new, old in renamed.items() if known and known.training_only and re.match(known.training_only, new)
    )
    result = Recognition(name, arguments, naming, "training", renamed, dropped)
    return replace(result, form=_held_form(result, official))


def _inferred(
    known: Architecture | None, official: Shapes, model: str | None, given: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Name and arguments: inferred where the keys allow it, ``given`` otherwise, checked against a name the user gave."""
    if known is None:
        return str(model), {}
    try:
        name, arguments = known.infer(official)
        arguments["num_classes"] = given["num_classes"] if given else official[f"{known.classifier}.weight"][0]
    except (KeyError, IndexError, ZeroDivisionError) as error:
        if model is None:
            raise InputError(
                "the checkpoint is incomplete: a layer its network must have is missing",
                at=str(error).strip("'\"()"),
                why="the keys are those of a known family, but not all of them are there",
                do="use the whole state_dict, or name the network with -m; fuse --blocks-only asks for no network",
            ) from error
        return model, {}
    if model is None or model == name:
        return name, arguments
    return model, {"num_classes": arguments["num_classes"]}


def _held_form(found: Recognition, official: Shapes) -> str:
    """The form; raises unless the keys and shapes are exactly the network's in it."""
    expected = _expected(found, official)
    counters = [k for k in expected if k.endswith("num_batches_tracked")]
    blocks = places(expected, found.family)
    form = form_of(blocks, official)
    expected = deployed_shapes(expected, blocks, official)
    given = {k: s for k, s in official.items() if not k.endswith("num_batches_tracked")}
    wanted = {k: s for k, s in expected.items() if k not in counters}
    if given == wanted:
        return form
    missing = [found.file_name(k) for k in wanted if k not in given]
    unexpected = [found.file_name(k) for k in given if k not in wanted]
    shapes = [
        f"{found.file_name(k)} is {given[k]}, not {wanted[k]}" for k in wanted if k in given and given[k] != wanted[k]
    ]
    raise InputError(
        f"the checkpoint is not a {found.model}: {len(missing)} keys missing, {len(unexpected)} unexpected, "
        f"{len(shapes)} of another shape",
        at="; ".join(
            part for part in (some("missing", missing), some("unexpected", unexpected), some("shapes", shapes)) if part
        ),
        why="a network that does not have exactly these weights would compute something else",
        do="check the file, or name its network with -m; fuse --blocks-only asks for no network",
    )


def _expected(found: Recognition, given: Shapes) -> Shapes:
    """The keys and shapes of the network's training form."""
    without = [k for k, s in given.items() if 0 in s]
    if without:
        raise InputError(f"{len(without)} tensors have no entries", at=some("empty", without), do="check the file")
    try:
        return {k: tuple(v.shape) for k, v in found.build().state_dict().items()}
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        arguments = ", ".join(f"{k}={v!r}" for k, v in found.arguments.items())
        raise InputError(
            f"the checkpoint's shapes fit no {found.model}",
            at=arguments,
            why=(str(error) or type(error).__name__).splitlines()[0],
            do="check the file, or name its network with -m",
        ) from error


def _on_meta(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return create_model(name, **arguments).eval()
