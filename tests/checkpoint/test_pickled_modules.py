"""Modules pickled whole: read as their state_dicts, with nothing imported, called or built."""

import os
import struct
from collections import OrderedDict, defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoint import strange
from torch import nn

from reptool.checkpoint.blockwise import fuse_blocks
from reptool.checkpoint.read import read_checkpoint, read_header
from reptool.errors import InputError, UnsafeInputError

STATE = {"conv.weight": torch.arange(12.0).reshape(3, 4), "conv.bias": torch.arange(3.0)}


def same(read, expected):
    """Equal names in the same order, equal dtypes and bits."""
    return list(read) == list(expected) and all(
        read[k].dtype == expected[k].dtype and torch.equal(read[k], expected[k]) for k in expected
    )


@pytest.mark.parametrize("legacy", [False, True])
def test_a_yolo_file_is_read_without_its_classes(tmp_path, legacy):
    """The averaged module's state_dict comes out bit for bit and in its order; the raw one's is there to choose."""
    model, ema = strange.detector(1), strange.detector(2)
    path = strange.save(strange.yolo(model, ema), tmp_path / "y.pt", legacy=legacy)
    with strange.trap() as asked:
        read, raw = read_checkpoint(path), read_checkpoint(path, "model")
        header = read_header(path)
    assert not asked
    assert same(read.tensors, ema.state_dict())
    assert same(raw.tensors, model.state_dict())
    assert (read.container, raw.container) == (("ema",), ("model",))
    assert header.tensors == {k: (tuple(t.shape), t.dtype) for k, t in ema.state_dict().items()}
    said = " ".join(read.notices)
    assert "the averaged weights 'ema' were read, not the raw weights 'model'" in said
    assert "'optimizer', 'opt' (argparse.Namespace), 'date' (datetime.datetime)" in said
    assert f"the state_dict of a pickled {strange.PACKAGE}.Detector was read" in said


def test_the_trap_would_have_seen_an_import(tmp_path):
    """Negative control: torch's own reader asks for the classes of the same file."""
    path = strange.save(strange.detector(1), tmp_path / "y.pt")
    with strange.trap() as asked, pytest.raises(ModuleNotFoundError, match=strange.PACKAGE):
        torch.load(path, weights_only=False)
    assert strange.PACKAGE in asked


def test_what_a_state_dict_leaves_out_is_left_out(tmp_path):
    """Buffers that are not persistent, parameters that are None, plain attributes; shared modules have each name."""
    network = strange.detector(3, half=False)
    read = read_checkpoint(strange.save(nn.DataParallel(network), tmp_path / "y.pt"))
    assert read.prefix == "module."
    assert same(read.tensors, network.state_dict())
    assert not {"model.2.grid", "model.2.stride", "model.2.scale"} & read.tensors.keys()
    shared = [read.tensors[f"{name}.rbr_1x1.conv.weight"].data_ptr() for name in ("model.0", "backbone", "model.1")]
    assert shared[0] == shared[1] != shared[2]


