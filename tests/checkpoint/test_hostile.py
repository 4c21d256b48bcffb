"""Hostile and damaged files: each is refused by name, and nothing in it runs."""

import io
import os
import pickle
import random
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from reptool.checkpoint import read as reading
from reptool.checkpoint.inert import examine
from reptool.checkpoint.pickles import DamagedPickleError
from reptool.checkpoint.read import read_checkpoint
from reptool.errors import InputError, ReptoolError, UnsafeInputError

STATE = {"a.weight": torch.arange(24.0).reshape(4, 6), "a.bias": torch.arange(4.0)}
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"


class Calls:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(path, data, records=(("data/0", b"\0" * 16),), root="c", **options):
    """Make a zip archive around the pickle ``data``."""
    with zipfile.ZipFile(path, "w", options.get("compression", zipfile.ZIP_STORED)) as target:
        for name, content in (("data.pkl", data), *records, ("version", b"3\n")):
            target.writestr(f"{root}/{name}", content)
    return path


def tensor_pickle(offset=0, size=b"K\x04\x85", stride=b"K\x01\x85", key=b"X\x01\x00\x00\x00w"):
    """Make the pickle of one tensor of four stored floats, by hand."""
    body = TENSOR + b"K" + bytes([offset]) + size + stride + b"\x89ccollections\nOrderedDict\n)RtR"
    return b"\x80\x02}" + key + body + b"s."


def refused(path, kind=InputError, *texts):
    """Check the refusal's kind and exit code, and that it names the file and ``texts``."""
    with pytest.raises(ReptoolError) as caught:
        read_checkpoint(path)
    error = caught.value
    assert type(error) is kind, error
    assert error.exit_code == (3 if kind is UnsafeInputError else 2)
    for text in (Path(path).name, *texts):
        assert text in str(error)
    return error


def test_the_hand_made_archive_is_read(tmp_path):
    """Negative control: the same archive without a fault is a checkpoint."""
    read = read_checkpoint(archive(tmp_path / "c.pt", tensor_pickle()))
    assert torch.equal(read.tensors["w"], torch.zeros(4))


UNSAFE = [
    (lambda mark: Calls(os.system, f"touch {mark}"), "posix.system"),
    (lambda mark: Calls(eval, f"open({str(mark)!r}, 'w')"), "builtins.eval"),
    (lambda mark: Calls(exec, f"open({str(mark)!r}, 'w')"), "builtins.exec"),
    (lambda mark: {"state_dict": {**STATE, "x": [({"y": Calls(os.mkdir, str(mark))},)]}}, "posix.mkdir"),
    (lambda mark: Calls(getattr, "text", "upper"), "builtins.getattr"),
    (lambda mark: Calls(getattr, torch.nn.Linear, "__init__"), "builtins.getattr"),
    (lambda mark: Calls(torch.FloatTensor, 4, 4), "torch.FloatTensor"),
    (lambda mark: {**STATE, "x": Calls(torch.load, str(mark))}, "a call of torch.serialization.load"),
    (lambda mark: {**STATE, "x": Calls(print, "text")}, "a call of builtins.print"),
    (lambda mark: {**STATE, "x": os.system}, "posix.system"),
]


@pytest.mark.parametrize(("make", "name"), UNSAFE)
@pytest.mark.parametrize("form", ["zip", "legacy", "raw", "raw-4"])
def test_code_is_refused_and_not_run(tmp_path, make, name, form):
    """A pickle that asks for foreign names is refused with exit code 3, the names said, nothing run."""
    mark, path = tmp_path / "ran", tmp_path / "evil.pt"
    value = make(mark)
    if form.startswith("raw"):
        with path.open("wb") as stream:
            pickle.dump(value, stream, protocol=4 if form == "raw-4" else 2)
    else:
        torch.save(value, path, _use_new_zipfile_serialization=form == "zip")
    refused(path, UnsafeInputError, name.removeprefix("a call of ") if form.startswith("raw") else name)
    assert not mark.exists()


