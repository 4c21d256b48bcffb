"""The rows of the coverage benchmark as a table for a terminal, and as Markdown."""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Table

Rows = list[dict[str, Any]]

COLUMNS = (
    "network",
    "px",
    "conv + norm + scale before",
    "reptool",
    "timm",
    "norms left",
    "scales left",
    "LN affines left",
    "GMAC",
    "M parameters",
    "error",
    "latency ratio",
    "capture s",
    "fuse s",
    "proof s",
    "proof %",
    "marks",
)
LEGEND = (
    "conv + norm + scale: operators that run in one forward pass, as convolutions + batch norms + multiplications or "
    "additions of one constant a channel. norms left and scales left: of these, in the fused network. LN affines left: "
    "layer norms called with a weight, before -> after. GMAC, M parameters: before -> after; where nothing changed, once. "
    "error: largest difference of the two forms over the largest score, in float64. latency ratio: fused over unfused in "
    "onnxruntime on one thread, with its 95 % interval. proof %: proof over capture; all "
    "seconds on one thread, or as many as --threads says."
)


def cells(row: dict[str, Any]) -> list[str]:
    """One row as text, a cell a column."""
    figures = row["figures"]
    kinds = ", ".join(dict.fromkeys(mark.partition(":")[0] for mark in row["marks"]))
    if figures is None:
        return [row["name"], *[""] * (len(COLUMNS) - 2), kinds]
    before, fused, timm, seconds = (figures[k] for k in ("before", "fused", "timm", "seconds"))
    return [
        row["name"],
        str(figures["size"]),
        _operators(before),
        _operators(fused),
        _operators(timm) if timm else "",
        str(fused["batch_norm"]),
        str(fused["scale"] + fused["shift"]),
        _change(before["layer_norm_affine"], fused["layer_norm_affine"], "d", 1),
        _change(before["macs"], fused["macs"], ".3f", 1e9),
        _change(before["parameters"], fused["parameters"], ".2f", 1e6),
        f"{figures['error']:.0e}",
        _ratio(figures.get("latency")),
        *(f"{seconds[step]:.2f}" for step in ("capture", "fuse", "proof")),
        f"{100 * seconds['proof'] / seconds['capture']:.0f}",
        kinds,
    ]


def _operators(figures: dict[str, int]) -> str:
    return f"{figures['conv']} + {figures['batch_norm']} + {figures['scale'] + figures['shift']}"


def _change(before: float, after: float, form: str, unit: float) -> str:
    one, other = (format(value / unit if unit != 1 else value, form) for value in (before, after))
    return one if one == other else f"{one} -> {other}"


def _ratio(latency: dict[str, Any] | None) -> str:
    if not latency:
        return ""
    if "failed" in latency:
        return f"no file ({latency['failed']})"
    return f"{latency['ratio']:.2f} [{latency['low']:.2f}, {latency['high']:.2f}]"


def remarks(rows: Rows) -> list[str]:
    """Every mark in full, with its network."""
    return [f"{row['name']}: {mark}" for row in rows for mark in row["marks"]]


def reasons(rows: Rows) -> dict[str, Counter[tuple[str, str]]]:
    """By network, how often each kind of operator was left for each reason; numbers in a reason are dropped."""
    found: dict[str, Counter[tuple[str, str]]] = {}
    for row in rows:
        left = row["figures"]["left"] if row["figures"] else []
        if left:
            said = [(one["kind"], _general("; ".join(one["why"]))) for one in left]
            found[row["name"]] = Counter(said)
    return found


def _general(reasons: str) -> str:
    """Reasons without the figures of this one case, each once."""
    plain = re.sub(r"(?<![\w.])\d[\d.]*(?:e[-+]?\d+)?(?!\w)", "N", reasons)
    return "; ".join(sorted(set(plain.split("; "))))


def summary(rows: Rows) -> str:
    """How many networks were measured, and how many of their norms are gone."""
    measured = [row["figures"] for row in rows if row["figures"]]
    before, after = (sum(f[form]["batch_norm"] for f in measured) for form in ("before", "fused"))
    done = sum(f["before"]["batch_norm"] > 0 == f["fused"]["batch_norm"] for f in measured)
    having = sum(f["before"]["batch_norm"] > 0 for f in measured)
    marked = sum(bool(row["marks"]) for row in rows)
    return (
        f"{len(measured)} of {len(rows)} networks measured. {before - after} of {before} batch norms are fused; of {having} "
        f"networks that have some, {done} have none left. {marked} rows are marked."
    )


def print_rows(rows: Rows) -> None:
    """The table, the reasons and the marks on standard output."""
    table = Table(title="Coverage of public architectures", show_lines=False)
    for index, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if index in {0, len(COLUMNS) - 1} else "right", no_wrap=index == 0)
    for row in rows:
        table.add_row(*cells(row), style="red" if row["marks"] else None)
    console = Console()
    if not console.is_terminal:
        console = Console(width=240)
    console.print(table)
    console.print(LEGEND)
    for name, counted in reasons(rows).items():
        for (kind, why), count in counted.most_common():
            console.print(f"{name}: {count} {kind} left: {why}", markup=False, highlight=False)
    for text in remarks(rows):
        console.print(text, style="red", markup=False, highlight=False)
    console.print(summary(rows))


def markdown(rows: Rows) -> str:
    """The table, the reasons and the marks for the documentation."""
    packages = ", ".join(f"{p} {version(p)}" for p in ("torch", "timm", "torchvision", "onnxruntime"))
    lines = [
        "# Coverage of public architectures",
        "",
        f"Made by `make coverage` with {packages}.",
        "",
        summary(rows),
        "",
    ]
    lines += [LEGEND, "", _line(COLUMNS), _line(["---"] * len(COLUMNS))]
    lines += [_line(cells(row)) for row in rows]
    lines += ["", "## What is left, and why", "", _line(("network", "left", "kind", "reason")), _line(["---"] * 4)]
    for name, counted in reasons(rows).items():
        lines += [_line((name, str(count), kind, why)) for (kind, why), count in counted.most_common()]
    lines += ["", "## Marks", "", *([f"- {text}" for text in remarks(rows)] or ["None."]), ""]
    return "\n".join(lines)


def _line(items: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(item.replace('|', chr(92) + '|') for item in items)} |"
