"""``reptool fuse``: what it writes, what it says, and how it refuses."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import golden_vectors
import pytest
import torch
from checkpoint.narrow import state
from safetensors import safe_open
from torch import nn

from reptool.checkpoint import convert as convert_module
from reptool.checkpoint.write import write_checkpoint

FUSED = "c.fused.safetensors"


def explained(result, code, *texts):
    """Check that a command failed as documented: the code, four-part message, no traceback, nothing written."""
    assert result.code == code, result
    assert "reptool: error: " in result.err or code == 2
    assert "Traceback" not in result.out + result.err
    assert result.new == ()
    for text in texts:
        assert text in result.err, result.err


@pytest.mark.parametrize("name", ["c.safetensors", "c.pth"])
def test_checkpoint_is_fused(name, reptool, here):
    """A fused file appears beside the input, says what it is, and the next command is printed last."""
    here(name)
    result = reptool("fuse", name)
    assert result.code == 0, result.err
    assert result.new == (FUSED,)
    assert "equivalent (quick)" in result.out
    assert "5 of 5 regions proved" in result.out
    assert result.out.strip().endswith(f"next  reptool export {FUSED} --format onnx")
    with safe_open(FUSED, "pt") as file:
        assert "stage1.0.rbr_reparam.weight" in file.keys()  # noqa: SIM118 - not a mapping
        assert json.loads(file.metadata()["reptool.verdict"])["passed"] is True


def test_json_is_all_of_stdout(reptool, here):
    """--json prints one object with a schema_version, and nothing else, on stdout."""
    result = reptool("fuse", here("c.safetensors"), "--json")
    value = json.loads(result.out)
    assert value["schema_version"] == 1
    assert value["verdict"]["passed"] is True
    assert len(value["blocks"]) == 5


def test_verbose_lists_the_regions(reptool, here):
    """-v prints one line a region."""
    assert "rbr_dense.conv" in reptool("fuse", here("c.safetensors"), "-v").out


def test_output_suffix_chooses_the_format(reptool, here):
    """-o writes where it is told, in torch's format if the name asks for it."""
    result = reptool("fuse", here("c.safetensors"), "-o", "f.pt")
    assert (result.code, result.new) == (0, ("f.pt",))
    assert "stage0.rbr_reparam.bias" in torch.load("f.pt", weights_only=True)["state_dict"]


class Planted:
    """Pickles as a call that leaves a file."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def empty(path):
    """Write nothing."""
    path.write_bytes(b"")


def text(path):
    """Write prose."""
    path.write_text("this is no checkpoint\n" * 20)


def truncated(path):
    """Write a checkpoint without its end."""
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:-2000])


def saved(change):
    """Write the narrow network's tensors after a change."""

    def write(path):
        tensors = state()
        change(tensors)
        torch.save(tensors, path)

    return write


def assign(key, index, value):
    """Set one entry of a tensor."""

    def change(tensors):
        tensors[key].view(-1)[index] = value

    return saved(change)


