"""Decoding where it can be killed: one child process, one clip at a time, by the clock.

decord can hang while it holds the interpreter's lock, and a damaged file can take a decoder and its process down.
Neither may cost more than its own row.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

import pipeline
from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages.probe import Probe
from pipeline.stages.window import Clip

LENGTH = struct.Struct(">Q")  # stands before every message
START_TIMEOUT_S = 120.0  # imports, on a crowded machine
CALLS_PER_CHILD = 512  # decord leaks: a new child is cheaper than a growing one


class ClipReader:
    """Probes and reads clips in a child process that is replaced when it hangs or dies. For one thread at a time.

    Args:
        timeout_s: wall-clock limit for one call.

    Raises:
        ClipRejected: from `probe` and `read`: the child's verdict, TIMEOUT, or CRASHED.
    """

    def __init__(self, timeout_s: float = 20.0) -> None:
        self.timeout_s = timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self._num_calls = 0

    def __enter__(self) -> ClipReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def probe(self, uri: str) -> Probe:
        """What the file says about itself: see `pipeline.stages.probe.inspect`."""
        value, _ = self._call("inspect", {"uri": uri})
        return Probe(**value)

    def read(
        self,
        uri: str,
        start_s: float,
        end_s: float,
        fps: float | None = None,
        height_px: int | None = None,
        width_px: int | None = None,
        num_frames: int | None = None,
        backend: str = "auto",
    ) -> Clip:
        """Frames of a window: see `pipeline.stages.decode.read_clip`."""
        arguments = {"uri": uri, "start_s": start_s, "end_s": end_s, "fps": fps, "num_frames": num_frames}
        sizes = {"height_px": height_px, "width_px": width_px, "backend": backend}
        value, pixels = self._call("read_clip", {**arguments, **sizes})
        video_u8 = np.frombuffer(pixels, dtype=np.uint8).reshape(value["shape"])
        return Clip(video_u8, np.array(value["times_s"]), value["backend"])

    def close(self) -> int | None:
        """Kill the child, if there is one; returns its exit code."""
        child, self._child = self._child, None
        if child is None:
            return None
        assert child.stdin is not None
        assert child.stdout is not None
        exit_code = child.poll()
        child.kill()
        child.wait()
        child.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # a request that a dead child did not take
            child.stdin.close()
        return exit_code

    def _call(self, name: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], bytearray]:
        if self._num_calls >= CALLS_PER_CHILD:
            self.close()
        if self._child is not None:
            try:
                return self._exchange(name, arguments)
            except EOFError:  # perhaps the fault of an earlier clip: ask a fresh child
                self.close()
        self._start()
        try:
            return self._exchange(name, arguments)
        except EOFError:
            exit_code = self._exit_code()
            detail = f"the decoder process died (exit code {exit_code}): damaged file or too much memory"
            raise ClipRejected(RejectReason.CRASHED, detail) from None

    def _exchange(self, name: str, arguments: dict[str, Any]) -> tuple[dict[str, Any], bytearray]:
        deadline_s = time.monotonic() + self.timeout_s
        self._num_calls += 1
        try:
            self._send({"call": name, "arguments": arguments, "timeout_s": self.timeout_s})
            header = json.loads(self._receive(deadline_s))
            if "reason" in header:
                raise ClipRejected(RejectReason(header["reason"]), header["detail"])
            return header, self._receive(deadline_s)
        except TimeoutError:
            self.close()
            raise ClipRejected(RejectReason.TIMEOUT, f"{name} took longer than {self.timeout_s} s") from None

    def _start(self) -> None:
        root = str(Path(pipeline.__file__).parents[1])
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)])}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "pipeline.stages.decode_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # decord prints the bytes of damaged files
            env=environment,
        )
        self._num_calls = 0
        try:
            self._receive(time.monotonic() + START_TIMEOUT_S)  # ready: the clock of a call does not pay for imports
        except (EOFError, TimeoutError):
            raise RuntimeError(f"the decoder process does not start (exit code {self._exit_code()})") from None

    def _exit_code(self) -> int | None:
        assert self._child is not None
        with contextlib.suppress(subprocess.TimeoutExpired):  # closed its pipe but lives: there is no code to tell
            self._child.wait(timeout=5.0)
        return self.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._child is not None
        assert self._child.stdin is not None
        data = json.dumps(message).encode()
        try:
            self._child.stdin.write(LENGTH.pack(len(data)) + data)
            self._child.stdin.flush()
        except BrokenPipeError:
            raise EOFError from None

    def _receive(self, deadline_s: float) -> bytearray:
        (length,) = LENGTH.unpack(self._receive_bytes(LENGTH.size, deadline_s))
        return self._receive_bytes(length, deadline_s)

    def _receive_bytes(self, num_bytes: int, deadline_s: float) -> bytearray:
        assert self._child is not None
        assert self._child.stdout is not None
        pipe = self._child.stdout.fileno()
        data = bytearray(num_bytes)
        view = memoryview(data)
        while view:
            if not select.select([pipe], [], [], max(0.0, deadline_s - time.monotonic()))[0]:
                raise TimeoutError
            num_read = os.readv(pipe, [view])
            if not num_read:
                raise EOFError
            view = view[num_read:]
        return data
