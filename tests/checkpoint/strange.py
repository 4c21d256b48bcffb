"""Pickled modules whose classes are gone: made here, saved by torch, and then nowhere to be imported from."""

import argparse
import contextlib
import datetime as dt
import enum
import functools
import pathlib
import sys
import types
import warnings

import numpy as np
import torch
from torch import nn

PACKAGE = "strange_detector"


class Mode(enum.Enum):
    """A member of it is pickled as a call of its class."""

    FAST = 1


class RepBlock(nn.Module):
    """RepVGG's block under its official names, with a trainer's eps."""

    def __init__(self, channels=4, eps=1e-3):
        super().__init__()
        self.rbr_dense = nn.Sequential()
        self.rbr_dense.add_module("conv", nn.Conv2d(channels, channels, 3, 1, 1, bias=False))
        self.rbr_dense.add_module("bn", nn.BatchNorm2d(channels, eps=eps))
        self.rbr_1x1 = nn.Sequential()
        self.rbr_1x1.add_module("conv", nn.Conv2d(channels, channels, 1, bias=False))
        self.rbr_1x1.add_module("bn", nn.BatchNorm2d(channels, eps=eps))
        self.rbr_identity = nn.BatchNorm2d(channels, eps=eps)
        self.act = nn.SiLU(inplace=True)


class Head(nn.Module):
    """Everything that a module may hold besides its tensors, and tensors that a state_dict leaves out."""

    def __init__(self):
        super().__init__()
        self.cv = nn.Conv2d(4, 6, 1)
        self.register_parameter("scale", None)
        self.register_buffer("anchors", torch.randn(3, 2))
        self.register_buffer("grid", torch.randn(3), persistent=False)
        self.stride = torch.tensor([8.0, 16.0])
        self.inplace, self.names, self.mode = True, {0: "cat", 1: "dog"}, Mode.FAST
        self.norm_layer = functools.partial(nn.BatchNorm2d, eps=1e-3)
        self.args = argparse.Namespace(data=pathlib.Path("a/b"), seed=np.float64(3.0), flags=(1, {"a", "b"}))
        self.function, self.method = torch.relu, self.cv.extra_repr


class Detector(nn.Module):
    """A backbone that is listed twice, and a head that knows its owner."""

    def __init__(self, eps=1e-3):
        super().__init__()
        self.model = nn.Sequential(RepBlock(eps=eps), RepBlock(eps=eps), Head())
        self.backbone = self.model[0]
        object.__setattr__(self.model[2], "owner", self)
        self.yaml, self.save = {"nc": 2, "depth": 0.33}, [4, 6]


_CLASSES = (Mode, RepBlock, Head, Detector)


@contextlib.contextmanager
def importable():
    """The classes as those of a package that is there only meanwhile."""
    package = types.ModuleType(PACKAGE)
    homes = {kind: kind.__module__ for kind in _CLASSES}
    for kind in _CLASSES:
        setattr(package, kind.__name__, kind)
        kind.__module__ = PACKAGE
    sys.modules[PACKAGE] = package
    try:
        yield
    finally:
        del sys.modules[PACKAGE]
        for kind, home in homes.items():
            kind.__module__ = home


class Trap:
    """A finder that finds nothing, and remembers what was to be imported."""

    def __init__(self):
        self.asked = []

    def find_spec(self, name, _path=None, _target=None):
        """Say no."""
        self.asked.append(name)


@contextlib.contextmanager
def trap():
    """Notice every import that is not served from what is loaded already."""
    finder = Trap()
    sys.meta_path.insert(0, finder)
    try:
        yield finder.asked
    finally:
        sys.meta_path.remove(finder)


def save(value, path, *, legacy=False):
    """torch.save, with the classes there."""
    with importable(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the legacy format wants the source of every class
        torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    return path


def detector(seed, *, half=True, eps=1e-3):
    """A detector with random weights and statistics, some variances small enough for eps to matter."""
    torch.manual_seed(seed)
    network = Detector(eps)
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(1e-3, 2.0)
        norm.weight.data.uniform_(0.5, 1.5)
        norm.bias.data.normal_()
    return network.half() if half else network


def yolo(model, ema):
    """What a YOLO trainer saves."""
    return {
        "epoch": 12,
        "best_fitness": np.array([0.5]),
        "model": model,
        "ema": ema,
        "updates": 400,
        "optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1, momentum=0.9).state_dict(),
        "opt": argparse.Namespace(weights="", project=pathlib.Path("runs")),
        "date": dt.datetime(2024, 1, 2),  # noqa: DTZ001 - as they do
        "mode": Mode.FAST,
    }