KERNEL, VARIANCE = "stage2.0.rbr_dense.conv.weight", "stage2.0.rbr_1x1.bn.running_var"
BAD = {
    "missing": (lambda path: None, ["c.pt"]),
    "empty": (empty, ["empty"]),
    "text": (text, ["c.pt"]),
    "truncated": (truncated, ["c.pt"]),
    "no state": (lambda path: torch.save({"epoch": 3}, path), ["no state_dict found", "epoch"]),
    "unknown": (
        lambda path: torch.save({"features.0.weight": torch.zeros(4, 3, 3, 3)}, path),
        ["nearest is repvgg_a0", "only in the file: features.0.weight", "only in repvgg_a0: stage0."],
    ),
    "shape": (saved(lambda t: t.update({VARIANCE: torch.ones(3)})), [f"{VARIANCE} is (3,), not (8,)"]),
    "missing key": (saved(lambda t: t.pop(VARIANCE)), [f"missing: {VARIANCE}"]),
    "unexpected key": (saved(lambda t: t.update(extra=torch.ones(3))), ["unexpected: extra"]),
    "NaN": (assign(KERNEL, 5, float("nan")), ["NaN", KERNEL, "1 NaN"]),
    "infinite": (assign(KERNEL, 5, float("inf")), ["infinite", KERNEL, "1 infinite"]),
    "negative variance": (assign(VARIANCE, 3, -0.5), ["negative running variance", f"{VARIANCE}, channel 3: -0.5"]),
    "integer weights": (saved(lambda t: t.update({KERNEL: t[KERNEL].int()})), ["not floating point", KERNEL]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case, reptool, tmp_path):
    """Exit 2, the place named, no traceback and no file."""
    write, texts = BAD[case]
    write(tmp_path / "c.pt")
    explained(reptool("fuse", "c.pt"), 2, "reptool: error: ", *texts)


def test_foreign_pickle_is_refused_and_not_run(reptool, tmp_path):
    """A file that asks for code ends with exit 3, the global named, and nothing executed."""
    torch.save({"state_dict": state(), "hook": Planted()}, tmp_path / "c.pt")
    explained(reptool("fuse", "c.pt"), 3, "posix.system")
    assert not (tmp_path / "executed").exists()


def test_fused_input_is_refused(reptool, here):
    """Nothing to fuse is exit 4, with the command that comes next."""
    here(FUSED)
    explained(reptool("fuse", FUSED), 4, "in deploy form already", f"reptool export {FUSED}")


def test_existing_output_stays(reptool, here, tmp_path):
    """An existing file is replaced with --overwrite only; the input never."""
    here("c.safetensors")
    (tmp_path / FUSED).write_text("mine")
    explained(reptool("fuse", "c.safetensors"), 2, "exists already", "--overwrite")
    assert (tmp_path / FUSED).read_text() == "mine"
    assert reptool("fuse", "c.safetensors", "--overwrite").code == 0
    before = (tmp_path / "c.safetensors").read_bytes()
    explained(reptool("fuse", "c.safetensors", "-o", "./c.safetensors", "--overwrite"), 2, "the output is the input")
    assert (tmp_path / "c.safetensors").read_bytes() == before


def test_missing_and_read_only_folders(reptool, here, tmp_path):
    """An output that cannot be written is exit 6, before anything is computed."""
    here("c.safetensors")
    explained(reptool("fuse", "c.safetensors", "-o", "none/f.safetensors"), 6, "there is no folder")
    (tmp_path / "locked").mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    if os.geteuid():
        explained(reptool("fuse", "c.safetensors", "-o", "locked/f.safetensors"), 6, "could not be written")


def test_read_only_folder(reptool, here, monkeypatch):
    """A folder in which no file can be made is exit 6, whoever runs the test."""
    here("c.safetensors")
    from reptool.checkpoint import atomic

    def refuse(folder):
        raise PermissionError(f"the folder {folder} is read-only")

    monkeypatch.setattr(atomic, "_try_folder", refuse)
    explained(reptool("fuse", "c.safetensors"), 6, "could not be written", "read-only")


def test_unknown_model_names_the_nearest(reptool, here):
    """A misspelt -m gets the nearest name; a wrong one the keys that differ."""
    here("c.safetensors")
    explained(reptool("fuse", "c.safetensors", "-m", "repvg_a0"), 2, "no model is called 'repvg_a0'", "'repvgg_a0'")
    explained(reptool("fuse", "c.safetensors", "-m", "repvgg_a0"), 2, "the checkpoint is not a repvgg_a0")


def test_strict_refuses_what_is_inconclusive(reptool, here, monkeypatch):
    """Where rounding hides everything, --strict is exit 5 and nothing is written; without it the file is."""
    from reptool.proof import endtoend

    here("c.safetensors")
    monkeypatch.setattr(endtoend, "RESOLUTION", 0.0)
    explained(reptool("fuse", "c.safetensors", "--strict"), 5, "inconclusive end to end")
    result = reptool("fuse", "c.safetensors")
    assert (result.code, result.new) == (0, (FUSED,))
    assert "inconclusive (quick)" in result.out


def test_a_wrong_result_is_not_written(reptool, here, monkeypatch):
    """A fault in the fused weights is exit 1, and there is no file."""
    real = convert_module._fuse_all

    def faulty(*given):
        tensors, proofs, merged = real(*given)
        tensors["stage2.0.rbr_reparam.bias"] = tensors["stage2.0.rbr_reparam.bias"] + 0.01
        return tensors, proofs, merged

    here("c.safetensors")
    monkeypatch.setattr(convert_module, "_fuse_all", faulty)
    explained(reptool("fuse", "c.safetensors"), 1, "is not equal to the original")


def test_eps_is_an_option(reptool, here):
    """--eps gives other weights, travels in the file, and must be positive."""
    here("c.safetensors")
    assert reptool("fuse", "c.safetensors", "--eps", "1e-3").code == 0
    with safe_open(FUSED, "pt") as file:
        assert file.metadata()["reptool.eps"] == "0.001"
    assert reptool("verify", "c.safetensors", FUSED).code == 1
    assert reptool("verify", "c.safetensors", FUSED, "--eps", "1e-3").code == 0
    assert reptool("fuse", "c.safetensors", "--eps", "0").code == 2


def test_half_precision(reptool, tmp_path):
    """A half-precision checkpoint is fused in its own dtype, and verified with its own rounding noise."""
    write_checkpoint(
        tmp_path / "c.safetensors", {k: v.half() if v.is_floating_point() else v for k, v in state().items()}
    )
    assert reptool("fuse", "c.safetensors").code == 0
    with safe_open(FUSED, "pt") as file:
        assert file.get_tensor("stage0.rbr_reparam.weight").dtype == torch.float16
    result = reptool("verify", "c.safetensors", FUSED)
    assert result.code == 0, result.out + result.err


@pytest.fixture
def unknown(tmp_path):
    """A checkpoint of a network that is not known, with two blocks of different families in it."""
    tensors = {"anchors": torch.ones(3)}
    for prefix, name in (("backbone.0", "mobileone-dw-m4"), ("neck.1", "yolov7-repconv")):
        tensors |= {f"{prefix}.{k}": t for k, t in golden_vectors.load(name).train.items()}
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "d.pt")
    return tensors


