"""The pipeline of today, written as its users write it: timm, torch.onnx.export, onnxsim, one comparison.

python benchmarks/peer.py NAME CHECKPOINT OUTPUT; or --make NAME CHECKPOINT to make a checkpoint for both sides.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from peers import import_timm

timm = import_timm()


def make(name: str, path: str) -> None:
    """Save a network whose activations keep their scale, as trained ones do, and whose statistics are not fresh."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_(0, 0.3)
            norm.momentum = None  # the mean over the batches
        model.train()
        for _ in range(4):
            model(torch.randn(8, 3, 96, 96))
    torch.save({"state_dict": model.state_dict()}, path)


def convert(name: str, checkpoint: str, output: str) -> dict[str, float]:
    """Fuse, export, simplify, compare once; seconds of each step."""
    clock = [time.perf_counter()]
    model = timm.create_model(name)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    clock.append(time.perf_counter())
    model = timm.utils.reparameterize_model(model.eval())
    clock.append(time.perf_counter())
    image = torch.randn(2, 3, 224, 224)
    dynamic = ({0: torch.export.Dim("batch")},)
    program = torch.onnx.export(model, (image,), dynamic_shapes=dynamic, opset_version=20, verbose=False)
    program.save(output, external_data=False)
    clock.append(time.perf_counter())
    import onnx  # noqa: PLC0415  # where a script of today has it
    import onnxsim  # noqa: PLC0415

    simplified, _ = onnxsim.simplify(onnx.load(output))
    onnx.save(simplified, output)
    clock.append(time.perf_counter())
    import onnxruntime  # noqa: PLC0415

    session = onnxruntime.InferenceSession(output, providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: image.numpy()})[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), model(image), rtol=1e-3, atol=1e-3)
    clock.append(time.perf_counter())
    names = ("build and load", "reparameterize", "torch.onnx.export", "onnxsim", "compare")
    return {n: b - a for n, a, b in zip(names, clock, clock[1:], strict=False)}


if __name__ == "__main__":
    if sys.argv[1] == "--make":
        make(*sys.argv[2:])
    else:
        print(json.dumps(convert(*sys.argv[1:])))