@pytest.mark.parametrize("path", ["torch.serialization os", "numpy.f2py os", "timeit builtins"])
def test_a_module_behind_another_is_seen(tmp_path, path):
    """A pickle can reach a module through any other that imports it; the name shows it."""
    function = {"os": "system", "builtins": "eval"}[path.split()[1]]
    data = f"cbuiltins\ngetattr\n(c{path.replace(' ', chr(10))}\nX".encode() + struct.pack("<I", len(function))
    data = b"\x80\x02" + data + function.encode() + b"tR(X\x04\0\0\0truetR."
    refused(archive(tmp_path / "c.pt", data, records=()), UnsafeInputError, path.replace(" ", "."))


def test_the_marker_would_have_shown_execution(tmp_path):
    """Negative control: an ordinary unpickler runs the same payload."""
    mark = tmp_path / "ran"
    pickle.loads(pickle.dumps(Calls(os.mkdir, str(mark))))  # noqa: S301 - our own payload, made on the line
    assert mark.exists()


def test_protocol_4_in_an_archive_names_its_globals(tmp_path):
    """Names that a newer protocol takes from its stack are found too."""
    data = pickle.dumps(Calls(os.system, "true"), protocol=4)
    refused(archive(tmp_path / "c.pt", data), UnsafeInputError, "posix.system")
    benign = archive(tmp_path / "d.pt", pickle.dumps({"a": 1}, protocol=4))
    refused(benign, InputError, "protocol 4", "data.pkl")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"w": Calls(torch._utils._rebuild_qtensor, 1)}, "quantised"),
        ({"w": torch.ones(4).to_sparse()}, "sparse"),
        ({"w": torch.ones(4, device="meta")}, "meta"),
    ],
)
def test_torch_tensors_of_other_kinds_are_unsupported_not_unsafe(tmp_path, value, text):
    """Quantised, sparse and meta tensors are refused as what they are."""
    torch.save(value, tmp_path / "c.pt")
    refused(tmp_path / "c.pt", InputError, text)


GEOMETRY = [
    ({"offset": 1}, "reaches element 5"),
    ({"size": b"K\x05\x85"}, "expanded view"),
    ({"size": b"J\x00\x00\x10\x00J\x00\x00\x10\x00\x86", "stride": b"K\x00K\x00\x86"}, "expanded view"),
    ({"size": b"K\x02K\x02\x86", "stride": b"K\x01K\x01\x86"}, "overlap"),
    ({"size": b"K\x02K\x02\x86"}, "malformed offset or stride"),
    ({"size": b"J\xff\xff\xff\xff\x85"}, "malformed shape"),
    ({"stride": b"K\x02\x85"}, "reaches element 7"),
]


@pytest.mark.parametrize(("fault", "text"), GEOMETRY)
def test_geometry_that_lies_is_refused(tmp_path, fault, text):
    """A tensor lies inside its stored bytes, no element twice."""
    refused(archive(tmp_path / "c.pt", tensor_pickle(**fault)), InputError, text, "data.pkl")


BOMBS = [
    (b"\x80\x02}(" + b")" + b"2\x86" * 60 + b"K\x01u.", "DUP"),
    (b"\x80\x02}(" + b")q\x00" + b"h\x00\x86q\x00" * 60 + b"K\x01u.", "this one has <a tuple>"),
    (b"\x80\x02)" + b"\x85" * 100_000 + b".", "a bare tuple"),
    (b"\x80\x02" + b"}X\x05\0\0\0model" * 50_000 + b"}" + b"s" * 50_000 + b".", "no state_dict found"),
    (b"\x80\x02c" + b"a" * 2000 + b"\nb\n.", "more than a thousand letters"),
    (b"\x80\x02}X\x01\x00\x00\x00aK\x01s.trailing", "after the end"),
    (b"\x80\x02}(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.", "twice"),
    (b"\x80\x02N)R.", "a call of an object"),
    (b"", "damaged"),
    (b"\x80\x02s.", "damaged"),
    (b"\x80\x02h\x05.", "damaged"),
]