def test_blocks_of_an_unknown_network_are_fused(reptool, unknown):
    """The blocks are fused and proved; what is not known, and which eps was taken, is said, in the file too."""
    result = reptool("fuse", "d.pt")
    assert (result.code, result.new) == (0, ("d.fused.safetensors",)), result.err
    for text in ("not known; only its blocks", "2 of 2 regions proved", "end to end: not possible"):
        assert text in result.out
    assert "0.001 for repvgg (yolov7)" in result.err
    with safe_open("d.fused.safetensors", "pt") as file:
        assert set(file.keys()) == {
            "anchors",
            *(f"backbone.0.reparam_conv.{p}" for p in ("weight", "bias")),
            *(f"neck.1.rbr_reparam.{p}" for p in ("weight", "bias")),
        }
        text = file.metadata()
    assert (text["reptool.architecture"], text["reptool.form"]) == ("unknown", "blocks")
    assert json.loads(text["reptool.verdict"])["end_to_end"] == []
    assert json.loads(text["reptool.blocks"]) == {"mobileone (official)": 1, "repvgg (yolov7)": 1}
    explained(reptool("fuse", "d.fused.safetensors"), 4, "d.fused.safetensors is already fused")
    assert "blocks" in reptool("inspect", "d.fused.safetensors").out


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module."])
def test_an_unknown_class_keeps_its_names(wrapper, reptool, unknown, tmp_path):
    """What a class may have in front of all its names stays in the file and the report; torch's wrappers go."""
    torch.save({f"{wrapper}model.{key}": tensor for key, tensor in unknown.items()}, tmp_path / "w.pt")
    result = reptool("fuse", "w.pt", "--report", "w.json")
    assert result.code == 0, result.err
    with safe_open("w.fused.safetensors", "pt") as file:
        assert "model.neck.1.rbr_reparam.weight" in file.keys()  # noqa: SIM118  # it is no mapping
        assert all(key.startswith("model.") for key in file.keys())  # noqa: SIM118
    blocks = json.loads((tmp_path / "w.json").read_text())["blocks"]
    assert {row["prefix"] for row in blocks} == {"model.backbone.0.", "model.neck.1."}
    explained(reptool("fuse", "w.fused.safetensors"), 4, "w.fused.safetensors is already fused")


