"""The commands `run` and `bench`: what they print for people and programs, and how they end."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner
from runtime.tiny import classifier, picture, recorded

from reptool.errors import InputError
from reptool.runtime import render
from reptool.runtime.commands import bench, run


def called(command, *arguments):
    """The result of a command, whose errors are those of the package or click's."""
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_table_has_one_line_per_class(colours, photos):
    """In a pipe each line has the image, the rank, the class, its name and its probability."""
    result = called(run, colours, photos, "-k", 1)
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["image", "rank", "class", "name", "probability"],
        [str(photos / "blue.png"), "1", "2", "blue", "0.5761"],
        [str(photos / "green.png"), "1", "1", "green", "0.5761"],
        [str(photos / "red.png"), "1", "0", "red", "0.5761"],
    ]
    assert result.stderr == ""


def test_json_is_pure(colours, photos):
    """Standard output is one JSON object with its schema, the model and every image."""
    found = json.loads(called(run, colours, photos, "--json").stdout)
    assert (found["schema_version"], found["failed"]) == (1, 0)
    assert found["model"]["path"] == str(colours)
    assert found["preprocess"]["size"] == [4, 4]
    assert [image["top"][0]["name"] for image in found["images"]] == ["blue", "green", "red"]
    assert sum(top["probability"] for top in found["images"][0]["top"]) == pytest.approx(1, rel=1e-15)


def test_csv_has_a_line_per_rank_and_failure(colours, photos):
    """CSV has every rank, and the reason of a failed image."""
    (photos / "x,y.png").write_bytes(b"no")
    result = called(run, colours, photos, "-k", 2, "--csv")
    lines = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [(line["rank"], line["name"]) for line in lines[:2]] == [("1", "blue"), ("2", "red")]
    assert lines[-1]["path"] == str(photos / "x,y.png")
    assert "not an image" in lines[-1]["error"]


def test_failed_images_end_in_an_error(colours, photos):
    """The others are printed, then an error names the failed images with their reasons; its exit code is 2."""
    (photos / "broken.png").write_bytes(b"no")
    result = called(run, colours, photos, "-q")
    assert isinstance(result.exception, InputError)
    assert result.exception.exit_code == 2
    assert "1 of 4 images failed" in str(result.exception)
    assert f"{photos / 'broken.png'}: not an image" in str(result.exception)
    assert "green" in result.stdout
    assert "failed: not an image" in result.stdout


def test_conversions_are_remarked(colours, tmp_path):
    """A conversion is a remark on standard error, and quiet silences it."""
    path = picture(tmp_path / "a.png", (255, 0, 0, 9), mode="RGBA")
    assert called(run, colours, path).stderr == f"note: {path}: transparency composited on white\n"
    assert called(run, colours, path, "-q").stderr == ""


def test_names_cannot_steer_the_terminal(tmp_path, photos):
    """Escape sequences and markup in names are shown, not obeyed."""
    names = json.dumps(["\x1b[2Jred", "[bold]green", "blue\nline"])
    path = classifier(tmp_path / "a.onnx", metadata=recorded(**{"reptool.classes": names}))
    text = called(run, path, photos, "-k", 1).stdout
    assert "\x1b" not in text
    for shown in (r"\x1b[2Jred", "[bold]green", r"blue\nline"):
        assert shown in text


def test_overrides_reach_the_model(colours, photos):
    """Size, mean, std, interpolation and crop go before what the file records."""
    options = ["--size", "8x6", "--mean", "3,0,0", "--std", "2", "--interpolation", "nearest", "--crop-pct", "0.5"]
    found = json.loads(called(run, colours, photos / "red.png", *options, "--json").stdout)
    assert found["preprocess"] == {
        "size": [8, 6],
        "mean": [3.0, 0.0, 0.0],
        "std": [2.0, 2.0, 2.0],
        "interpolation": "nearest",
        "crop_pct": 0.5,
        "channels": 3,
    }
    assert found["images"][0]["top"][0]["name"] == "green"


@pytest.mark.parametrize("text", ["r\ng\nb\n", '["r", "g", "b"]', "\ufeffr\r\ng\r\nb"])
def test_class_file(colours, photos, tmp_path, text):
    """Names are read one per line or as a JSON list."""
    (tmp_path / "names").write_text(text, "utf-8")
    found = called(run, colours, photos / "red.png", "--classes", tmp_path / "names", "--json")
    assert [top["name"] for top in json.loads(found.stdout)["images"][0]["top"]] == ["r", "g", "b"]


