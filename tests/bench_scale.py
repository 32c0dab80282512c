"""Time and memory of a table of many faces and of its split; what the images' bytes take is not counted.

Not collected by itself: ``pytest -s -o addopts="" tests/bench_scale.py``, on a machine with nothing else to do.
"""

import json
import subprocess
import sys

import pytest

MEASURED = """
import hashlib, json, resource, sys, time
from facecls.data import table
from facecls.data.split import assign_split

def inspected(count):
    for i in range(count):
        name = f"faces/{i * 7919 % 117}_{i % 2}_{i % 5}_{20170116000000000 + i}.jpg.chip.jpg"
        yield table._named(name, bytes), hashlib.sha1(name.encode()).hexdigest()

started = time.perf_counter()
faces = table._collect(inspected(int(sys.argv[1]))).faces
split = assign_split(faces, 0.1, 0.1, 0)
seconds = time.perf_counter() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"faces": len(faces), "train": int((split == "train").sum()), "seconds": seconds, "bytes": peak}))
"""
"""Names -> labels -> table -> split in a process of its own, whose peak memory includes the imports."""


@pytest.mark.parametrize(("count", "seconds", "size"), [(23_708, 1, 0.8e9), (1_000_000, 20, 1e9)])
def test_table_and_split(count: int, seconds: float, size: float) -> None:
    ended = subprocess.run([sys.executable, "-c", MEASURED, str(count)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    measured = json.loads(ended.stdout)
    print(measured)
    assert measured["faces"] == count
    assert measured["train"] == pytest.approx(0.8 * count, abs=10)
    assert measured["seconds"] < seconds
    assert measured["bytes"] < size
