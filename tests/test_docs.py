"""The documentation is true: its code runs, its commands and links exist, every law and exit code is listed."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from reptool import errors
from reptool.affine.rules import RULES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
COMMAND = re.compile(r"\breptool ([a-z]+)\b")


def code(language: str) -> list[tuple[str, str]]:
    """Every block of a language, with the page it stands on."""
    found = ((page, match) for page in PAGES for match in FENCE.finditer(page.read_text("utf-8")))
    return [(page.name, match[2]) for page, match in found if match[1] == language]


def commands() -> list[str]:
    """Every line of every shell block, without its comment."""
    lines = (line.partition("#")[0].strip() for _, block in code("sh") for line in block.splitlines())
    return [line for line in lines if line]


@cache
def help_of(*words: str) -> str:
    """What a command's help says; the empty text if there is no such command."""
    done = subprocess.run(
        [sys.executable, "-m", "reptool", *words, "--help"], check=False, capture_output=True, text=True
    )
    return done.stdout if done.returncode == 0 else ""


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


OTHERS = code("python")[1:]
"""Every Python block but the first, which has a test of its own."""


@pytest.mark.parametrize(("page", "block"), OTHERS, ids=[f"{p}-{i}" for i, (p, _) in enumerate(OTHERS, 1)])
def test_python_blocks_run(page: str, block: str, tmp_path: Path) -> None:
    """Every Python block runs as it stands, in an empty folder."""
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{page}: {done.stderr}"


def test_the_first_block_shows_the_whole_job(tmp_path: Path) -> None:
    """The README's first block ends by line 25, runs as it stands, prints a verdict and leaves an ONNX file."""
    block = code("python")[0][1]
    text = (ROOT / "README.md").read_text("utf-8")
    assert text[: text.index(block)].count("\n") + block.count("\n") < 25
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert "equivalent" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["repvgg_a0.onnx"]


def spoken(text: str) -> str:
    """What stands between backticks in a page, outside its blocks."""
    return "\n".join(re.findall(r"`([^`\n]+)`", FENCE.sub("", text)))


def test_commands_exist() -> None:
    """Every command a page names is there, and takes the options it is given."""
    texts = [*(spoken(page.read_text("utf-8")) for page in PAGES), *commands()]
    named = {name for text in texts for name in COMMAND.findall(text)}
    assert named >= {"fuse", "export", "verify", "run", "bench", "inspect", "models"}
    assert not [name for name in named if not help_of(name)]
    for line in commands():
        program, *words = line.split()
        if program == "reptool":
            options = [word for word in words if word.startswith("-")]
            assert not [option for option in options if option not in help_of(words[0])], line


def test_an_unknown_command_is_noticed() -> None:
    """The check of commands has teeth."""
    assert help_of("no-such-command") == ""
    assert "--no-such-option" not in help_of("fuse")


def test_make_targets_exist() -> None:
    """Every target a page names is in the Makefile, and `make` alone prints them."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = {name for line in commands() for name in re.findall(r"^make ([a-z]+)", line)}
    assert {"demo", "test", "check"} <= named <= targets
    done = subprocess.run(["make"], cwd=ROOT, check=True, capture_output=True, text=True)
    assert all(re.search(rf"^{name} ", done.stdout, re.MULTILINE) for name in ("demo", "test", "check", "bench"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    """Every link inside the repository leads to a file, and to a heading where it names one."""
    for target in LINK.findall(page.read_text("utf-8")):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_every_law_is_in_the_algebra() -> None:
    """The page of laws lists exactly the rules there are."""
    listed = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "algebra.md").read_text("utf-8"), re.MULTILINE)
    assert listed == [rule.name for rule in RULES]


def test_every_error_is_listed_with_its_exit_code() -> None:
    """The page of errors lists exactly the exceptions there are, and every code."""
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    listed = {name: int(number) for name, number in re.findall(r"^\| `(\w+Error)` \| (\d+) \|", text, re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind is not errors.ReptoolError]
    there = {kind.__name__: kind.exit_code for kind in kinds if issubclass(kind, errors.ReptoolError)}
    assert listed == there
    codes = {int(n) for row in re.findall(r"^\| ([\d, ]+) \|", text, re.MULTILINE) for n in row.split(",")}
    assert codes >= {0, *there.values(), 70, 130, 143}


def test_pages_stay_short() -> None:
    """The front page is read in a minute, the rules of the house in five."""
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 135  # twenty are the table of papers
    assert len((ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()) < 150


def table_rows(page: str, heading: str) -> list[list[str]]:
    """The cells of the rows of the table whose head begins so."""
    lines = (ROOT / page).read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start + 2 :])
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_zoo_page_lists_every_network_and_naming() -> None:
    """The page of the zoo names every family with its networks and blocks, and whose keys are recognised."""
    from reptool.checkpoint.networks import namings
    from reptool.models import family_of, list_models

    rows = {row[0].strip("`"): row for row in table_rows("docs/zoo.md", "| family |")}
    for names, column in ((list_models(), 2), (list_models(blocks=True), 3)):
        wanted = {family: {n for n in names if family_of(n) == family} for family in rows}
        assert {family: set(re.findall(r"`(\w+)`", row[column])) for family, row in rows.items()} == wanted
        assert sum(map(len, wanted.values())) == len(names)
    for naming in namings():
        assert naming.implementation in rows[naming.family][4].split(", ")


def test_every_example_of_the_papers_table_runs() -> None:
    """Each of the seventeen one-line examples of the README runs as it stands, and its networks exist."""
    from reptool.models import list_models

    rows = table_rows("README.md", "| paper | block |")
    assert len(rows) == 17
    given: dict[str, object] = {}
    exec(next(block for page, block in code("python") if page == "README.md" and "tokens, image" in block), given)  # noqa: S102
    for paper, example, networks in rows:
        result = eval(example.strip("`"), given)  # noqa: S307  # our own page
        assert hasattr(result, "shape"), paper
        assert set(re.findall(r"`(\w+)`", networks)) <= set(list_models())