def test_a_file_that_somebody_else_fused(reptool, tmp_path):
    """Blocks in deploy form are known without our metadata."""
    write_checkpoint(tmp_path / "d.safetensors", {f"b.{k}": t for k, t in golden_vectors.load("dbb-k3").deploy.items()})
    explained(reptool("fuse", "d.safetensors"), 4, "already fused: 1 blocks in deploy form")


def test_inspect_counts_the_blocks(reptool, unknown):
    """Of a network that is not known, the blocks are counted, and fusing them is the next command."""
    out = reptool("inspect", "d.pt").out
    assert "mobileone (official) 1, repvgg (yolov7) 1" in out
    assert "reptool fuse d.pt" in out


def test_unknown_network_in_json_and_verbose(reptool, unknown):
    """--json is all of stdout, and says that no network is known; -v lists the blocks."""
    value = json.loads(reptool("fuse", "d.pt", "--json").out)
    assert value["network"] is None
    assert [row["family"] for row in value["blocks"]]
    assert "rbr_conv.3.conv" in reptool("fuse", "d.pt", "-v", "--overwrite").out


def test_strict_wants_more_than_blocks(reptool, unknown):
    """Blocks alone are not everything that could be shown: exit 5, nothing written."""
    explained(reptool("fuse", "d.pt", "--strict", "--report", "r.json"), 5, "proved block by block, 2 of them")


def test_report_has_a_row_a_block(reptool, unknown, here):
    """--report writes one row a block, worst first, for networks known and unknown."""
    assert reptool("fuse", "d.pt", "--report", "d.json").new == ("d.fused.safetensors", "d.json")
    here("c.safetensors")
    assert reptool("fuse", "c.safetensors", "--report", "c.json").code == 0
    for name, network, count in (("d.json", None, 2), ("c.json", "repvgg", 5)):
        value = json.loads(Path(name).read_text())
        assert (value["network"], len(value["blocks"])) == (network, count)
        found = [row["error"] for row in value["blocks"]]
        assert found == sorted(found, reverse=True)
        fields = {"family", "implementation", "prefix", "fused", "shapes", "merged", "eps", "error", "spread", "saved"}
        fields |= {"taken"}
        assert all(row.keys() == fields for row in value["blocks"])


def test_report_of_a_network_of_ones_own(reptool, tmp_path):
    """What the graph engine fuses has a row a region."""
    (tmp_path / "reported_net.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n"
    )
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    write_checkpoint(tmp_path / "o.safetensors", network.state_dict())
    result = reptool("fuse", "o.safetensors", "-m", "reported_net:net", "--img-size", "8", "--report", "o.json")
    assert result.code == 0, result.err
    (row,) = json.loads((tmp_path / "o.json").read_text())["blocks"]
    assert sum(row["before"].values()) == 2
    assert sum(row["after"].values()) == 1
    assert row["error"] <= 1e-12


def test_report_keeps_the_rules_of_outputs(reptool, unknown, tmp_path):
    """A report replaces no file without --overwrite, and never the input; nothing is fused before that is known."""
    (tmp_path / "r.json").write_text("mine")
    explained(reptool("fuse", "d.pt", "--report", "r.json"), 2, "exists already")
    explained(reptool("fuse", "d.pt", "--report", "d.pt", "--overwrite"), 2, "the output is the input")
    assert (tmp_path / "r.json").read_text() == "mine"
    explained(reptool("fuse", "d.pt", "-o", "x.pt", "--report", "./x.pt"), 2, "cannot be the output and the report")


