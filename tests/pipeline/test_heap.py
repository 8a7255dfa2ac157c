"""Freed memory stays with the process."""

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, sys
from pipeline.heap import keep_freed_memory

class Info(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "keep":
    assert keep_freed_memory()
before = libc.mallinfo2()
block = libc.malloc(24 << 20)
mapped = libc.mallinfo2().hblks - before.hblks
libc.free(block)
print(mapped, libc.mallinfo2().arena - before.arena >= 24 << 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_a_block_is_not_mapped_on_its_own_and_stays():
    found = {
        how: subprocess.run([sys.executable, "-c", SCRIPT, how], capture_output=True, text=True, check=True).stdout
        for how in ("keep", "as it is")
    }
    assert found == {"keep": "0 True\n", "as it is": "1 False\n"}
