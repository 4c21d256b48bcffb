"""The command line: the group of commands, and how every failure becomes one message and one exit code."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, NoReturn

import click

from reptool._version import __version__
from reptool.commands.export import export
from reptool.commands.fuse import fuse
from reptool.commands.inspect import inspect
from reptool.commands.models import models
from reptool.commands.verify import verify
from reptool.errors import ReptoolError
from reptool.runtime.commands import bench, run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType

FAULT, INTERRUPTED, TERMINATED, RESOURCE = 70, 130, 143, 7


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="reptool")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Turn training-time multi-branch networks into fused inference graphs, prove that nothing changed, and ship them.

    \b
    From a checkpoint to predictions:
      reptool fuse ckpt.pt
      reptool export --format onnx
      reptool run ckpt.fused.onnx images/

    \b
    Exit codes: 0 done and verified, 1 not equivalent, 2 usage or input, 3 unsafe input, 4 nothing to fuse,
    5 not everything could be shown (--strict), 6 output not written, 7 resources, 8 package missing, 70 our fault.
    """  # noqa: D301  # click reads the backslashes


for _command in (fuse, export, verify, run, bench, inspect, models):
    cli.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its documented code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _be_a_good_neighbour()
    signal.signal(signal.SIGTERM, _terminate)
    code = _code(given, debug="--debug" in given)
    if arguments is None:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """End the process at once, everything being written: taking torch apart first cost 0.5 to 1.3 s a command."""
    with contextlib.suppress(OSError, ValueError):  # a reader that went away is no reason to linger
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _be_a_good_neighbour() -> None:
    """Let torch's threads sleep between operators, and collect garbage rarely.

    Spinning threads are several times slower as soon as anything else runs on the machine (measured 6.1 s against
    1.2 s for one verification on two busy cores); graphs are captured out of many small objects that all stay.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch asks for large pages, which are faster to come by
    gc.set_threshold(50_000, 50, 50)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Let the C library use freed memory again instead of asking the system for fresh, zeroed pages each time.

    Weights come and go by the hundred megabytes; page faults were a quarter of the time on repvgg_b3. Only glibc has
    this call; elsewhere nothing changes.
    """
    mmap_max, trim_threshold, largest = -4, -1, 2**31 - 1
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, largest)


def _code(arguments: list[str], *, debug: bool) -> int:
    try:
        result = cli.main(args=arguments, prog_name="reptool", standalone_mode=False)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("reptool: interrupted; nothing was written", err=True)
        return INTERRUPTED
    except BaseException as error:  # noqa: BLE001  # the one place where anything becomes a message and a code
        if debug and not isinstance(error, SystemExit):
            traceback.print_exc()
        return _explain(error)
    return result if isinstance(result, int) else 0


def _explain(error: BaseException) -> int:
    """Print what went wrong; the exit code for it."""
    if isinstance(error, ReptoolError):
        click.echo(f"reptool: error: {error}", err=True)
        return error.exit_code
    if isinstance(error, SystemExit):
        return int(error.code or 0) if isinstance(error.code, (int, type(None))) else FAULT
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        message = ReptoolError("out of memory", why=str(error) or None, do="free memory, or use a machine with more")
        click.echo(f"reptool: error: {message}", err=True)
        return RESOURCE
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if missing and not missing.startswith("reptool"):
        text = ReptoolError(f"the package {missing} is needed and not installed", do='pip install "reptool[onnx]"')
        click.echo(f"reptool: error: {text}", err=True)
        return 8
    text = ReptoolError(
        f"a fault of ours: {type(error).__name__}: {error}",
        why="this should not happen, whatever the input",
        do="run again with --debug and report what it prints; nothing was written",
    )
    click.echo(f"reptool: error: {text}", err=True)
    return FAULT


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    """Leave through every clean-up, so that no temporary file stays."""
    click.echo("reptool: terminated; nothing was written", err=True)
    raise SystemExit(TERMINATED)
