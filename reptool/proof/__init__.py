"""Proof before output: regions in float64, whole models against their own rounding noise."""

from reptool.proof.endtoend import (
    DITHER,
    check_end_to_end,
    compare,
    inputs_for,
    verify_models,
)
from reptool.proof.region import prove_region, stored_is_rounded
from reptool.proof.runs import dithered_run, float64_run
from reptool.proof.verdict import EndToEnd, RegionProof, Verdict

__all__ = [
    "DITHER",
    "EndToEnd",
    "RegionProof",
    "Verdict",
    "check_end_to_end",
    "compare",
    "dithered_run",
    "float64_run",
    "inputs_for",
    "prove_region",
    "stored_is_rounded",
    "verify_models",
]