@pytest.mark.parametrize("data", [None, b"\xff\xfe\x00", b"", b"red\n\nblue\n", b"[1, 2, 3]", b"[1,"])
def test_damaged_class_file_is_refused(colours, photos, tmp_path, data):
    """A file of names that cannot be read is an error with its path."""
    path = tmp_path / "names"
    if data is not None:
        path.write_bytes(data)
    error = called(run, colours, photos, "--classes", path).exception
    assert isinstance(error, InputError)
    assert error.at == str(path)


USAGE = [
    (["--size", "big"], "'big' is not a number of pixels"),
    (["--size", "0"], "'0' is not a number of pixels"),
    (["--mean", "a,b"], "'a,b' is not one number per channel"),
    (["-k", "0"], "-k"),
    (["--json", "--csv"], "exclude each other"),
]


@pytest.mark.parametrize(("options", "message"), USAGE)
def test_wrong_usage_is_explained(colours, photos, options, message):
    """A wrong option ends with 2 and says what was wanted."""
    result = called(run, colours, photos, *options)
    assert result.exit_code == 2
    assert message in result.stderr


def test_errors_of_the_package_pass_through(tmp_path, photos):
    """A missing model and a directory without images are errors of the package."""
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ((tmp_path / "no.onnx", photos), "does not exist"),
        ((tmp_path / "no.onnx", tmp_path / "empty"), "no images"),
    ):
        error = called(run, *arguments).exception
        assert isinstance(error, InputError)
        assert message in str(error)


def test_bench_prints_a_table_and_json(colours):
    """Both forms have a row per number of threads and model."""
    options = ("--iterations", 3, "--warmup", 0, "--threads", 1, "--size", 8)
    lines = called(bench, colours, colours, *options).stdout.splitlines()
    assert lines[0].split()[:4] == ["model", "threads", "mean", "ms"]
    assert len(lines) == 3
    found = json.loads(called(bench, colours, colours, *options, "--json").stdout)
    assert (found["schema_version"], found["unit"], len(found["runs"])) == (1, "ms", 2)
    assert found["runs"][0]["ratio"] == 1.0


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        """Always."""
        return True


@pytest.mark.parametrize(("columns", "start"), [(60, "image"), (40, "image  a.png\nscore  1.5")])
def test_terminal_gets_a_table_that_fits(monkeypatch, columns, start):
    """A terminal gets a drawn table without colour codes under NO_COLOR, and blocks where the numbers would not fit."""
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("COLUMNS", str(columns))
    text = render.table(("image", "score", "more"), [("a.png", "1.5", "9" * 25)], right=(1, 2))
    assert start in text
    assert ("\u2502" in text) == (columns == 60)
    assert "\x1b[3" not in text
    assert max(map(len, text.splitlines())) <= columns


@pytest.mark.parametrize(("quiet", "drawn"), [(False, True), (True, False)])
def test_progress_is_for_terminals(monkeypatch, quiet, drawn):
    """Progress is drawn on a terminal's standard error unless it should be quiet, and never in a pipe."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    with render.progress("images", quiet=quiet) as show:
        assert (show is not None) == drawn
        if show is not None:
            show(1, 2)
            show(2, 2)
    assert ("images" in sys.stderr.getvalue()) == drawn
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with render.progress("images", quiet=False) as show:
        assert show is None


@pytest.mark.parametrize("command", [run, bench])
def test_help_has_an_example(command):
    """Each help text shows a whole command, line by line."""
    assert f"\n    reptool {command.name} " in called(command, "--help").stdout


def test_commands_import_nothing_heavy():
    """Importing the commands loads none of the packages that only running them needs."""
    code = "import reptool.runtime.commands, sys; print(*{'torch', 'numpy', 'rich', 'onnxruntime', 'PIL'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_running_needs_no_torch():
    """All of the runtime loads without torch."""
    code = "import reptool.runtime as r, sys; [getattr(r, n) for n in r.__all__]; print('numpy' in sys.modules, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.split() == ["True", "False"]