class Nested(nn.Module):
    """Classes inside a class, a method as an attribute, and a buffer that knows that it is one."""

    class Inner(nn.Module):
        """One that protocol 2 can name only by its owner."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2).t())

    def __init__(self):
        super().__init__()
        self.inner, self.buffer = self.Inner(), nn.Buffer(torch.randn(2))
        self.run = self.inner.extra_repr


OTHERS = {
    "nested": Nested,
    "compiled": lambda: torch.compile(nn.Sequential(nn.Linear(2, 2))),
    "recurrent": lambda: nn.LSTM(2, 3),
    "attention": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "lists": lambda: nn.ParameterList([nn.Parameter(torch.randn(2)), nn.Parameter(torch.randn(3))]),
    "channels last": lambda: nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last),
    "bfloat16": lambda: nn.BatchNorm1d(3, affine=False).bfloat16(),
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code:UserWarning")
def test_the_tensors_are_those_of_the_state_dict(tmp_path, name, legacy):
    """Whatever the module, its names, order, dtypes and bits are those of ``state_dict()``."""
    module = OTHERS[name]()
    torch.save(module, tmp_path / "c.pt", _use_new_zipfile_serialization=not legacy)
    read = read_checkpoint(tmp_path / "c.pt")
    assert same({f"{read.prefix}{k}": t for k, t in read.tensors.items()}, module.state_dict())


WEIGHTS = [
    ({"model": 1, "ema": 2}, ("ema",), ("model",)),
    ({"state_dict": 1, "state_dict_ema": 2}, ("state_dict_ema",), ("state_dict",)),
    ({"state_dict": 1, "ema_state_dict": 2}, ("ema_state_dict",), ("state_dict",)),
    ({"model": 1, "model_ema": 2}, ("model_ema",), ("model",)),
    ({"params": 1, "params_ema": 2}, ("params_ema",), ("params",)),
    ({"model": 1, "ema": {"module": 2, "updates": 7}}, ("ema", "module"), ("model",)),
    ({"model": {"state_dict": 1}, "ema": {"state_dict": 2}}, ("ema", "state_dict"), ("model", "state_dict")),
]


def filled(value):
    """Two different state_dicts where the numbers stand."""
    if isinstance(value, dict):
        return {k: v if k == "updates" else filled(v) for k, v in value.items()}
    return {k: t * value for k, t in STATE.items()}


@pytest.mark.parametrize(("form", "averaged", "raw"), WEIGHTS)
def test_weights_chooses(tmp_path, form, averaged, raw):
    """Averaged weights by default or on request, raw ones on request; the notice says which."""
    torch.save(filled(form), tmp_path / "c.pt")
    for weights, container, factor in ((None, averaged, 2), ("ema", averaged, 2), ("model", raw, 1)):
        read = read_checkpoint(tmp_path / "c.pt", weights)
        assert read.container == container
        assert same(read.tensors, filled(factor))
        assert f"{'averaged' if factor == 2 else 'raw'} weights {container[0]!r} were read" in read.notices[0]


def test_weights_that_are_not_there_are_not_replaced(tmp_path):
    """Asking for what a file has not is an error, never the other."""
    for value, asked in [
        ({"model": STATE, "ema": None}, "ema"),
        (STATE, "ema"),
        ({"ema": STATE}, "model"),
        ({"epoch": 1, "ema": {"module": STATE}}, "model"),
    ]:
        torch.save(value, tmp_path / "c.pt")
        assert same(read_checkpoint(tmp_path / "c.pt").tensors, STATE)
        with pytest.raises(InputError, match="averaged weights"):
            read_checkpoint(tmp_path / "c.pt", asked)
    torch.save({"model": STATE, "ema": {"conv.bias": torch.ones(3)}}, tmp_path / "c.pt")
    assert read_checkpoint(tmp_path / "c.pt").container == ("model",)
    read = read_checkpoint(tmp_path / "c.pt", "ema")
    assert list(read.tensors) == ["conv.bias"]
    assert "they lack 1 tensors" in read.notices[0]


def test_mmengine_saves_the_averaged_weights_as_state_dict(tmp_path):
    """MMEngine's EMAHook swaps the two when it saves, so its ema_state_dict is what was trained."""
    ema = {"steps": torch.tensor(9), **{f"module.{k}": t for k, t in STATE.items()}}
    torch.save({"meta": {}, "state_dict": filled(2), "ema_state_dict": ema, "message_hub": {}}, tmp_path / "c.pt")
    for weights, factor in ((None, 2), ("ema", 2), ("model", 1)):
        assert same(read_checkpoint(tmp_path / "c.pt", weights).tensors, filled(factor))
    del ema["steps"]
    torch.save({"meta": {}, "state_dict": filled(2), "ema_state_dict": ema}, tmp_path / "c.pt")
    assert same(read_checkpoint(tmp_path / "c.pt").tensors, filled(1))


