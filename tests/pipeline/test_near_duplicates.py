"""Fingerprints of clips, and near copies among them: against the rule itself."""

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import media
from pipeline.near_duplicates import MAX_BITS, _compare, _settle, band_keys, near_duplicates
from pipeline.stages.decode import read_clip
from pipeline.stages.fingerprint import fingerprint

rng = np.random.default_rng


def distance(one, other):
    return int(np.bitwise_count(np.frombuffer(one, np.uint8) ^ np.frombuffer(other, np.uint8)).sum())


def scene(seed, num_frames=17, size=96, shift=2):
    """A smooth texture that moves."""
    coarse = rng(seed).random((12, 12, 3)).astype(np.float32)
    wide = cv2.resize(coarse, (3 * size, 3 * size), interpolation=cv2.INTER_CUBIC).clip(0, 1)
    frames = [wide[size : 2 * size, size + shift * t : 2 * size + shift * t] for t in range(num_frames)]
    return np.asarray(255 * np.stack(frames), np.uint8)


def brute_force(prints, max_bits):
    """The rule, word by word."""
    copies, kept = {}, []
    for position, mine in prints:
        near = [other for other, theirs in kept if distance(mine, theirs) <= max_bits]
        if near:
            copies[position] = near[0]
        else:
            kept.append((position, mine))
    return copies


def test_copies_are_near_and_others_are_far(tmp_path):
    video = scene(1)
    mine = fingerprint(video)
    assert len(mine) == 32
    (tmp_path / "a.mp4").write_bytes(media.encode_mp4(video, 8))
    again = read_clip(str(tmp_path / "a.mp4"), 0.0, 17 / 8).video_u8
    smaller = np.stack([cv2.resize(frame, (48, 64), interpolation=cv2.INTER_AREA) for frame in video])
    brighter = (0.9 * video + 20).astype(np.uint8)
    noisy = (video + rng(0).normal(0, 4, video.shape)).clip(0, 255).astype(np.uint8)
    assert max(distance(mine, fingerprint(other)) for other in (again, smaller, brighter, noisy)) <= 8
    others = (scene(2), scene(1, shift=-2), video[::-1], np.flip(video, 2))
    assert min(distance(mine, fingerprint(other)) for other in others) > 3 * MAX_BITS / 2


def test_flat_clips_are_copies_of_nothing():
    assert fingerprint(np.full((5, 32, 32, 3), 16, np.uint8)) is None
    fading = scene(3)
    fading[-1] = 0
    assert fingerprint(fading) is None
    assert fingerprint(scene(3)[:1]) is not None  # a picture


@given(st.integers(0, MAX_BITS), st.data())
def test_bands_of_near_fingerprints_meet(max_bits, data):
    one = np.frombuffer(data.draw(st.binary(min_size=32, max_size=32)), np.uint64)
    flips = data.draw(st.lists(st.integers(0, 255), max_size=max_bits))
    other = one.copy()
    for bit in flips:
        other[bit // 64] ^= np.uint64(1) << np.uint64(bit % 64)
    keys = band_keys(np.stack([one, other]), max_bits)
    assert (keys[0] == keys[1]).any()


@st.composite
def clusters(draw):
    """Fingerprints, many of them a few bits from another."""
    random = rng(draw(st.integers(0, 2**32 - 1)))
    prints = [random.integers(0, 256, 32, np.uint8)]
    for _ in range(draw(st.integers(1, 40))):
        value = (
            prints[random.integers(len(prints))].copy()
            if random.random() < 0.8
            else random.integers(0, 256, 32, np.uint8)
        )
        for bit in random.integers(0, 256, random.integers(0, 9)):
            value[bit // 8] ^= np.uint8(1 << bit % 8)
        prints.append(value)
    return [(10 * number, value.tobytes()) for number, value in enumerate(prints)]


@settings(deadline=None)
@given(clusters(), st.integers(0, 12))
def test_the_rule_holds(prints, max_bits):
    words = np.stack([np.frombuffer(value, np.uint64) for _, value in prints])
    keys = band_keys(words, max_bits)
    table = pa.table(
        {
            "key": keys.ravel(),
            "position": np.repeat([position for position, _ in prints], keys.shape[1]),
            "fingerprint": [value for _, value in prints for _ in range(keys.shape[1])],
        }
    )
    assert _settle(_compare(table, max_bits)) == brute_force(prints, max_bits)


def test_over_files_of_any_cut(ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.near_duplicates._ROWS_PER_GROUP", 100)
    random = rng(0)
    prints = [random.bytes(32) for _ in range(150)]
    prints += [prints[number] for number in range(0, 60, 3)]  # equal
    prints += [bytes([value[0] ^ 3, *value[1:]]) for value in prints[60:80]]  # two bits off
    rows = [{"position": 7 * number, "fingerprint": value, "caption": "x"} for number, value in enumerate(prints)]
    rows.insert(5, {"position": 29, "fingerprint": None, "caption": "flat"})
    rows.insert(9, {"position": 30, "fingerprint": None, "caption": "flat"})
    expected = brute_force(list(enumerate(prints)), 4)
    for cuts in ([1, 2, 150], [len(rows)]):
        files = []
        for number, part in enumerate(np.split(np.array(rows), cuts)):
            files.append(str(tmp_path / f"{len(cuts)}-{number}.parquet"))
            schema = pa.schema([("position", pa.int64()), ("fingerprint", pa.binary()), ("caption", pa.string())])
            pq.write_table(pa.Table.from_pylist(part.tolist(), schema=schema), files[-1])
        found = near_duplicates(files, 4)
        assert {copy // 7: kept // 7 for copy, kept in found.items()} == expected
    assert len(expected) == 40


@pytest.mark.parametrize("bits", [-1, MAX_BITS + 1])
def test_limits_are_named(bits):
    with pytest.raises(ValueError, match=r"near_duplicate_bits=.*must be in \[0, 23\]"):
        near_duplicates([], bits)
