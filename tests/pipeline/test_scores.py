"""Cuts, scores and filters: against what was put into the frames."""

import cv2
import numpy as np
import pytest

from pipeline import media
from pipeline.errors import ClipRejected
from pipeline.stages import scenes, split
from pipeline.stages.decode import read_clip
from pipeline.stages.filters import FilterConfig, check_scores, check_source
from pipeline.stages.probe import inspect
from pipeline.stages.score import measure, score
from tests.pipeline.clip_files import encode
from tests.pipeline.test_near_duplicates import scene
from tests.pipeline.test_stages import facts

WINDOWS = {"fps": 8.0, "max_frames": 17, "min_frames": 5, "stride_frames": 4}


def source(tmp_path, video, fps=8, **more):
    path = tmp_path / "video.mp4"
    path.write_bytes(media.encode_mp4(video, fps) if not more else encode(video, **more))
    return {"source_uri": str(path), "start_s": None, "end_s": None, "probe": inspect(str(path))}


def cuts_of(row, threshold=3.0):
    return scenes.find_cuts(row, read=read_clip, threshold=threshold)["cuts_s"]


# --- cuts -----------------------------------------------------------------------------------------------------------


def test_cuts_are_found_at_their_frames_across_chunks(tmp_path, monkeypatch):
    video = np.concatenate([scene(1, 23), scene(2, 17), scene(3, 40)])
    row = source(tmp_path, video)
    assert cuts_of(row) == pytest.approx([23 / 8, 40 / 8])
    monkeypatch.setattr(scenes, "CHUNK_BYTES", 10 * 3 * 72 * 72)
    assert cuts_of(row) == pytest.approx([23 / 8, 40 / 8])
    assert cuts_of({**row, "start_s": 3.5, "end_s": 4.5}) == []
    assert cuts_of(row, threshold=None) == []


def test_fast_motion_is_no_cut(tmp_path):
    assert cuts_of(source(tmp_path, scene(4, 24, shift=4))) == []


def test_animation_on_threes_has_no_cuts(tmp_path):
    assert cuts_of(source(tmp_path, np.repeat(scene(4, 12, shift=8), 3, axis=0), fps=24)) == []
    twice = np.repeat(np.concatenate([scene(4, 9, shift=3), scene(5, 9, shift=3)]), 3, axis=0)
    assert cuts_of(source(tmp_path, twice, fps=24)) == pytest.approx([27 / 24])


def test_cuts_between_still_pictures_and_near_the_ends(tmp_path):
    slides = np.concatenate([np.repeat(scene(seed)[:1], 10, axis=0) for seed in (1, 2, 3)])
    assert cuts_of(source(tmp_path, slides)) == pytest.approx([10 / 8, 20 / 8])
    for first in (1, 2, 20, 21):  # of 22 frames
        video = np.concatenate([scene(1, first), scene(2, 22 - first)])
        assert cuts_of(source(tmp_path, video)) == pytest.approx([first / 8])


def test_no_window_crosses_a_cut(tmp_path):
    video = np.concatenate([scene(1, 23), scene(2, 4), scene(3, 40)])
    row = scenes.find_cuts(source(tmp_path, video), read=read_clip, threshold=3.0)
    found = split.split(row, **WINDOWS)
    assert [(clip["start_s"] * 8, clip["num_frames"]) for clip in found] == [
        (0, 17), (17, 5), (27, 17), (44, 17), (61, 5)
    ]  # fmt: skip
    for clip in found:
        times_s = read_clip(row["source_uri"], clip["start_s"], clip["end_s"], fps=8.0).times_s
        assert len({sum(time_s >= cut_s - 1e-3 for cut_s in row["cuts_s"]) for time_s in times_s}) == 1


def test_windows_slide():
    row = {"source_uri": "a", "start_s": None, "end_s": None, "probe": facts(end_s=60 / 8), "cuts_s": [30 / 8, 40 / 8]}
    found = split.split(row, **WINDOWS, hop_frames=4)
    starts = [(round(clip["start_s"] * 8), clip["num_frames"]) for clip in found]
    assert starts == [(0, 17), (4, 17), (8, 17), (12, 17), (30, 9), (40, 17)]
    with pytest.raises(ClipRejected, match="too_short: 3 frames at 8.000 fps in the longest scene: min_frames=5"):
        split.split({**row, "cuts_s": [number * 3 / 8 for number in range(1, 20)]}, **WINDOWS)


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_motion_is_the_shift_of_a_texture(shift):
    found = measure(scene(1, shift=shift), 8.0)["motion"]
    assert found == pytest.approx(8 * shift / 96, rel=0.1)


