"""``reptool fuse`` and ``inspect`` on files with RepMLP's blocks, whose windows a file does not carry."""

from __future__ import annotations

import json
from collections import Counter

import golden_vectors
from safetensors.torch import load_file, save_file


def test_command_fuses_blocks_of_a_known_network(reptool, tmp_path):
    """--blocks-only asks for no network: the file is the published deploy form, and a second run is refused."""
    golden = golden_vectors.load("repmlpnet-net-32x48")
    save_file(golden.train, tmp_path / "n.safetensors")
    result = reptool("fuse", "n.safetensors", "--blocks-only")
    assert result.code == 2
    assert "can be read in 12 ways, 8x12 and 12x8 among them" in result.err
    assert not result.new
    said = "repmlpnet=8x12,4x6,2x3"
    result = reptool("fuse", "n.safetensors", "--assume", said, "--report", "r.json", "-v")
    assert result.code == 0, result.err
    assert "5 repmlpnet (official)" in result.out
    assert {k: t.shape for k, t in load_file("n.fused.safetensors").items()} == {
        k: t.shape for k, t in golden.deploy.items()
    }
    rows = json.loads((tmp_path / "r.json").read_text("utf-8"))["blocks"]
    assert Counter(row["family"] for row in rows) == {"repmlpnet": 5}
    assert '{"repmlpnet (official)": 5}' in reptool("inspect", "n.fused.safetensors").out
    assert reptool("fuse", "n.fused.safetensors", "--blocks-only", "-o", "again.safetensors").code == 4
    save_file(golden.deploy, tmp_path / "theirs.safetensors")
    result = reptool("fuse", "theirs.safetensors", "--blocks-only")
    assert (result.code, result.new) == (4, ())
    assert "already fused: 5 blocks in deploy form" in result.err


def test_inspect_counts_blocks(reptool, tmp_path):
    """What is in a file of a network that is not known."""
    save_file(
        {f"x.{k}": t for k, t in golden_vectors.load("repmlpv1-c4-parts").train.items()}, tmp_path / "b.safetensors"
    )
    assert "repmlp (global perceptron) 1, repmlp (official) 1" in " ".join(
        reptool("inspect", "b.safetensors").out.split()
    )
