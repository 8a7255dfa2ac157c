"""Row functions: windows, sizes, captions, the guard, and the grouping of latents."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ClipRejected, RejectReason, TooManyRejectsError
from pipeline.stages import caption, guard, latents, probe, split
from pipeline.stages.decode import Clip

LIMITS = {"max_source_pixels_px": 100 * 100, "max_source_duration_s": 60.0}
WINDOWS = {"fps": 8.0, "max_frames": 33, "min_frames": 9, "stride_frames": 4}


def facts(**changes):
    defaults = {
        "source_id": "s",
        "codec": "h264",
        "height_px": 64,
        "width_px": 64,
        "pixel_aspect": 1.0,
        "rotation_deg": 0,
        "fps": 8.0,
        "num_frames": 17,
        "start_s": 0.0,
        "end_s": 17 / 8,
    }
    return probe.Probe(**{**defaults, **changes})


def row(**changes):
    return {"source_uri": "/x/a.mp4", "start_s": None, "end_s": None, "probe": facts(**changes)}


def windows(num_frames, fps=8.0, start_s=0.0, **policy):
    found = split.split(row(fps=fps, start_s=start_s, end_s=start_s + num_frames / fps), **{**WINDOWS, **policy})
    return [(clip["start_s"], clip["num_frames"]) for clip in found]


def test_windows_tile_the_file_and_keep_a_shorter_rest():
    assert windows(17) == [(0.0, 17)]
    assert windows(18) == [(0.0, 17)]
    assert windows(33 + 12) == [(0.0, 33), (33 / 8, 9)]
    assert windows(33 + 8) == [(0.0, 33)]  # eight are fewer than min_frames: dropped, the file has given a clip
    assert windows(66, start_s=5.0) == [(5.0, 33), (5.0 + 33 / 8, 33)]
    with pytest.raises(ClipRejected, match="too_short"):
        windows(8)


def test_faster_files_are_sampled_and_slower_ones_keep_their_rate():
    fast = split.split(row(fps=24.0, end_s=51 / 24), **WINDOWS)
    assert [(clip["fps"], clip["num_frames"]) for clip in fast] == [(8.0, 17)]
    slow = split.split(row(fps=5.0, end_s=17 / 5), **WINDOWS)
    assert [(clip["fps"], clip["num_frames"]) for clip in slow] == [(5.0, 17)]


def test_bounds_of_a_manifest_limit_the_windows():
    bounded = {**row(end_s=100 / 8), "start_s": 2.0, "end_s": 2.0 + 9 / 8}
    (clip,) = split.split(bounded, **WINDOWS)
    assert (clip["start_s"], clip["end_s"], clip["num_frames"]) == (2.0, 3.125, 9)
    with pytest.raises(ClipRejected, match="bad_times"):
        split.split({**bounded, "start_s": 50.0, "end_s": 60.0}, **WINDOWS)


def test_a_picture_is_one_window():
    (clip,) = split.split(row(fps=0.0, num_frames=1, end_s=0.0), **WINDOWS)
    assert (clip["num_frames"], clip["start_s"], clip["end_s"], clip["fps"]) == (1, 0.0, 0.125, 8.0)


@given(st.integers(1, 500), st.integers(0, 8).map(lambda k: 1 + 4 * k), st.integers(1, 33))
def test_windows_fit_the_stride_and_never_overlap(num_frames, max_frames, min_frames):
    found = split._windows(num_frames, max_frames, min_frames, 4)
    for (first, length), (following, _) in itertools.pairwise(found):
        assert first + length <= following
    assert all(length % 4 == 1 and min_frames <= length <= max_frames for _, length in found)
    assert all(first + length <= num_frames for first, length in found)


@pytest.mark.parametrize("height", range(32, 97, 16))
@pytest.mark.parametrize("width", range(32, 97, 16))
def test_sizes_on_the_grid_stay(height, width):
    assert split.choose_size(height, width, 96, 96 * 96, 16) == (height, width)


def test_sizes_off_the_grid():
    assert split.choose_size(720, 1280, 96, 96 * 96, 16) == (48, 80)
    assert split.choose_size(1280, 720, 96, 96 * 96, 16) == (80, 48)
    assert split.choose_size(200, 200, 96, 64 * 64, 16) == (64, 64)
    assert split.choose_size(144, 192.5, 96, 96 * 96, 16) == (64, 80)
    with pytest.raises(ClipRejected, match="too_small"):
        split.choose_size(8, 64, 96, 96 * 96, 16)
    with pytest.raises(ClipRejected, match="too_small"):
        split.choose_size(16, 1280, 96, 96 * 96, 16)  # scaled to 1 px high


@given(st.integers(16, 3000), st.integers(16, 3000), st.integers(16, 512), st.integers(256, 512 * 512))
def test_sizes_keep_their_limits_and_never_grow(height, width, max_side, max_pixels):
    scale = min(1.0, max_side / max(height, width), math.sqrt(max_pixels / (height * width)))
    if min(height, width) * scale < 16 - 1e-6:
        with pytest.raises(ClipRejected, match="too_small"):
            split.choose_size(height, width, max_side, max_pixels, 16)
        return
    h, w = split.choose_size(height, width, max_side, max_pixels, 16)
    assert h % 16 == w % 16 == 0
    assert h <= height
    assert w <= width
    assert max(h, w) <= max_side
    assert h * w <= max_pixels + 1
    if min(h, w) >= 64:  # a grid of four or more steps holds the aspect within one step
        assert abs(math.log(w / h * height / width)) < math.log(1 + 16 / min(h, w))


def test_clip_ids_tell_windows_and_sizes_apart():
    base = {**row(), "start_s": 0.0, "end_s": 1.0, "fps": 8.0, "num_frames": 9, "height_px": 64, "width_px": 64}
    changes = [{}, {"start_s": 0.5}, {"fps": 6.0}, {"num_frames": 5}, {"width_px": 48}, row(source_id="t")]
    ids = [split.identify({**base, **change})["clip_id"] for change in changes]
    assert len(set(ids)) == len(ids)
    assert split.identify({**base, "source_uri": "/elsewhere/copy.mp4"})["clip_id"] == ids[0]


@pytest.mark.parametrize(
    ("given_caption", "fallback", "text", "origin"),
    [
        (("words", "sidecar"), "reject", "words", "sidecar"),
        ((None, None), "filename", "red car drives", "filename"),
        ((None, None), "empty", "", "empty"),
    ],
)
def test_captions(given_caption, fallback, text, origin):
    before = {"source_uri": "s3://b/red_car-drives 0042.mp4", "probe": facts()}
    after = caption.caption(
        {**before, "caption": given_caption[0], "caption_source": given_caption[1]}, fallback=fallback
    )
    assert (after["caption"], after["lineage"]) == (text, {"source_id": "s", "caption_source": origin})


def test_no_caption_can_be_a_reject():
    with pytest.raises(ClipRejected, match="no_caption"):
        caption.caption({**row(), "caption": None, "caption_source": None}, fallback="reject")
    assert caption.filename_words("/x/0001.mp4") == ""


def test_probe_refuses_what_is_too_large():
    source = {"source_uri": "/x", "problem": None}
    assert probe.probe(source, inspect=lambda _: facts(), **LIMITS)["probe"] == facts()
    for large, match in [(facts(width_px=200), "max_source_pixels_px"), (facts(end_s=61.0), "max_source_duration_s")]:
        with pytest.raises(ClipRejected, match=match):
            probe.probe(source, inspect=lambda _, found=large: found, **LIMITS)
    with pytest.raises(ClipRejected, match="bad_row: no path"):
        probe.probe({"source_uri": "m#1", "problem": "no path"}, inspect=lambda _: facts(), **LIMITS)


def test_the_guard_loses_no_row():
    def halve(before):
        return [{**before, "x": before["x"] / 2}, {**before, "x": before["x"] / 4}]

    def refuse_small(before):
        if before["x"] < 2:
            raise ClipRejected(RejectReason.TOO_SMALL, f"x={before['x']}")
        return {**before, "x": -before["x"]}

    rows = guard.run_stages({"source_uri": "u", "x": 4.0}, [("halve", halve), ("check", refuse_small), ("b", halve)])
    assert [after["x"] for after in rows] == [-1.0, -0.5, 1.0]
    assert guard.reject_row(rows[2]) == {"what": "u", "reason": "too_small", "detail": "x=1.0", "stage": "check"}
    assert len({tuple(after) for after in rows}) == 1  # the same columns in the same order


def test_a_bug_is_not_a_verdict():
    with pytest.raises(ZeroDivisionError):
        guard.run_stages({"source_uri": "u"}, [("bug", lambda before: {**before, "x": 1 / 0})])


def test_too_many_rejects_names_reasons_and_folder():
    reasons = Counter({"timeout": 3, "too_short": 1})
    guard.check_rejects(4, 8, reasons, 0.5, "/out")
    with pytest.raises(TooManyRejectsError, match=r"5 of 8 .*timeout 3, too_short 1.*/out/rejects"):
        guard.check_rejects(5, 8, reasons, 0.5, "/out")
    with pytest.raises(TooManyRejectsError, match="1 of 1"):
        guard.check_rejects(1, 1, reasons, 1.0, "/out")


def test_groups_have_one_shape_and_bounded_size():
    rows = [{"num_frames": 9, "height_px": 32, "width_px": 32 + 16 * (i % 2), "i": i} for i in range(10)]
    groups = latents.group_by_shape(rows, max_pixels_per_batch=3 * 9 * 32 * 32)
    assert [[member["i"] for member in group] for group in groups] == [[0, 2, 4], [6, 8], [1, 3], [5, 7], [9]]
    assert [len(group) for group in latents.group_by_shape(rows, max_pixels_per_batch=1)] == [1] * 10


def test_latents_rows_hold_float16_and_refuse_what_it_cannot_hold():
    clip = Clip(np.zeros((1, 16, 16, 3), np.uint8), np.zeros(1), "pyav")
    source = {"clip_id": "c", "source_uri": "u", "caption": "x", "fps": 8.0, "lineage": {}}
    array = np.arange(8, dtype=np.float16).reshape(2, 1, 2, 2)
    encoded = latents.Encoded(array, array + 1)
    made = latents.latents_row(source, clip, encoded, torch.ones(3, 5), keep_std=True)
    assert np.array_equal(np.frombuffer(made["latents"], np.float16).reshape(made["latents_shape"]), array)
    assert np.array_equal(np.frombuffer(made["latents_std"], np.float16).reshape(made["latents_shape"]), array + 1)
    assert latents.latents_row(source, clip, encoded, torch.ones(3, 5), keep_std=False)["latents_std"] is None
    assert made["text_shape"] == [3, 5]
    assert made["decode_backend"] == "pyav"
    with pytest.raises(ValueError, match="text of clip c"):
        latents.latents_row(source, clip, encoded, torch.full((1, 5), 1e6), keep_std=False)
