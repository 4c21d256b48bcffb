"""The command line as a whole: help, exit codes, JSON, and what every failure looks like."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from reptool import cli

COMMANDS = ("fuse", "export", "verify", "run", "bench", "inspect", "models")


def program(*arguments, cwd=None, **options):
    """Run ``python -m reptool`` as a process."""
    return subprocess.run(
        [sys.executable, "-m", "reptool", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_module_runs_as_a_program(tmp_path, made):
    """``python -m reptool`` ends with the documented code, results on stdout and errors on stderr."""
    done = program("inspect", made / "c.safetensors", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["network"] == "repvgg"
    failed = program("fuse", "missing.pt", cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr.startswith("reptool: error: ")
    assert "Traceback" not in failed.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, reptool):
    """Every command's help shows how it is called."""
    result = reptool(command, "--help")
    assert result.code == 0
    assert "Example" in result.out
    assert f"reptool {command}" in result.out.split("Example", 1)[1]


def test_help_imports_nothing_heavy():
    """Help of the program and of every command comes without torch, numpy or onnx."""
    code = (
        "import sys; from reptool.cli import _code\n"
        f"for name in {COMMANDS!r}: _code([name, '--help'], debug=False)\n"
        "_code(['--help'], debug=False)\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'safetensors'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_group_names_every_command(reptool):
    """The program's own help lists the commands and the exit codes."""
    result = reptool("--help")
    assert all(f"\n  {command} " in result.out for command in COMMANDS)
    assert "Exit codes" in result.out
    assert reptool("--version").out.startswith("reptool, version ")


@pytest.mark.parametrize(
    "arguments", [["fuze"], ["fuse"], ["fuse", "--no-such"], ["fuse", "a", "--img-size", "0"], ["verify", "a"]]
)
def test_usage_errors(arguments, reptool):
    """Wrong usage is exit 2, said by the parser."""
    result = reptool(*arguments)
    assert result.code == 2
    assert "Error" in result.err
    assert "Traceback" not in result.err


def test_public_names_load_lazily():
    """Importing the package costs no torch; a name is loaded when it is used."""
    code = (
        "import sys, reptool; assert 'torch' not in sys.modules; assert 'load' in dir(reptool)\n"
        "assert 'repvgg_a0' in reptool.list_models(); assert 'torch' in sys.modules\n"
        "assert issubclass(reptool.ReptoolError, Exception)\n"
        "assert all(callable(getattr(reptool, n)) for n in ('create_model', 'fuse', 'load', 'save'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["create_model", "export", "fuse", "list_models", "load", "save", "verify"])
def test_public_names_are_functions(name):
    """Every public name is a function, whatever was imported before; no part of the package hides one."""
    code = (
        "import reptool, reptool.commands.export, reptool.public, reptool.checkpoint.source\n"
        "import reptool.cli, inspect\n"
        f"assert inspect.isfunction(reptool.{name}), reptool.{name}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_an_attribute_error():
    """The package has no name it does not list."""
    import reptool

    with pytest.raises(AttributeError, match="has no attribute 'fuze'"):
        _ = reptool.fuze


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MemoryError(), 7, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 7, "out of memory"),
        (ModuleNotFoundError("No module named 'onnx'", name="onnx"), 8, "the package onnx is needed"),
        (ZeroDivisionError("division by zero"), 70, "a fault of ours: ZeroDivisionError"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, ""),
    ],
)
def test_every_exception_has_a_code(error, code, text, reptool, monkeypatch):
    """Whatever escapes becomes one message without a traceback, and its documented code."""

    def fail(**_):
        raise error

    monkeypatch.setattr(cli.cli, "main", fail)
    result = reptool("models")
    assert result.code == code
    assert text in result.err
    assert "Traceback" not in result.err


def test_debug_shows_the_traceback(monkeypatch, capsys):
    """--debug adds the traceback to the message."""

    def fail(**_):
        raise ZeroDivisionError("on purpose")

    monkeypatch.setattr(cli.cli, "main", fail)
    assert cli._code(["models"], debug=True) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interruption_leaves_nothing(number, code, tmp_path):
    """An interrupted command ends with 128 plus the signal, one line, and no file."""
    fifo = tmp_path / "started"
    os.mkfifo(fifo)
    body = (
        "import sys, time, reptool.checkpoint.read as read\n"
        "from reptool.cli import main\n"
        "def wait(*_, **__):\n"
        f"    open({str(fifo)!r}, 'w').close()\n"
        "    time.sleep(60)\n"
        "read.read_checkpoint = wait\n"
        "main(['fuse', 'c.pt'])"
    )
    running = subprocess.Popen([sys.executable, "-c", body], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    fifo.open().close()
    time.sleep(0.3)
    running.send_signal(number)
    _, err = running.communicate(timeout=60)
    assert running.returncode == code, err
    assert "nothing was written" in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["started"]


def test_models_are_listed(reptool):
    """The table and its JSON name every network."""
    from reptool.models import list_models

    listed = json.loads(reptool("models", "--json").out)
    assert listed["schema_version"] == 2
    assert sorted(row["name"] for row in listed["models"]) == list_models()
    blocks = json.loads(reptool("models", "--json", "--blocks").out)
    assert sorted(row["name"] for row in blocks["models"]) == list_models(blocks=True)
    table = reptool("models", "--family", "repvgg").out
    assert "8,309,384" in table
    assert table.index("repvgg_a2") < table.index("repvgg_b0") < table.index("repvgg_d2se")
    assert reptool("models", "--family", "repvg").code == 2


def test_inspect_says_what_a_file_is(reptool, here, tmp_path):
    """Network, key names and form of both forms, with the next command; an unknown file is still described."""
    here("c.safetensors", "c.fused.safetensors")
    training = reptool("inspect", "c.safetensors")
    assert "training" in training.out
    assert "reptool fuse c.safetensors" in training.out
    deploy = reptool("inspect", "c.fused.safetensors")
    assert "reptool export c.fused.safetensors" in deploy.out
    value = json.loads(reptool("inspect", "c.fused.safetensors", "--json").out)
    assert (value["schema_version"], value["form"], value["classes"]) == (1, "deploy", 5)
    assert value["verdict"].startswith("passed")
    (tmp_path / "empty.pt").touch()
    assert reptool("inspect", "empty.pt").code == 2
    assert reptool("inspect", "missing.onnx").code == 2


def test_verify_tells_equal_from_different(reptool, here):
    """0 for the same network in its other form, 1 for another network's, with the figures."""
    here("c.safetensors", "c.fused.safetensors", "other.fused.safetensors")
    same = reptool("verify", "c.safetensors", "c.fused.safetensors")
    assert same.code == 0, same.err
    assert "rounding noise" in same.out
    assert json.loads(reptool("verify", "c.safetensors", "c.fused.safetensors", "--json").out)["passed"] is True
    other = reptool("verify", "c.safetensors", "other.fused.safetensors")
    assert other.code == 1
    assert "does not compute what c.safetensors computes" in other.err
    assert reptool("verify", "c.safetensors", "missing.safetensors").code == 2


def test_verify_strict(reptool, here, monkeypatch):
    """Where rounding hides everything, --strict is exit 5."""
    from reptool.proof import endtoend

    here("c.safetensors", "c.fused.safetensors")
    monkeypatch.setattr(endtoend, "RESOLUTION", 0.0)
    assert reptool("verify", "c.safetensors", "c.fused.safetensors").code == 0
    assert reptool("verify", "c.safetensors", "c.fused.safetensors", "--strict").code == 5
