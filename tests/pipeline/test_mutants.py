"""Damaged files of every container: a clip or a reason, never a crash, a hang or frames that do not fit together.

KINORAY_MUTANTS=5000 python -m pytest tests/pipeline/test_mutants.py    for a long search
"""

import os
import random
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from clip_kinds import KINDS

from pipeline.errors import ClipRejected
from pipeline.stages.reader import ClipReader

BASES = ("index_in_front.mp4", "fragmented.mp4", "hidden_start.mp4", "mkv.mkv", "webm.webm", "av1.mp4", "hevc.mp4",
         "mpeg4.mp4", "avi.avi", "ts.ts", "flv.flv", "gif.gif", "asf.asf", "ps.mpg")  # fmt: skip


def mutate(data, rng):
    """A file with one to three wounds."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        place, length = rng.randrange(len(data)), rng.randint(1, 400)
        wound = rng.choice(("flip", "flip", "begin", "zero", "delete", "repeat", "cut"))
        if wound == "begin":  # where most containers keep their index
            place = rng.randrange(min(len(data), 1000))
        if wound in ("flip", "begin"):
            for _ in range(rng.choice((1, 8))):
                data[min(len(data) - 1, place + rng.randrange(length))] = rng.randrange(256)
        elif wound == "zero":
            data[place : place + length] = bytes(len(data[place : place + length]))
        elif wound == "delete":
            del data[place : place + length]
        elif wound == "repeat":
            data[place:place] = data[place : place + length]
        else:
            del data[max(8, place) :]
    return bytes(data)


def clip_or_reason(reader, path):
    """None for a clip that fits together, or why there is none."""
    try:
        facts = reader.probe(path)
        clip = reader.read(path, facts.start_s, min(facts.end_s, facts.start_s + 10))
    except ClipRejected as verdict:
        return str(verdict.reason)
    assert clip.video_u8.shape == (len(clip.times_s), facts.height_px, facts.width_px, 3)
    assert np.all(np.diff(clip.times_s) > 0)
    return None


def test_mutants_give_a_clip_or_a_reason(tmp_path):
    num_mutants = int(os.environ.get("KINORAY_MUTANTS", "56"))
    originals = [(name, Path(KINDS[name].make(tmp_path)).read_bytes()) for name in BASES]
    slowest_s, served = 0.0, 0
    with ClipReader(timeout_s=20.0) as reader:
        for number in range(num_mutants):
            name, data = originals[number % len(originals)]
            path = tmp_path / f"mutant_{name}"
            path.write_bytes(mutate(data, random.Random(number)))
            start_s = time.monotonic()
            found = clip_or_reason(reader, str(path))
            assert found not in ("crashed", "timeout"), f"mutant {number} of {name}"
            served += found is None
            slowest_s = max(slowest_s, time.monotonic() - start_s)
    sys.stdout.write(f"{num_mutants} mutants, {served} served, the slowest took {slowest_s:.1f} s\n")
    assert 0 < served < num_mutants
    assert slowest_s < 20.0


@pytest.mark.parametrize("seed", [0, 1])
def test_mutants_are_the_same_in_every_run(seed):
    data = bytes(range(256)) * 20
    assert mutate(data, random.Random(seed)) == mutate(data, random.Random(seed)) != data
