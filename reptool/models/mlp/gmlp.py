"""gMLP for images: an MLP in which a linear map over the tokens of one half of the channels gates the other half.

Hanxiao Liu, Zihang Dai, David R. So, Quoc V. Le. Pay Attention to MLPs. NeurIPS 2021, arXiv:2105.08050. No official
code or weights were published; the names in our state dict are those of timm 1.0.31, Apache-2.0 licence.

Differences from the paper: see ``DIFFERENCES``, which every card carries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from reptool.errors import InputError
from reptool.models.layers import DropPath, PatchEmbed
from reptool.models.registry import ModelCard, register

if TYPE_CHECKING:
    from collections.abc import Sequence

DIFFERENCES = ("Norms have timm's eps, which its weights were trained with: 1e-6, and 1e-5 inside the gate.",)


class SpatialGatingUnit(nn.Module):
    """The first half of the channels, times a linear map over the tokens of the normalised second half.

    The map starts near zero and its bias at one, so that a fresh unit passes its first half on.

    Shapes:  (n, tokens, channels) -> (n, tokens, channels / 2)
    Source:  Liu et al. 2021, equations 2-4
    """

    def __init__(self, channels: int, tokens: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        if channels % 2:
            raise InputError(f"{channels} channels have no two halves", do="choose an even number")
        self.norm = nn.LayerNorm(channels // 2, eps)
        self.proj = nn.Linear(tokens, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """Gate the first half by the second."""
        kept, gate = x.chunk(2, -1)  # (n, tokens, channels / 2) each
        y: Tensor = kept * self.proj(self.norm(gate).transpose(1, 2)).transpose(1, 2)
        return y


class GatedMlp(nn.Module):
    """Two linear layers with an activation and a gating unit between them.

    Shapes:  (n, tokens, channels) -> the same, through (n, tokens, inner) and (n, tokens, inner / 2)
    """

    def __init__(self, channels: int, tokens: int, inner: int, *, gate_eps: float = 1e-5) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, inner)
        self.act = nn.GELU()
        self.gate = SpatialGatingUnit(inner, tokens, eps=gate_eps)
        self.fc2 = nn.Linear(inner // 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Expand, activate, gate, project back."""
        y: Tensor = self.fc2(self.gate(self.act(self.fc1(x))))
        return y


class GatedBlock(nn.Module):
    """A norm and a gated MLP, added to the input.

    Shapes:  (n, tokens, channels) -> the same
    Source:  Liu et al. 2021, figure 1
    """

    def __init__(
        self,
        channels: int,
        tokens: int,
        inner: int,
        *,
        eps: float = 1e-6,
        gate_eps: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps)
        self.mlp_channels = GatedMlp(channels, tokens, inner, gate_eps=gate_eps)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the gated MLP makes of the normalised input."""
        y: Tensor = x + self.drop_path(self.mlp_channels(self.norm(x)))
        return y


class GMLP(nn.Module):
    """Patches, gated blocks, a norm, the mean over the tokens and a linear classifier.

    Shapes:  (n, 3, h, w) -> (n, num_classes), h and w as in ``image_size``
    """

    def __init__(
        self,
        depth: int,
        channels: int,
        patch_size: int = 16,
        *,
        num_classes: int = 1000,
        image_size: Sequence[int] = (224, 224),
        ratio: float = 6.0,
        eps: float = 1e-6,
        gate_eps: float = 1e-5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = PatchEmbed(3, channels, patch_size, image_size)
        inner = int(ratio * channels)
        self.blocks = nn.Sequential(
            *[
                GatedBlock(channels, self.stem.tokens, inner, eps=eps, gate_eps=gate_eps, drop_path=drop_path)
                for _ in range(depth)
            ]
        )
        self.norm = nn.LayerNorm(channels, eps)
        self.head = nn.Linear(channels, num_classes)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of a batch of images."""
        x = self.norm(self.blocks(self.stem(x)))  # (n, tokens, channels)
        scores: Tensor = self.head(x.mean(1))
        return scores


def _initialise(module: nn.Module) -> None:
    """Draw linear layers as Glorot and Bengio 2010; a gate's is near zero, and its bias one."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, SpatialGatingUnit):  # its parts are initialised before it
        nn.init.normal_(module.proj.weight, std=1e-6)
        nn.init.ones_(module.proj.bias)


def _card(**claims: object) -> ModelCard:
    """Make a card with what all of this paper share."""
    return ModelCard(
        paper="Pay Attention to MLPs",
        arxiv="2105.08050",
        year=2021,
        upstream="huggingface/pytorch-image-models",
        licence="Apache-2.0",
        differences=DIFFERENCES,
        **claims,  # type: ignore[arg-type]
    )


_BLOCK = _card(
    input=(196, 256),
    parameters=632_276,
    deploy_parameters=631_764,
    macs=145_108_992,
    deploy_macs=145_108_992,
    deploy={"LayerNorm": 2, "Linear": 3},
)


@register("gmlp_block", "gmlp", _BLOCK, block=True)
def gmlp_block(
    channels: int = 256, tokens: int = 196, inner: int = 1536, *, eps: float = 1e-6, gate_eps: float = 1e-5
) -> GatedBlock:
    """Build one block, by default of the size of S."""
    block = GatedBlock(channels, tokens, inner, eps=eps, gate_eps=gate_eps)
    return block.apply(_initialise)


# name: channels, learnable numbers and multiply-accumulates of the training and the deploy form, figures as printed
_VARIANTS: dict[str, tuple[int, tuple[int, int], tuple[int, int], tuple[str, ...]]] = {
    "ti16": (128, (5_867_328, 5_859_392), (1_328_989_184,) * 2, ("72.3 top-1 (paper)",)),
    "s16": (256, (19_422_656, 19_406_784), (4_392_060_928,) * 2, ("79.6 top-1 (paper)", "79.652 top-1 (timm)")),
    "b16": (512, (73_075_392, 73_043_648), (15_720_452_096,) * 2, ("81.6 top-1 (paper)",)),
}


def _register(name: str) -> None:
    """Make one variant known by name."""
    channels, parameters, macs, published = _VARIANTS[name]
    card = _card(
        input=(3, 224, 224),
        parameters=parameters[0],
        deploy_parameters=parameters[1],
        macs=macs[0],
        deploy_macs=macs[1],
        deploy={"Conv": 1, "LayerNorm": 61, "Linear": 91},
        published=published,
    )

    @register(f"gmlp_{name}", "gmlp", card)
    def build(
        num_classes: int = 1000,
        *,
        depth: int = 30,
        channels: int = channels,
        patch_size: int = 16,
        image_size: Sequence[int] = (224, 224),
        ratio: float = 6.0,
        eps: float = 1e-6,
        gate_eps: float = 1e-5,
        drop_path: float = 0.0,
    ) -> GMLP:
        """Build it; ``ratio`` is how many times wider than the input the gated MLP is."""
        return GMLP(
            depth,
            channels,
            patch_size,
            num_classes=num_classes,
            image_size=image_size,
            ratio=ratio,
            eps=eps,
            gate_eps=gate_eps,
            drop_path=drop_path,
        )


for _name in _VARIANTS:
    _register(_name)
