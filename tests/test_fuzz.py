"""The fuzzer of the readers finds nothing; by hand it tries thousands."""

import subprocess
import sys
from pathlib import Path

from fuzz_read import KINDS


def test_damaged_files_are_read_or_refused() -> None:
    # in a process of its own, whose children are forked before there is a thread
    command = [sys.executable, str(Path(__file__).with_name("fuzz_read.py")), ",".join(KINDS), "50"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