def test_the_counter_of_an_averaged_model_is_no_weight(tmp_path):
    """Torch's AveragedModel, as a state_dict or pickled whole, is chosen although it counts its updates."""
    network, other = nn.Linear(2, 2), nn.Linear(2, 2)
    averaged = torch.optim.swa_utils.AveragedModel(other)
    for ema in (averaged.state_dict(), averaged):
        torch.save({"model": network.state_dict(), "ema": ema}, tmp_path / "c.pt")
        read = read_checkpoint(tmp_path / "c.pt")
        assert read.container == ("ema",)
        assert same(read.tensors, other.state_dict())
    torch.save({"n_averaged": torch.ones(1), "weight": torch.ones(2)}, tmp_path / "c.pt")
    assert "n_averaged" in read_checkpoint(tmp_path / "c.pt").tensors


class HistoryBuffer:
    """As mmengine.logging keeps it: NumPy arrays in an object."""

    def __init__(self):
        self._log_history, self._count_history = np.array([1.0, 2.0]), np.array([1, 1])


def tagged():
    """A parameter with an attribute that somebody gave it."""
    parameter = nn.Parameter(torch.ones(2))
    parameter.no_decay = True
    return parameter


BESIDE = {
    "namespace": SimpleNamespace(a=1),
    "scalar": np.float32(0.5),
    "array": np.zeros((2, 3)),
    "dtype": np.dtype("f4"),
    "dictionary": defaultdict(list, {"a": [1]}),
    "queue": deque([1, 2], maxlen=3),
    "history": {"log_scalars": OrderedDict(loss=HistoryBuffer())},
    "bytes": [b"", b"x\xff", bytearray(3)],
    "sets": [{1, (2, 3)}, frozenset("ab")],
    "numbers": [1j, 1 << 4000, range(3), slice(1)],
    "keys": {(1, 2): 3, None: 4, 2.5: 5, torch.float16: 6, torch.ones(1): 7},
    "optimizer": torch.optim.Adam(nn.Linear(2, 2).parameters()),
    "scaler": nn.Linear(2, 2),
    "generator": tagged(),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("legacy", [False, True])
def test_what_stands_beside_weights_is_dropped_by_name(tmp_path, name, legacy):
    """Configuration and training state of whatever class is left unread, with a notice."""
    torch.save({"state_dict": STATE, name: BESIDE[name]}, tmp_path / "c.pt", _use_new_zipfile_serialization=not legacy)
    read = read_checkpoint(tmp_path / "c.pt")
    assert same(read.tensors, STATE)
    assert read.notices[0].startswith(f"not read: {name!r}")


class Opaque:
    """Tensors inside an object that is no module."""

    def __init__(self, **inside):
        self.__dict__.update(inside)


class Reduced(nn.Module):
    """A module that says itself how it is made again."""

    def __init__(self, weight=None):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def __reduce__(self):
        return Reduced, (self.weight.data,)


class Encoded:
    """Tensors as bytes that only its own code can read."""

    def __reduce__(self):
        return Encoded, (b"0123456789abcdef",)


def holding(child):
    """A module with what is no module as its child."""
    outer = nn.Sequential(nn.Linear(2, 2))
    outer._modules["1"] = child
    return outer


BEHIND = [
    (lambda: Opaque(**STATE), "Opaque"),
    (lambda: {"model": Opaque(net=nn.Linear(2, 2))}, "Opaque"),
    (lambda: {"model": Encoded(), "epoch": 3}, "Encoded"),
    (lambda: {**STATE, "more": Opaque(weight=torch.ones(2))}, "Opaque"),
    (lambda: {"ema": Reduced(torch.ones(2))}, "Reduced"),
    (lambda: holding(Reduced(torch.ones(2))), "Reduced"),
    (lambda: holding(Opaque(a=1)), "Opaque"),
]


@pytest.mark.parametrize(("make", "name"), BEHIND)
def test_tensors_behind_what_cannot_be_read_are_refused(tmp_path, make, name):
    """Where the only way to the tensors leads through foreign code, the file is refused and the code named."""
    torch.save(make(), tmp_path / "c.pt")
    with pytest.raises(UnsafeInputError, match=rf"asks for [\w.]*{name}") as caught:
        read_checkpoint(tmp_path / "c.pt")
    assert caught.value.exit_code == 3
    assert "c.pt" in str(caught.value)


def test_averaged_weights_that_cannot_be_read_are_not_missing(tmp_path):
    """An averaging object is left with a notice, and refused where it is asked for."""
    torch.save({"model": STATE, "ema": Opaque(net=nn.Linear(2, 2))}, tmp_path / "c.pt")
    read = read_checkpoint(tmp_path / "c.pt")
    assert same(read.tensors, STATE)
    assert "Opaque)" in read.notices[0]
    with pytest.raises(UnsafeInputError, match="Opaque"):
        read_checkpoint(tmp_path / "c.pt", "ema")


class Evil:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


ATTACKS = [
    (lambda mark: Evil(os.mkdir, mark), "posix.mkdir"),
    (lambda mark: Evil(eval, f"__import__('os').mkdir({mark!r})"), "builtins.eval"),
    (lambda mark: Evil(map, os.mkdir, [mark]), "posix.mkdir"),
    (lambda mark: Evil(torch.hub.load, mark, "x"), "torch.hub.load"),
    (lambda mark: Evil(torch.storage._load_from_bytes, b"x"), "torch.storage._load_from_bytes"),
]


@pytest.mark.parametrize(("make", "name"), ATTACKS)
@pytest.mark.parametrize("where", ["attribute", "state", "beside"])
def test_an_attack_in_a_module_is_named_and_not_run(tmp_path, make, name, where):
    """Wherever in a module's pickle the call stands: exit code 3, and no trace of it."""
    evil, network = make(str(tmp_path / "ran")), nn.Linear(2, 2)
    if where == "attribute":
        network.hook = evil
    elif where == "state":
        network._buffers["hook"] = evil
    torch.save({"model": network, "x": evil if where == "beside" else None}, tmp_path / "c.pt")
    with pytest.raises(UnsafeInputError, match=name):
        read_checkpoint(tmp_path / "c.pt")
    with pytest.raises(UnsafeInputError, match=name):
        read_header(tmp_path / "c.pt")
    assert not (tmp_path / "ran").exists()


def test_the_attack_works_elsewhere(tmp_path):
    """Negative control: an ordinary reader runs it."""
    network = nn.Linear(2, 2)
    network.hook = Evil(os.mkdir, str(tmp_path / "ran"))
    torch.save(network, tmp_path / "c.pt")
    torch.load(tmp_path / "c.pt", weights_only=False)
    assert (tmp_path / "ran").exists()


def doubled(levels):
    """Modules of which each holds the next twice: as many names as two to the number of levels."""
    module = nn.Linear(1, 1)
    for _ in range(levels):
        module = nn.Sequential(module, module)
    return module


def cyclic():
    """A module that is its own child."""
    module = nn.Sequential(nn.Linear(1, 1))
    module._modules["again"] = module
    return module


def deep(levels):
    """Modules inside one another."""
    module = nn.Linear(1, 1)
    for _ in range(levels):
        module = nn.Sequential(module)
    return module


def named(name, part="_parameters"):
    """A module with a part of a name that torch does not allow."""
    module = nn.Module()
    getattr(module, part)[name] = torch.ones(1)
    return module


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (cyclic, "or in themselves"),
        (lambda: deep(150), "deeper than 100 levels"),
        (lambda: doubled(40), "more than 1000000 parts"),
        (lambda: named("a.b"), "'a.b' is no name"),
        (lambda: named(""), "'' is no name"),
        (lambda: named(3, "_buffers"), "3 is no name"),
        (lambda: named("x" * 1001), "is no name"),
    ],
)
def test_module_bombs_end(tmp_path, monkeypatch, make, text):
    """Modules in themselves, too deep, too many, or with odd names are refused, not followed."""
    if "parts" in text:
        monkeypatch.setattr("reptool.checkpoint.modules._MAX_WORK", 1000)
        text = text.replace("1000000", "1000")
    torch.save(make(), tmp_path / "c.pt")
    with pytest.raises(InputError, match=text):
        read_checkpoint(tmp_path / "c.pt")