def test_blocks_only_asks_for_no_network(reptool, here):
    """Blocks of a network that lacks its classifier are fused when they are asked for alone."""
    tensors = {k: t for k, t in state().items() if not k.startswith("linear.")}
    write_checkpoint("headless.safetensors", tensors)
    explained(reptool("fuse", "headless.safetensors"), 2, "incomplete", "--blocks-only")
    result = reptool("fuse", "headless.safetensors", "--blocks-only")
    assert (result.code, result.new) == (0, ("headless.fused.safetensors",)), result.err
    assert "5 of 5 regions proved" in result.out
    here("c.safetensors")
    assert reptool("fuse", "c.safetensors", "--blocks-only").code == 0
    explained(reptool("fuse", "c.safetensors", "--blocks-only", "-m", "repvgg", "--overwrite"), 2, "-m names repvgg")


def test_readings_are_shown_and_chosen(reptool, tmp_path):
    """A block that can be read in several ways stops the command; --assume says which."""
    norms = {
        f"{n}.{p}": torch.rand(8) for n in ("rbr_dense.bn", "bn") for p in ("weight", "running_mean", "running_var")
    }
    kernels = {"rbr_dense.conv.weight": torch.randn(8, 8, 3, 3), "rbr_1x1.weight": torch.randn(8, 8, 1, 1)}
    write_checkpoint(tmp_path / "q.safetensors", {f"b.{k}": t for k, t in (kernels | norms).items()})
    explained(reptool("fuse", "q.safetensors"), 2, "can be read in 3 ways: v1, v2, plain", "--assume qarepvgg=v2")
    explained(reptool("fuse", "q.safetensors", "--assume", "qarepvgg=v9"), 2, "nothing is open about qarepvgg=v9")
    assert reptool("fuse", "q.safetensors", "--assume", "qarepvgg=v2").code == 0


def test_norms_of_plain_convolutions_are_folded_when_asked(reptool, tmp_path):
    """--fold-bn folds what leaves no doubt and lists the rest; --assume vouches for the rest; without either, nothing."""
    pairs = {"stem": (3, "conv", "bn"), "body": (8, "conv", "bn"), "head": (3, "conv1", "bn1")}
    tensors = {f"{p}.{conv}.weight": torch.randn(8, width, 3, 3) for p, (width, conv, _) in pairs.items()}
    for p, (_, _, norm) in pairs.items():
        tensors |= {f"{p}.{norm}.{part}": torch.rand(8) + 0.5 for part in ("running_mean", "running_var")}
    write_checkpoint(tmp_path / "p.safetensors", tensors)
    explained(reptool("fuse", "p.safetensors"), 2, "of no network known here")
    explained(reptool("fuse", "p.safetensors", "--blocks-only"), 2, "--fold-bn")
    explained(reptool("fuse", "p.safetensors", "--fold-bn", "-m", "repvgg"), 2, "-m names repvgg")
    result = reptool("fuse", "p.safetensors", "--fold-bn")
    assert (result.code, result.new) == (0, ("p.fused.safetensors",)), result.err
    assert "left as they were, 1 pairs: a kernel with as many inputs as outputs" in result.err
    assert "head.conv1" in result.err
    assert "1 fused: 1 conv_bn (conv, bn)" in result.out
    again = reptool("fuse", "p.fused.safetensors", "--fold-bn", "-o", "again.safetensors")
    explained(again, 4, "already fused")
    result = reptool("fuse", "p.safetensors", "--assume", "conv_bn=plain", "--overwrite", "--json")
    assert json.loads(result.out)["left"] == {}
    assert len(json.loads(result.out)["blocks"]) == 3