@pytest.mark.parametrize(("data", "text"), BOMBS)
def test_bombs_and_malformed_pickles_are_refused(tmp_path, data, text):
    """Nesting and hashing bombs, trailing bytes and nonsense end at once."""
    kind = UnsafeInputError if "a call of" in text else InputError
    refused(archive(tmp_path / "c.pt", data, records=()), kind, text)


def test_sharing_and_colliding_keys_cost_no_more_than_their_bytes():
    """What a pickle names again is not copied, and keys that are made to collide do not slow a dictionary."""
    copies = b"\x80\x02(" + b"ccollections\nOrderedDict\nq\x00}q\x01" + b"h\x00h\x01\x85R" * 3 + b"t."
    _, shared, *others = examine(io.BytesIO(copies)).value
    assert all(other is shared for other in others)
    prime = 2**61 - 1
    keys = b"".join(b"\x8a\x0b" + (prime * n).to_bytes(11, "little", signed=True) + b"N" for n in range(1, 20_000))
    start = time.perf_counter()
    assert len(examine(io.BytesIO(b"\x80\x02}(" + keys + b"u.")).value) == 19_999
    assert time.perf_counter() - start < 5  # a second or so; colliding keys took minutes


def test_containers_in_containers_end_at_once(tmp_path):
    """Averaged and raw weights at each of many levels are compared level by level, not each with each."""
    value = dict(STATE)
    for _ in range(30):
        value = {"model": value, "ema": value, **STATE}
    torch.save(value, tmp_path / "c.pt")
    start = time.perf_counter()
    assert set(read_checkpoint(tmp_path / "c.pt").tensors) == set(STATE)
    assert time.perf_counter() - start < 5
    module = torch.nn.Sequential(*[torch.nn.Identity() for _ in range(1000)])
    value = {"model": module, "net": module, "ema": module}
    for _ in range(6):
        value = {name: dict(value) for name in ("model", "net", "ema")}
    torch.save({**value, "state_dict": STATE}, tmp_path / "c.pt")
    start = time.perf_counter()
    assert set(read_checkpoint(tmp_path / "c.pt").tensors) == set(STATE)
    assert time.perf_counter() - start < 5
    ring = {**STATE}
    ring |= {"model": ring, "ema": ring}
    ring["model"], ring["ema"] = ring, ring
    torch.save(ring, tmp_path / "c.pt")
    assert set(read_checkpoint(tmp_path / "c.pt").tensors) == set(STATE)


def test_operations_are_capped(monkeypatch):
    """A pickle of more operations than the cap is refused, one of fewer is not."""
    import reptool.checkpoint.pickles as module

    monkeypatch.setattr(module, "MAX_OPS", 4)
    assert examine(io.BytesIO(b"\x80\x02K\x01.")).value == 1
    with pytest.raises(DamagedPickleError, match="more than 4"):
        examine(io.BytesIO(b"\x80\x02K\x01\x85\x85\x85."))


def write_raw(path, names_and_data, **options):
    """Make an archive with exactly these records."""
    with zipfile.ZipFile(path, "w", **options) as target:
        for name, data in names_and_data:
            target.writestr(name, data)
    return path


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([("data/0", b"\0" * 16), ("data/0", b"\1" * 16)], "'c/data/0' appears twice"),
        ([("data/0", b"\0" * 16), ("../x", b"")], "'c/../x' has a path"),
        ([("data/0", b"\0" * 12)], "'data/0' has 12 bytes, the pickle asks for 16"),
        ([("data/0", b"\0" * 16), ("data/1", b"\0")], "'data/1' has 1 bytes, the pickle asks for none"),
        ([], "'data/0' has no bytes"),
        ([("data/0", b"\0" * 16), ("byteorder", b"big")], "big-endian"),
    ],
)
def test_records_that_do_not_fit_are_named(tmp_path, records, text):
    """Every record is accounted for, once, at its size."""
    refused(archive(tmp_path / "c.pt", tensor_pickle(), records), InputError, text)


