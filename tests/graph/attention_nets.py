"""Attention blocks as they are published, small, and the vectors of a network set at random."""

from __future__ import annotations

import torch
from blocks import Lambda, randomised
from torch import nn
from torch.nn import functional as F


def stirred(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and eval mode, its norms with statistics and every vector away from its first values."""
    randomised(model, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for vector in (p for p in model.parameters() if p.dim() == 1):
            vector.copy_(torch.randn(vector.shape, generator=generator, dtype=vector.dtype) + 0.1)
    return model


def biases(fused: nn.Module) -> set[str]:
    """The paths of the layers that have a bias or a shift."""
    return {path for path, layer in fused.named_modules() for name in ("bias", "shift") if _has(layer, name)}


def _has(layer: nn.Module, name: str) -> bool:
    return getattr(layer, name, None) is not None


class ExternalAttention(nn.Module):
    """EANet's block: two memories between two convolutions, normalised over pixels and then over the memory."""

    def __init__(self, channels: int, memory: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1)
        self.linear_0 = nn.Conv1d(channels, memory, 1, bias=False)
        self.linear_1 = nn.Conv1d(memory, channels, 1, bias=False)
        self.conv2 = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        """Attend to the memory."""
        b, c, h, w = x.shape
        attention = self.linear_0(self.conv1(x).view(b, c, h * w)).softmax(-1)
        attention = attention / (1e-9 + attention.sum(1, keepdim=True))
        return F.relu(self.conv2(self.linear_1(attention).view(b, c, h, w)) + x)


class Attention(nn.Module):
    """Scaled dot-product attention with three projections of d channels for each of h heads.

    ``logits`` and ``weights`` change what stands before and behind the softmax; ``fused`` calls torch's own attention.
    """

    def __init__(self, width=12, d=4, h=3, logits=None, weights=None, fused=None, dim=-1, out=None) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, h * d) for _ in range(3))
        self.o = nn.Linear(h * d, width) if out is None else out
        self.shape, self.dim = (h, d), dim
        self.logits, self.weights, self.fused = logits, weights, fused

    def heads(self, layer: nn.Module, x):
        """A projection (b, h, n, d)."""
        return layer(x).view(*x.shape[:2], *self.shape).permute(0, 2, 1, 3)

    def forward(self, x, *more):
        """Attend to the same tokens."""
        q, k, v = (self.heads(layer, x) for layer in (self.q, self.k, self.v))
        if self.fused is not None:
            result = self.fused(q, k, v, *more)
        else:
            logits = q @ k.transpose(-2, -1) / self.shape[1] ** 0.5
            attention = (logits if self.logits is None else self.logits(logits, *more)).softmax(self.dim)
            result = (attention if self.weights is None else self.weights(attention, *more)) @ v
        return self.o(result.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class Packed(nn.Module):
    """Attention whose keys and values (``parts`` 2), or all three, come from one layer, taken apart by ``take``."""

    def __init__(self, parts: int = 3, take="unbind", norm=None) -> None:
        super().__init__()
        self.q = nn.Linear(12, 12) if parts == 2 else nn.Identity()
        self.packed, self.proj = nn.Linear(12, 12 * parts), nn.Linear(12, 12)
        self.parts, self.take, self.norm = parts, take, norm

    def forward(self, x):
        """Attend to the same tokens."""
        b, n, c = x.shape
        packed = self.packed(x)
        if self.take == "split":
            found = [part.view(b, n, 3, 4).transpose(1, 2) for part in packed.split(12, -1)]
        else:
            packed = packed.reshape(b, n, self.parts, 3, 4).permute(2, 0, 3, 1, 4)
            found = list(packed.unbind(0)) if self.take == "unbind" else [packed[i] for i in range(self.parts)]
        q, k, v = found if self.parts == 3 else (self.q(x).view(b, n, 3, 4).transpose(1, 2), *found)
        attention = ((q * 0.3) @ k.transpose(-2, -1)).softmax(-1)
        attention = attention if self.norm is None else self.norm(attention)
        return self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))


class Position(nn.Module):
    """DANet's attention among positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels, channels // 4, 1)
        self.value, self.gamma = nn.Conv2d(channels, channels, 1), nn.Parameter(torch.ones(1))

    def forward(self, x):
        """Attend among pixels."""
        b, c, h, w = x.shape
        energy = torch.bmm(self.query(x).view(b, -1, h * w).permute(0, 2, 1), self.key(x).view(b, -1, h * w))
        result = torch.bmm(self.value(x).view(b, -1, h * w), energy.softmax(-1).permute(0, 2, 1))
        return self.gamma * result.view(b, c, h, w) + x


class Channels(nn.Module):
    """DANet's attention among channels, which subtracts from the row's maximum."""

    def forward(self, x):
        """Attend among channels."""
        b, c, h, w = x.shape
        flat = x.view(b, c, -1)
        energy = torch.bmm(flat, flat.permute(0, 2, 1))
        energy = torch.max(energy, -1, keepdim=True)[0].expand_as(energy) - energy
        return torch.bmm(energy.softmax(-1), flat).view(b, c, h, w) + x


def pooled(norm: bool = False, dim: int = -1) -> nn.Module:
    """Global context: pixels averaged with a softmax of one convolution of them."""
    mask = nn.Sequential(nn.Conv2d(8, 1, 1), nn.BatchNorm2d(1)) if norm else nn.Conv2d(8, 1, 1)

    def run(self, x):
        weights = self.mask(x).flatten(2).softmax(dim)
        return (x.flatten(2) * weights).sum(-1)

    return Lambda(run, mask=mask)


class Select(nn.Module):
    """Selective kernels: two branches, weighed by a softmax over the pair of logits; ``form`` says how that is written."""

    def __init__(self, form: str, channels: int = 8, count: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(count))
        self.squeeze, self.excite = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, count * channels, 1, bias=bias)
        self.fcs = nn.ModuleList(nn.Linear(4, channels) for _ in range(count))
        self.form, self.count = form, count

    def forward(self, x):
        """Weigh the branches."""
        branches = [torch.relu(branch(x)) for branch in self.branches]
        stack = torch.stack(branches, 1)
        z = torch.relu(self.squeeze(stack.sum(1).mean((2, 3), keepdim=True)))
        if self.form == "two layers":
            weights = torch.stack([fc(z.flatten(1))[:, :, None, None] for fc in self.fcs]).softmax(0)
            return (weights * torch.stack(branches)).sum(0)
        weights = self.excite(z).view(x.shape[0], self.count, -1, 1, 1).softmax(1)
        if self.form == "stack":
            return (stack * weights).sum(1)
        if self.form == "returned":
            return (stack * weights).sum(1), weights
        if self.form == "select":
            return branches[0] * weights[:, 0] + branches[1] * weights[:, 1]
        if self.form == "difference":
            return branches[0] * weights[:, 0] - branches[1] * weights[:, 1]
        if self.form == "crossed":
            return branches[1] * weights[:, 1] + branches[0] * weights[:, 0]
        one, other = weights.chunk(2, 1) if self.form == "chunk" else weights.split(1, 1)
        return branches[0] * one.squeeze(1) + branches[1] * other.squeeze(1)