def test_modules_that_are_no_bombs_are_read(tmp_path):
    """Negative control: the same shapes, a few levels of them."""
    for module in (deep(20), doubled(5)):
        torch.save(module, tmp_path / "c.pt")
        assert same(read_checkpoint(tmp_path / "c.pt").tensors, module.state_dict())


def test_eps_comes_from_the_modules(tmp_path):
    """What no state_dict carries is taken from the pickled norms: the fused blocks are those of the eps they were trained with."""
    network = strange.detector(5, half=False, eps=1e-3)
    read = read_checkpoint(strange.save(network, tmp_path / "y.pt"))
    assert set(read.eps.values()) == {1e-3}
    assert set(read.eps) == {k.removesuffix(".running_var") for k in read.tensors if k.endswith("running_var")}
    fused, report = fuse_blocks(read.tensors, None, {}, recorded=read.eps)
    right, _ = fuse_blocks(read.tensors, 1e-3, {})
    assumed, _ = fuse_blocks(read.tensors, None, {})
    assert same(fused, right)
    assert not same(fused, assumed)
    assert {row.eps for row in report.rows} == {1e-3}
    assert "eps of the norms is 0.001 for repvgg (official): the pickled module says so" in report.notices
    told = fuse_blocks(read.tensors, 1e-5, {}, recorded=read.eps)[1].notices
    assert "eps of the norms was given as 1e-05; the pickled module says 0.001" in told
    with torch.no_grad():
        network.eval()
        block, x = network.model[0], torch.randn(2, 4, 7, 7)
        wanted = block.rbr_dense(x) + block.rbr_1x1(x) + block.rbr_identity(x)
        got = nn.functional.conv2d(x, fused["model.0.rbr_reparam.weight"], fused["model.0.rbr_reparam.bias"], padding=1)
    assert torch.allclose(got, wanted, atol=1e-4)