def test_archives_torch_never_writes_are_refused(tmp_path):
    """Compression, a second folder, a comment, bytes before the archive, and encryption are refused."""
    good = archive(tmp_path / "good.pt", tensor_pickle()).read_bytes()
    packed = archive(tmp_path / "packed.pt", tensor_pickle(), compression=zipfile.ZIP_DEFLATED)
    refused(packed, InputError, "'c/data.pkl' is compressed")
    refused(write_raw(tmp_path / "bare.pt", [("data.pkl", b".")]), InputError, "'data.pkl' has a path")
    refused(write_raw(tmp_path / "none.pt", [("a/version", b"3")]), InputError, "no data.pkl")
    refused(write_raw(tmp_path / "numpy.pt", [("a.npy", b".")]), InputError, "NumPy")
    refused(write_raw(tmp_path / "two.pt", [("a/data.pkl", b"."), ("b/data.pkl", b".")]), InputError, "2 folders")
    (tmp_path / "locked.pt").write_bytes(good.replace(b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0"))
    refused(tmp_path / "locked.pt", InputError, "'c/data.pkl' is encrypted")
    (tmp_path / "front.pt").write_bytes(good[:60] + good)
    refused(tmp_path / "front.pt", InputError, "no record owns")
    with zipfile.ZipFile(tmp_path / "good.pt", "a") as target:
        target.comment = b"hello"
    refused(tmp_path / "good.pt", InputError, "comment")


def test_a_record_marked_as_directory_is_refused(tmp_path):
    """Such a record would leave its tensor uninitialised: torch.load reads the name and not the bytes."""
    path = archive(tmp_path / "c.pt", tensor_pickle())
    with zipfile.ZipFile(path, "a") as target:
        target.getinfo("c/data/0").external_attr |= 0x10
        target._didModify = True
    refused(path, InputError, "'c/data/0' is marked as a directory")


def test_programs_are_refused_as_programs(tmp_path):
    """TorchScript and exported archives are recognised, never run."""
    write_raw(tmp_path / "ts.pt", [("m/constants.pkl", b"."), ("m/data.pkl", b"."), ("m/code/__torch__.py", b"")])
    refused(tmp_path / "ts.pt", InputError, "TorchScript", "a program, not a checkpoint")
    write_raw(tmp_path / "e.pt2", [("m/archive_format", b"pt2"), ("m/models/model.json", b"{}")])
    refused(tmp_path / "e.pt2", InputError, "exported program", "a program, not a checkpoint")


def test_a_real_torchscript_file_is_refused(tmp_path):
    """What torch.jit.save writes today is recognised."""
    buffer = io.BytesIO()
    module = torch.nn.ReLU()
    torch.jit.save(torch.jit.trace(module, torch.ones(1)), buffer)
    (tmp_path / "ts.pt").write_bytes(buffer.getvalue())
    refused(tmp_path / "ts.pt", InputError, "TorchScript")


def test_files_that_are_no_checkpoints_are_refused(tmp_path):
    """Empty, text, pointer, tar, directory, pipe and missing files each get one clean message."""
    texts = {
        "empty.pt": b"",
        "text.pt": b"hello, this is a text\n",
        "lfs.pt": b"version https://git-lfs.github.com/spec/v1\n",
    }
    for (name, content), text in zip(texts.items(), ("empty", "no checkpoint format", "git lfs pull"), strict=True):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, InputError, text)
    with tarfile.open(tmp_path / "old.tar", "w") as target:
        target.add(tmp_path / "text.pt", "pickle")
    refused(tmp_path / "old.tar", InputError, "tar archive")
    (tmp_path / "bare.pkl").write_bytes(pickle.dumps({"a": 1}))
    refused(tmp_path / "bare.pkl", InputError, "bare pickle")
    refused(tmp_path, InputError, "a directory")
    refused(tmp_path / "missing.pt", InputError, "No such file")
    os.mkfifo(tmp_path / "pipe.pt")
    refused(tmp_path / "pipe.pt", InputError, "not a regular file")


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncation_is_always_noticed(tmp_path, form):
    """A file cut anywhere is refused; the whole file is read."""
    path, cut = tmp_path / "whole", tmp_path / "cut.pt"
    if form == "safetensors":
        safetensors.torch.save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=form == "zip")
    data = path.read_bytes()
    assert set(read_checkpoint(path).tensors) == set(STATE)
    for length in sorted({0, 1, 4, 8, 30, 100, *range(200, len(data), 37), len(data) - 1}):
        cut.write_bytes(data[:length])
        refused(cut)


