"""The house: who may import whom, what an import costs, how large a file may grow, and which names are public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import reptool

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "reptool"

ANYTHING = frozenset({"*"})
ALLOWED: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "affine": frozenset({"errors"}),
    "models": frozenset({"errors"}),
    "runtime": frozenset({"errors"}),
    "proof": frozenset({"errors", "affine.operators"}),
    "graph": frozenset({"errors", "affine"}),
    "testing": frozenset({"errors", "affine"}),
    "parts": frozenset({"errors", "graph"}),
    "fusion": frozenset({"errors", "affine", "graph", "proof", "parts", "report.fusion"}),
    "checkpoint": frozenset({"errors", "affine", "graph", "proof", "models", "fusion"}),
    "formats": frozenset({"errors", "affine", "graph", "proof", "checkpoint.atomic"}),
    "public": frozenset({"errors", "checkpoint", "formats", "fusion", "models", "proof"}),
    "report": frozenset({"errors", "proof"}),
    "commands": ANYTHING,
    "cli": ANYTHING,
    "__main__": ANYTHING,
    "__init__": ANYTHING,
    "_version": frozenset(),
}
"""What each part may import of the others, by its dotted name below ``reptool``; ``_version`` is free for all."""

HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "safetensors", "PIL", "rich", "hypothesis")
PUBLIC = {"__version__", "create_model", "export", "fuse", "list_models", "load", "save", "verify"}

FILE_LINES, FUNCTION_LINES, PUBLIC_NAMES = 300, 60, 18


def imports(source: str, part: str) -> list[tuple[int, str]]:
    """What of the other parts a source text imports: line and dotted name below ``reptool``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: a relative import"
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "reptool" else [str(node.module)]
        else:
            continue
        found += [(node.lineno, name.removeprefix("reptool.")) for name in names if name.startswith("reptool.")]
    return [(line, name) for line, name in found if name.partition(".")[0] not in (part, "_version")]


def offences(source: str, part: str) -> list[tuple[int, str]]:
    """The imports of a source text that its part is not allowed."""
    allowed = ALLOWED[part]
    return [
        (line, name)
        for line, name in imports(source, part)
        if "*" not in allowed and not any(name == a or name.startswith(f"{a}.") for a in allowed)
    ]


def sources() -> list[Path]:
    """Every module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the house a module belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_part_may(path: Path) -> None:
    """Imports run one way."""
    found = offences(path.read_text("utf-8"), part_of(path))
    assert not found, "\n".join(f"{path}:{line} imports reptool.{name}" for line, name in found)


def test_every_part_has_its_edges() -> None:
    """A new part of the house is entered in the table before it imports anything."""
    assert {part_of(path) for path in sources()} <= set(ALLOWED)


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("proof", "from reptool.affine.rules import RULES"),
        ("proof", "from reptool.affine import operators"),
        ("affine", "import reptool.graph.read"),
        ("models", "from reptool import fuse"),
        ("runtime", "def f():\n    from reptool.proof import compare"),
        ("formats", "from reptool.checkpoint.read import read_checkpoint"),
        ("graph", "from reptool.models import create_model"),
        ("errors", "if False:\n    from reptool.affine.operators import Conv"),
    ],
)
def test_a_forbidden_import_is_found(part: str, source: str) -> None:
    """The check has teeth: each planted import is reported, wherever in the module it stands."""
    assert len(offences(source, part)) == 1


def test_an_allowed_import_is_no_offence() -> None:
    """The check does not cry wolf."""
    text = "import torch\nfrom reptool._version import __version__\nfrom reptool.affine.operators import run\n"
    assert offences(text, "proof") == []


@pytest.mark.parametrize("argument", ["", "--help", "fuse --help", "export --help", "run --help"])
def test_help_imports_nothing_heavy(argument: str) -> None:
    """Importing the package and printing any help page costs none of torch, numpy, onnx and their kind."""
    run = f"reptool.cli._code({argument.split()!r}, debug=False)" if argument else "None"
    first = "import reptool.cli" if argument else "import reptool"
    code = f"import sys; {first}; {run}; print('\\nloaded:', *[m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


def test_the_heavy_import_check_sees_torch() -> None:
    """The names that must not be loaded are those that are, once a command needs them."""
    code = "import sys, reptool; reptool.fuse; print(sorted({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "['numpy', 'torch']"


def test_no_model_converts_itself() -> None:
    """Fusing is one evaluation, never a method of a class."""
    forbidden = ("switch_to" + "_deploy", "reparameterize" + "(self", "convert_to" + "_deploy")
    files = [path for folder in ("reptool", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    found = [f"{path}: {word}" for path in files for word in forbidden if word in path.read_text("utf-8")]
    assert not found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    """A file fits in one reading and a function on one screen."""
    text = path.read_text("utf-8")
    assert len(text.splitlines()) <= FILE_LINES + 50 * (part_of(path) == "models")
    assert not too_long(text)


def too_long(source: str) -> list[str]:
    """The functions of a source text that exceed the budget."""
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= FUNCTION_LINES]


def test_a_long_function_is_found() -> None:
    """The size check has teeth."""
    assert too_long("def f():\n" + "    pass\n" * FUNCTION_LINES) == ["f"]
    assert too_long("def f():\n" + "    pass\n" * (FUNCTION_LINES - 1)) == []


def test_public_names() -> None:
    """The names of the front page are there, each resolves, and there are few of them."""
    assert set(reptool.__all__) >= PUBLIC
    assert len(reptool.__all__) <= PUBLIC_NAMES
    assert all(getattr(reptool, name) is not None for name in reptool.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = reptool.no_such_name


def test_a_public_function_is_not_hidden_by_a_part_of_the_same_name() -> None:
    """``reptool.verify`` and ``reptool.export`` are functions, also once the parts called so are imported."""
    code = "import reptool, reptool.proof.endtoend, reptool.formats.onnx; assert all(map(callable, (reptool.verify, reptool.export)))"
    subprocess.run([sys.executable, "-c", f"{code}; reptool.fuse; {code}"], cwd=ROOT, check=True)
