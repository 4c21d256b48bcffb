"""Writing: round trips, the same bytes each time, whole files or none, and what is never replaced."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from reptool.checkpoint import atomic
from reptool.checkpoint.atomic import atomic_file, check_target
from reptool.checkpoint.read import read_checkpoint
from reptool.checkpoint.write import write_checkpoint
from reptool.errors import InputError, OutputError

SUFFIXES = [".safetensors", ".pt", ".pth"]
TENSORS = {
    "z.weight": torch.randn(3, 4),
    "a.half": torch.randn(5).half(),
    "b.bfloat": torch.randn(2, 2).bfloat16(),
    "c.double": torch.randn(3).double(),
    "n.long": torch.tensor(2**40),
    "m.bool": torch.tensor([True, False]),
    "e.empty": torch.empty(0, 3),
    "i.int8": torch.tensor([-1, 2], dtype=torch.int8),
    "ü.name": torch.ones(1),
    "t.transposed": torch.arange(6.0).reshape(2, 3).t(),
    "v.view": torch.arange(100.0)[10:12],
    "nan": torch.tensor([float("nan"), -0.0]),
}
METADATA = {"b": "2", "a": "ü\n", "c": "{}"}


def bits(tensor):
    """Read a tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def names(folder):
    """List what is in ``folder``, temporary files included."""
    return sorted(path.name for path in Path(folder).iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip_is_bit_for_bit(tmp_path, suffix):
    """Names, shapes, dtypes, bits and metadata come back."""
    path = write_checkpoint(tmp_path / f"c{suffix}", TENSORS, METADATA)
    read = read_checkpoint(path)
    assert set(read.tensors) == set(TENSORS)
    assert read.metadata == METADATA
    assert read.notices == ()
    for key, tensor in TENSORS.items():
        assert read.tensors[key].dtype == tensor.dtype
        assert read.tensors[key].shape == tensor.shape
        assert bits(read.tensors[key]) == bits(tensor)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_input_gives_the_same_file(tmp_path, suffix):
    """Neither the path, nor the order of names, nor the time is in the bytes; another value is."""
    first = write_checkpoint(tmp_path / f"one{suffix}", TENSORS, METADATA).read_bytes()
    (tmp_path / "sub").mkdir()
    shuffled = dict(reversed(METADATA.items()))
    assert write_checkpoint(tmp_path / "sub" / f"two{suffix}", TENSORS, shuffled).read_bytes() == first
    other = {**TENSORS, "z.weight": TENSORS["z.weight"] + 1}
    assert write_checkpoint(tmp_path / f"three{suffix}", other, METADATA).read_bytes() != first


def test_safetensors_bytes_are_the_library_s(tmp_path):
    """The file is byte for byte what the library writes."""
    plain = {key: tensor.contiguous() for key, tensor in TENSORS.items()}
    ours = write_checkpoint(tmp_path / "c.safetensors", TENSORS, {"a": "ü\n"}).read_bytes()
    assert ours == safetensors.torch.save(plain, {"a": "ü\n"})
    assert ours != safetensors.torch.save(plain, {"a": "b"})


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_mode_obeys_the_umask(tmp_path, suffix):
    """A file is as readable as the umask says, not 0600."""
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            path = write_checkpoint(tmp_path / f"c{mask}{suffix}", TENSORS)
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_mode_obeys_the_umask_where_the_block_replaced_the_file(tmp_path):
    """A library that replaces the temporary file by one of mode 0600 does not change the result's mode."""
    with atomic_file(tmp_path / "out") as temporary:
        os.close(os.open(tmp_path / "theirs", os.O_CREAT | os.O_WRONLY, 0o600))
        (tmp_path / "theirs").replace(temporary)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o666 & ~current_umask()


def current_umask():
    """Read the process's umask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def failing(real, nth, error):
    """``real``, which raises ``error`` at its ``nth`` call."""
    calls = []

    def call(*args, **options):
        calls.append(args)
        if len(calls) == nth:
            raise error
        return real(*args, **options)

    return call


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("place", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_at_sync_or_rename_leaves_everything_as_it_was(tmp_path, monkeypatch, suffix, place, error):
    """The old file is whole, no temporary file is left, and the error is an OutputError (exit code 6)."""
    path = write_checkpoint(tmp_path / f"c{suffix}", {"old": torch.ones(2)})
    before = path.read_bytes()
    monkeypatch.setattr(os, place, failing(getattr(os, place), 1, error))
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as caught:
        write_checkpoint(path, TENSORS, overwrite=True)
    if expected is OutputError:
        assert caught.value.exit_code == 6
        assert "No space left" in str(caught.value)
        assert str(path) in str(caught.value)
    assert path.read_bytes() == before
    assert names(tmp_path) == [path.name]
    write_checkpoint(path, TENSORS, overwrite=True)
    assert path.read_bytes() != before


class FullDisk:
    """A stream that fails at its ``nth`` write."""

    def __init__(self, stream, nth, error):
        self.stream, self.write = stream, failing(stream.write, nth, error)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def __getattr__(self, name):
        return getattr(self.stream, name)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("nth", [1, 2, 5])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_at_a_write_leaves_everything_as_it_was(tmp_path, monkeypatch, suffix, nth, error):
    """A disk that fills at the first, second or fifth write changes nothing."""
    path = write_checkpoint(tmp_path / f"c{suffix}", {"old": torch.ones(2)})
    before, real = path.read_bytes(), Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args: FullDisk(real(self, *args), nth, error))
    with pytest.raises((OutputError, KeyboardInterrupt)) as caught:
        write_checkpoint(path, TENSORS, overwrite=True)
    if isinstance(error, OSError):
        assert isinstance(caught.value, OutputError)
        assert "No space left" in str(caught.value)
        assert str(path) in str(caught.value)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert names(tmp_path) == [path.name]


def test_a_full_disk_is_reported(tmp_path):
    """A real limit on the file's size ends in an OutputError and leaves nothing."""
    import resource
    import signal

    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    big = {"a": torch.zeros(100_000)}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        for suffix in SUFFIXES:
            with pytest.raises(OutputError, match="File too large"):
                write_checkpoint(tmp_path / f"c{suffix}", big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == []
    assert write_checkpoint(tmp_path / "c.pt", big).exists()


def test_an_error_of_the_block_passes_through_and_cleans_up(tmp_path):
    """Any other exception of a writer is the writer's own; nothing is left of its file."""
    with pytest.raises(ZeroDivisionError), atomic_file(tmp_path / "out") as temporary:  # noqa: PT012 - the block is what fails
        temporary.write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == []
    with atomic_file(tmp_path / "out") as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("whole")
    assert (tmp_path / "out").read_text() == "whole"


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    """Without ``overwrite`` the existing file is looked for again before the rename."""
    with pytest.raises(InputError, match="exists already"), atomic_file(tmp_path / "out") as temporary:  # noqa: PT012 - the block is what fails
        temporary.write_text("ours")
        (tmp_path / "out").write_text("theirs")
    assert (tmp_path / "out").read_text() == "theirs"
    assert names(tmp_path) == ["out"]


def test_the_input_is_never_replaced(tmp_path, monkeypatch):
    """Not under its name, a link's, a hard link's or another spelling, even with ``overwrite``."""
    source = write_checkpoint(tmp_path / "in.pt", TENSORS)
    before = source.read_bytes()
    (tmp_path / "sub").mkdir()
    (tmp_path / "soft.pt").symlink_to(source)
    (tmp_path / "hard.pt").hardlink_to(source)
    monkeypatch.chdir(tmp_path)
    for spelling in (source, "in.pt", "./sub/../in.pt", "soft.pt", "hard.pt"):
        with pytest.raises(InputError, match="the output is the input") as caught:
            write_checkpoint(spelling, TENSORS, overwrite=True, input_path=source)
        assert caught.value.exit_code == 2
    assert source.read_bytes() == before
    assert write_checkpoint("other.pt", TENSORS, input_path=source).exists()


def test_an_existing_file_needs_overwrite(tmp_path):
    """An existing file is refused with exit code 2 and the flag's name, and replaced with the flag."""
    path = write_checkpoint(tmp_path / "c.pt", TENSORS)
    with pytest.raises(InputError, match="--overwrite") as caught:
        write_checkpoint(path, TENSORS)
    assert caught.value.exit_code == 2
    assert write_checkpoint(path, {"n": torch.ones(1)}, overwrite=True) == path
    assert list(read_checkpoint(path).tensors) == ["n"]


def test_a_link_stays_and_its_file_is_written(tmp_path):
    """The file a link points to is replaced in its own folder; the link stays one."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link.pt").symlink_to(tmp_path / "real" / "c.pt")
    assert write_checkpoint(tmp_path / "link.pt", TENSORS) == tmp_path / "real" / "c.pt"
    write_checkpoint(tmp_path / "link.pt", {"n": torch.ones(1)}, overwrite=True)
    assert (tmp_path / "link.pt").is_symlink()
    assert list(read_checkpoint(tmp_path / "real" / "c.pt").tensors) == ["n"]


def test_targets_that_cannot_be_written_are_refused_before_computing(tmp_path, monkeypatch):
    """Directories and devices end with exit code 2; missing, unwritable or impossible folders with 6."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    assert check_target(tmp_path / "new.pt") == tmp_path / "new.pt"
    for bad in (tmp_path, f"{tmp_path}/", f"{tmp_path}/new.pt/", "/dev/null", tmp_path / "loop.pt", "a\0b"):
        with pytest.raises(InputError):
            check_target(bad, overwrite=True)
    for bad in (tmp_path / "no" / "c.pt", tmp_path / "file" / "c.pt", "/proc/c.pt", tmp_path / ("x" * 300)):
        with pytest.raises(OutputError) as caught:
            check_target(bad)
        assert caught.value.exit_code == 6
        assert "c.pt" in str(caught.value) or "xxx" in str(caught.value)
    monkeypatch.setattr(atomic.os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="read-only"):
        check_target(tmp_path / "new.pt")
    assert names(tmp_path) == ["file", "loop.pt"]


@pytest.mark.parametrize(
    ("name", "tensors", "metadata", "text"),
    [
        ("c.bin", TENSORS, {}, "'.bin'|.bin is not known"),
        ("c", TENSORS, {}, "no suffix"),
        ("c.pt", {"a": torch.ones(2, dtype=torch.complex64)}, {}, "complex64"),
        ("c.pt", {"a": torch.ones(2).to_sparse()}, {}, "sparse"),
        ("c.safetensors", {"__metadata__": torch.ones(2)}, {}, "__metadata__"),
        ("c.safetensors", {"\ud800": torch.ones(2)}, {}, "Unicode"),
        ("c.pt", TENSORS, {"a": 1}, "not text"),
    ],
)
def test_what_neither_format_gives_back_is_refused(tmp_path, name, tensors, metadata, text):
    """Unknown suffixes, names, dtypes and metadata are refused, and nothing is written."""
    with pytest.raises(InputError, match=text):
        write_checkpoint(tmp_path / name, tensors, metadata)
    assert names(tmp_path) == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_odd_names_work(tmp_path, suffix):
    """Spaces, newlines, other scripts and names of 255 bytes are file names like others."""
    for stem in ("a b", "line\nbreak", "重み", "x" * (255 - len(suffix))):
        assert set(read_checkpoint(write_checkpoint(tmp_path / f"{stem}{suffix}", TENSORS)).tensors) == set(TENSORS)


MEASURE = """
import sys, torch, safetensors.torch
from reptool.checkpoint.read import read_checkpoint
from reptool.checkpoint.write import write_checkpoint

def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

def peak(action):
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = kilobytes("VmRSS")
    value = action()
    return value, 1024 * (kilobytes("VmHWM") - before)

read, used = peak(lambda: read_checkpoint(sys.argv[1]))
copies, copied = peak(lambda: [tensor.clone() for tensor in read.tensors.values()])
_, written = peak(lambda: write_checkpoint(sys.argv[2], read.tensors))
print(used, written, copied)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's reset of the memory peak")
@pytest.mark.parametrize(("suffix", "bound"), [(".safetensors", 0.1), (".pt", 1.15)])
def test_memory_of_reading_and_writing(tmp_path, suffix, bound):
    """Reading peaks at 1.15 times the file; writing, and reading that again, at a tenth, of a .pt file at its size.

    A copy is seen by the same measure.
    """
    size = 100_000_000
    source = write_checkpoint(tmp_path / f"in{suffix}", {f"{i}.weight": torch.ones(size // 40) for i in range(10)})
    command = [sys.executable, "-c", MEASURE, str(source), str(tmp_path / f"out{suffix}")]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    used, written, copied = (int(word) / size for word in output.stdout.split())
    assert used < 1.15
    assert written < bound
    assert copied > 0.9


def test_tied_tensors_are_written_to_both_formats(tmp_path):
    """Two names on one storage are two tensors in the file."""
    weight = torch.ones(3)
    for suffix in SUFFIXES:
        read = read_checkpoint(write_checkpoint(tmp_path / f"c{suffix}", {"a": weight, "b": weight}))
        assert torch.equal(read.tensors["a"], read.tensors["b"])