def test_single_bit_flips_are_never_silent(tmp_path):
    """Of 300 flipped bits none changes what is read: it is the same, or refused; most are refused."""
    path, generator = tmp_path / "c.pt", random.Random(7)
    state = {"a.weight": torch.randn(40, 50), "a.bias": torch.randn(40)}
    torch.save({"state_dict": state}, path)
    data, caught = path.read_bytes(), 0
    for _ in range(300):
        flipped = bytearray(data)
        flipped[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        try:
            read = read_checkpoint(path)
        except ReptoolError:
            caught += 1
            continue
        assert read.container == ("state_dict",)
        assert list(read.tensors) == list(state)
        assert all(torch.equal(read.tensors[key], state[key]) for key in state)
    assert caught > 200


def test_a_wrong_checksum_names_its_record(tmp_path):
    """A changed weight is reported with the record it lies in; torch.load reads it without a word."""
    path = archive(tmp_path / "c.pt", tensor_pickle(), [("data/0", b"weights-weights-")])
    assert read_checkpoint(path).tensors
    path.write_bytes(path.read_bytes().replace(b"weights-weights-", b"weights-Weights-"))
    refused(path, InputError, "'c/data/0' is damaged", "CRC")
    assert torch.load(path, weights_only=True)["w"].shape == (4,)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_that_ends_while_it_is_read_is_refused(tmp_path, monkeypatch, form):
    """A storage of which fewer bytes come than were promised is never padded."""
    path = tmp_path / "c.pt"
    if form == "safetensors":
        safetensors.torch.save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=form == "zip")
    assert read_checkpoint(path).tensors
    monkeypatch.setattr("reptool.checkpoint.stored.os.preadv", lambda *_: 0)
    refused(path, InputError, "is damaged", "ends after 0 of")


def header(text, data=b""):
    """Make a safetensors file with this header."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw + data


A = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HEADERS = [
    (header("{" + A + "," + A + "}", b"\0" * 4), "'a' appears twice"),
    (header("{" + A + "}", b"\0" * 8), "fill 4 bytes, the file holds 8"),
    (header("{" + A.replace("[0,4]", "[4,8]") + "}", b"\0" * 8), "begins at byte 4"),
    (header("{" + A.replace("[1]", "[2]") + "}", b"\0" * 4), "needs 8 bytes and has 4"),
    (header("{" + A.replace("[1]", "[-1]") + "}", b"\0" * 4), "malformed shape"),
    (header("{" + A.replace("F32", "F9") + "}", b"\0" * 4), "dtype 'F9'"),
    (header("{" + A.replace('"dtype"', '"kind"') + "}", b"\0" * 4), "not described"),
    (header('{"__metadata__":{"k":1}}'), "metadata is not text"),
    (header("{" + '"a":[' * 50_000), "header cannot be read"),
    (header("{not json}"), "header cannot be read"),
    (struct.pack("<Q", 2**40) + b"{}", "claims 1099511627776 bytes"),
]


@pytest.mark.parametrize(("data", "text"), HEADERS)
def test_safetensors_headers_that_lie_are_refused(tmp_path, data, text):
    """Names once, no holes, no overlap, sizes that agree."""
    path = tmp_path / "c.safetensors"
    path.write_bytes(header("{" + A + "}", b"\0" * 4))
    assert read_checkpoint(path).tensors["a"].item() == 0
    path.write_bytes(data)
    refused(path, InputError, text)


def test_unknown_exceptions_become_one_clean_error(tmp_path, monkeypatch):
    """Whatever goes wrong inside is one InputError that names the file."""
    torch.save(STATE, tmp_path / "c.pt")
    assert read_checkpoint(tmp_path / "c.pt").tensors

    def broken(*_args, **_options):
        raise KeyError("inside")

    monkeypatch.setattr(reading, "read_tensors", broken)
    refused(tmp_path / "c.pt", InputError, "KeyError", "inside")
