"""The child process of `ClipReader`: probes and decodes what its parent asks for, until the pipe closes."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import struct
from typing import Any, BinaryIO

from pipeline.errors import ClipRejected, RejectReason
from pipeline.stages.decode import read_clip
from pipeline.stages.probe import inspect

LENGTH = struct.Struct(">Q")
MEMORY_LIMIT_BYTES = 6 << 30
ALARM_SLACK_S = 5.0


def main() -> None:
    """Answer requests on stdin with messages on stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # codecs print; only messages may reach the parent
    _send(answers, b"ready")
    while length := requests.read(LENGTH.size):
        request = json.loads(requests.read(*LENGTH.unpack(length)))
        # The kernel ends this process on time even when the parent is gone and a decoder holds the interpreter's lock.
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + ALARM_SLACK_S)
        for message in _answer(request):
            _send(answers, message)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(request: dict[str, Any]) -> list[bytes | memoryview]:
    """One message with the verdict, or two: the value, and the pixels that belong to it."""
    try:
        if request["call"] == "inspect":
            return [_json(dataclasses.asdict(inspect(**request["arguments"]))), b""]
        clip = read_clip(**request["arguments"])
    except ClipRejected as verdict:
        return [_json({"reason": verdict.reason, "detail": verdict.detail})]
    except MemoryError:
        raise  # ends this process: what is left of its memory is not to be trusted
    except Exception as error:  # whatever a codec makes of a damaged file is a verdict on that file
        return [_json({"reason": RejectReason.UNREADABLE, "detail": f"{type(error).__name__}: {error}"})]
    header = {"shape": clip.video_u8.shape, "times_s": clip.times_s.tolist(), "backend": clip.backend}
    return [_json(header), clip.video_u8.reshape(-1).data]


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()


def _send(pipe: BinaryIO, message: bytes | memoryview) -> None:
    pipe.write(LENGTH.pack(len(message)))
    pipe.write(message)
    pipe.flush()


if __name__ == "__main__":
    main()
