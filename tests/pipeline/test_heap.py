"""Freed memory stays with the process: no new pages the second time."""

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from pipeline.heap import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    for _ in range(20):
        torch.ones(4 << 20)  # 16 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
print(faults() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_blocks_are_not_mapped_again():
    found = {
        how: int(subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "as it is")
    }
    assert found["keep"] < 100 < found["as it is"]