def test_motion_depends_on_neither_size_nor_rate():
    video = scene(1, shift=2)
    expected = measure(video, 8.0)["motion"]
    larger = np.stack([cv2.resize(frame, (192, 192), interpolation=cv2.INTER_CUBIC) for frame in video])
    assert measure(larger, 8.0)["motion"] == pytest.approx(expected, rel=0.1)
    assert measure(video[::2], 4.0)["motion"] == pytest.approx(expected, rel=0.1)
    assert measure(np.repeat(video[:1], 9, axis=0), 8.0)["motion"] == 0.0
    assert "motion" not in measure(video[:1], 8.0)


def test_luma_and_contrast_of_known_pictures():
    grey = np.full((2, 16, 32, 3), 51, np.uint8)
    assert measure(grey, 8.0) == pytest.approx(
        {"luma": 0.2, "contrast": 0.0, "sharpness": 0.0, "motion": 0.0}, abs=1e-6
    )
    green = np.zeros((1, 16, 32, 3), np.uint8)
    green[..., :16, 1] = 255  # half of it
    assert measure(green, 8.0)["luma"] == pytest.approx(0.7152 / 2)
    assert measure(green, 8.0)["contrast"] == pytest.approx(0.7152 / 2)


def test_blur_lowers_sharpness():
    video = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    values = [measure(np.stack([cv2.GaussianBlur(f, (0, 0), s) for f in video]), 8.0)["sharpness"] for s in (0.5, 1, 2)]
    assert measure(video, 8.0)["sharpness"] > values[0] > 4 * values[1] > 16 * values[2]


def test_rows_keep_scores_and_fingerprint(tmp_path):
    row = {**source(tmp_path, scene(1)), "height_px": 96, "width_px": 96, "caption": ""}
    (clip,) = split.split(row, **WINDOWS)
    made = score(clip, read=read_clip, fingerprint=lambda video: bytes(video.shape))
    assert dict(made["scores"])["motion"] == pytest.approx(16 / 96, rel=0.15)
    assert made["fingerprint"] == bytes([17, 96, 96, 3])
    assert score(clip, read=read_clip)["fingerprint"] is None


# --- filters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"min_side_px": 65}, "too_small: side_px 64: min_side_px=65"),
        ({"min_aspect": 1.1}, "aspect: aspect 1: min_aspect=1.1"),
        ({"max_aspect": 0.5}, "aspect: aspect 1: max_aspect=0.5"),
        ({"min_fps": 24.0}, "low_fps: fps 8: min_fps=24.0"),
        ({"min_duration_s": 3.0}, "too_short: duration_s 2.125: min_duration_s=3.0"),
    ],
)
def test_sources_beyond_a_limit(limits, said):
    with pytest.raises(ClipRejected) as refused:
        check_source({"probe": facts()}, config=FilterConfig(**limits))
    assert str(refused.value) == said
    picture = {"probe": facts(fps=0.0, end_s=0.0)}
    assert check_source(picture, config=FilterConfig(min_fps=24.0, min_duration_s=3.0)) is picture


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"min_motion": 0.2}, "low_motion: motion 0.1: min_motion=0.2"),
        ({"max_motion": 0.05}, "high_motion: motion 0.1: max_motion=0.05"),
        ({"min_luma": 0.6}, "dark: luma 0.5: min_luma=0.6"),
        ({"max_luma": 0.4}, "bright: luma 0.5: max_luma=0.4"),
        ({"min_contrast": 0.3}, "low_contrast: contrast 0.2: min_contrast=0.3"),
        ({"min_sharpness": 50.0}, "blurred: sharpness 30: min_sharpness=50.0"),
    ],
)
def test_clips_beyond_a_limit(limits, said):
    row = {"scores": [("luma", 0.5), ("contrast", 0.2), ("sharpness", 30.0), ("motion", 0.1)]}
    config = FilterConfig(**limits)
    assert config.needs_scores
    with pytest.raises(ClipRejected) as refused:
        check_scores(row, config=config)
    assert str(refused.value) == said
    assert check_scores({"scores": row["scores"][:3]}, config=FilterConfig(min_motion=1.0))["scores"]  # a picture


def test_limits_are_checked():
    assert not FilterConfig(min_fps=1.0).needs_scores
    with pytest.raises(ValueError, match="min_luma=-0.1: must not be negative"):
        FilterConfig(min_luma=-0.1)
    with pytest.raises(ValueError, match="min_aspect=2.0: must be at most max_aspect=1.0"):
        FilterConfig(min_aspect=2.0, max_aspect=1.0)