def test_blocks_whose_norms_differ_in_eps_are_not_fused_with_one(tmp_path):
    """Two values in one block are an error; two in different blocks are each block's own."""
    network = strange.detector(6, half=False)
    for norm in (m for m in network.model[1].modules() if isinstance(m, nn.BatchNorm2d)):
        norm.eps = 1e-4
    read = read_checkpoint(strange.save(network, tmp_path / "y.pt"))
    report = fuse_blocks(read.tensors, None, {}, recorded=read.eps)[1]
    assert {row.eps for row in report.rows if row.fused.startswith("model.1.")} == {1e-4}
    assert {row.eps for row in report.rows} == {1e-3, 1e-4}
    network.model[1].rbr_identity.eps = 1e-2
    read = read_checkpoint(strange.save(network, tmp_path / "y.pt"))
    with pytest.raises(InputError, match=r"the block model\.1 has norms with 2 values of eps: 0\.0001, 0\.01"):
        fuse_blocks(read.tensors, None, {}, recorded=read.eps)


def test_reading_a_header_reads_no_weights(tmp_path):
    """Names and shapes come from the pickle alone: a changed weight is not seen, nor is it read."""
    path = tmp_path / "c.pt"
    torch.save({"state_dict": {"a.weight": torch.full((4,), 3.0), "a.running_var": torch.ones(4)}}, path)
    good = read_checkpoint(path)
    path.write_bytes(path.read_bytes().replace(struct.pack("<4f", *[3.0] * 4), struct.pack("<4f", *[4.0] * 4)))
    header = read_header(path, values=("running_var",))
    assert header.tensors == {k: (tuple(t.shape), t.dtype) for k, t in good.tensors.items()}
    assert list(header.values) == ["a.running_var"]
    assert torch.equal(header.values["a.running_var"], torch.ones(4))
    with pytest.raises(InputError, match=r"data/\d' is damaged"):
        read_checkpoint(path)
    with pytest.raises(InputError, match="is damaged"):
        read_header(path, values=("weight",))


def test_a_damaged_record_is_noticed_where_it_is_not_wanted(tmp_path):
    """All of a file is compared with its checksums, also what is dropped."""
    path = tmp_path / "c.pt"
    torch.save({"state_dict": STATE, "optimizer": {"momentum": torch.full((4,), 7.0)}}, path)
    assert same(read_checkpoint(path).tensors, STATE)
    path.write_bytes(path.read_bytes().replace(struct.pack("<4f", *[7.0] * 4), struct.pack("<4f", *[8.0] * 4)))
    with pytest.raises(InputError, match="is damaged"):
        read_checkpoint(path)
