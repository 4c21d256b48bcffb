"""The tools report a planted offence, and the repository names no machine of ours."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent

SKIPPED = {
    ".git",
    ".venv",
    ".ruff_cache",
    ".mypy_cache",
    ".pytest_cache",
    ".hypothesis",
    "__pycache__",
    "build",
    "dist",
    "demo",
}
LOCAL = re.compile(
    r"(?<![\w.:/*<])/(?:work|root|home|opt|Users)/\w|file:///|download\.pytorch\.|files\.pythonhosted|\bpypi\."
)
"""A folder of one machine, or the host of a package index."""


def tool(name: str, *arguments: str, source: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a development tool as the Makefile does, in the repository."""
    return subprocess.run(
        [TOOLS / name, *arguments], cwd=ROOT, input=source, check=False, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ('"""A module."""\n\nimport os\n', "F401"),
        ('"""A module."""\n\n\ndef public(x: int) -> int:\n    return x\n', "D103"),
        ('"""A module."""\n\n\ndef public(x):\n    """Doc."""\n    return x\n', "ANN001"),
        (
            '"""A module."""\n\n\ndef f(x: int) -> int:\n    """Doc."""\n'
            + "".join(f"    if x == {i}:\n        x += {i}\n" for i in range(20, 34))
            + "    return x\n",
            "C901",
        ),
    ],
    ids=["unused import", "no docstring", "no annotation", "too complex"],
)
def test_the_linter_is_on(source: str, code: str) -> None:
    """Each planted offence is reported under the package's own configuration."""
    done = tool("ruff", "check", "--no-cache", "--stdin-filename", "reptool/planted.py", "-", source=source)
    assert done.returncode == 1
    assert code in done.stdout


def test_the_linter_accepts_clean_code() -> None:
    """A complaint comes from the offence, not from the way the linter is called."""
    source = '"""A module."""\n\n\ndef public(x: int) -> int:\n    """Doc."""\n    return x\n'
    done = tool("ruff", "check", "--no-cache", "--stdin-filename", "reptool/planted.py", "-", source=source)
    assert done.returncode == 0, done.stdout


def test_the_formatter_is_on() -> None:
    """A file that is not formatted is reported."""
    done = tool(
        "ruff", "format", "--check", "--no-cache", "--stdin-filename", "reptool/planted.py", "-", source="x = {  }\n"
    )
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("source", "code"),
    [
        ("def f(x: int) -> str:\n    return x\n", "return-value"),
        ("def f(x):\n    return x\n", "no-untyped-def"),
        ("def f(x: int) -> int:\n    if isinstance(x, int):\n        return x\n    return 0\n", "unreachable"),
    ],
    ids=["wrong type", "no annotation", "unreachable"],
)
def test_the_type_checker_is_strict(source: str, code: str, tmp_path: Path) -> None:
    """Each planted offence is reported under the package's own configuration."""
    planted = tmp_path / "planted.py"
    planted.write_text(source, "utf-8")
    done = tool("mypy", "--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path), str(planted))
    assert done.returncode == 1
    assert f"[{code}]" in done.stdout


def text_files() -> list[Path]:
    """Every text file that belongs to the repository."""
    suffixes = {".py", ".md", ".toml", ".txt", ".cfg", ".yml", ".yaml", ".json", ""}
    inside = (path for path in ROOT.rglob("*") if not SKIPPED & set(path.relative_to(ROOT).parts))
    return [path for path in inside if path.is_file() and path.suffix in suffixes and "egg-info" not in str(path)]


def test_no_file_names_a_machine_of_ours() -> None:
    """No absolute folder of a developer's machine and no host of a package index stands in the repository."""
    found = []
    for path in text_files():
        if path == Path(__file__):
            continue
        lines = path.read_bytes().decode("utf-8", "replace").splitlines()
        found += [
            f"{path.relative_to(ROOT)}:{n}: {line.strip()[:120]}"
            for n, line in enumerate(lines, 1)
            if LOCAL.search(line)
        ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("line", "local"),
    [
        ("path = '/home/me/reptool'", True),
        ("cp /root/x .", True),
        ("--find-links file:///opt/wheels", True),
        ("https://files.pythonhosted.org/x", True),
        ("see https://example.org/home/page", False),
        ("tests/work/x", False),
        ("/usr/bin and /etc/passwd", False),
    ],
)
def test_the_pattern_knows_a_machine(line: str, local: bool) -> None:
    """The search finds what it is for, and nothing else."""
    assert bool(LOCAL.search(line)) is local


def test_pins_agree_with_the_package() -> None:
    """Every dependency of the package and its extras is pinned in a requirements file."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *(w for extra in project["optional-dependencies"].values() for w in extra)]
    names = {re.split(r"[<>=\[ ]", w, maxsplit=1)[0] for w in wanted} - {"reptool"}
    pins = "".join((ROOT / f"requirements{kind}.txt").read_text("utf-8") for kind in ("", "-peers"))
    pinned = set(re.findall(r"^([\w-]+)==[\w.]+$", pins, re.MULTILINE))
    assert names <= pinned
    assert "torch==2.13.0\n" in pins


@pytest.mark.peers
def test_timm_is_there_without_torchvision() -> None:
    """The stand-ins let timm build and reparameterise a network, in a process of its own."""
    code = (
        "import peers; timm = peers.import_timm(); from timm.utils.model import reparameterize_model as r;"
        "m = timm.create_model('repvgg_a0').eval(); print(*(sum(p.numel() for p in n.parameters()) for n in (m, r(m))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["9108968", "8309384"]


def test_missing_timm_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without timm, the error says how to install it."""
    import peers

    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(RuntimeError, match=r"timm is not installed; run `make test`"):
        peers.import_timm()
