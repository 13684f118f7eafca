"""What the tests of the packages share."""

import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGING = ROOT / "packaging"
BINARY = pathlib.Path(os.environ.get("TOLLGATE_BIN", ROOT / "target/debug/tollgate")).resolve()


def run(*command, **options):
    """Runs a command and returns its output. A failure shows what it has printed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    if done.returncode != 0:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def tool(name):
    """The path of a program: one that pip has installed beside this Python, or one of the machine. None: it is absent."""
    beside = pathlib.Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)
