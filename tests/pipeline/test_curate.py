"""Curate on a local cluster: conservation, identity, rejects."""

import dataclasses
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipeline import media
from pipeline.curate import CurateConfig, curate
from pipeline.errors import SourceError, TooManyRejectsError
from pipeline.stages.caption import CaptionConfig
from pipeline.stages.filters import FilterConfig
from tests.pipeline.fake_endpoint import completion, endpoint
from tests.pipeline.test_decode import audio_only, moving, png_bytes
from tests.pipeline.test_near_duplicates import scene

CONFIG = CurateConfig(num_actors=2, timeout_s=10.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Seven files: three good ones, a copy, and three of no use."""
    source = tmp_path_factory.mktemp("curate") / "videos"
    source.mkdir()
    (source / "a_red_car.mp4").write_bytes(media.encode_mp4(moving(45), 8))
    shutil.copy(source / "a_red_car.mp4", source / "copy.mp4")
    (source / "b.mp4").write_bytes(media.encode_mp4(moving(17, 48, 96), 8))
    (source / "b.txt").write_text("a ramp")
    (source / "c.png").write_bytes(png_bytes())
    (source / "short.mp4").write_bytes(media.encode_mp4(moving(5), 8))
    (source / "text.mp4").write_text("hello")
    audio_only(source / "audio.mp4")
    return source


@pytest.fixture(scope="module")
def made(ray_cluster, folder):
    return curate(CONFIG, str(folder), str(folder.parent / "out"))


def test_every_source_becomes_clips_or_rejects(made):
    clips, rejects = made.read("clips").to_pylist(), made.read("rejects").to_pylist()
    assert made.counts == {"sources": 7, "clips": 4, "rejects": 5}
    assert (len(clips), len(rejects)) == (4, 5)
    shapes = [(clip["num_frames"], clip["height_px"], clip["width_px"], clip["fps"]) for clip in clips]
    assert shapes == [(33, 64, 64, 8.0), (9, 64, 64, 8.0), (17, 48, 96, 8.0), (1, 64, 64, 8.0)]
    assert [clip["caption"] for clip in clips] == ["a red car", "a red car", "a ramp", "c"]
    assert [clip["lineage"]["caption_source"] for clip in clips] == ["filename", "filename", "sidecar", "filename"]
    reasons = {Path(reject["what"]).name: reject["reason"] for reject in rejects if reject["reason"] != "duplicate"}
    assert reasons == {"audio.mp4": "not_video", "short.mp4": "too_short", "text.mp4": "unreadable"}
    copies = [reject for reject in rejects if reject["reason"] == "duplicate"]
    assert [reject["what"] for reject in copies] == [clip["clip_id"] for clip in clips[:2]]
    assert all("copy.mp4" in reject["detail"] for reject in copies)
    report = json.loads(Path(made.uri, "report.json").read_text())
    assert (report["rejects_duplicate"], report["clip_frames"]) == (2, 60)


def test_the_same_call_is_a_lookup_and_another_place_gives_the_same_files(made, folder, tmp_path):
    published_ns = Path(made.uri, "manifest.json").stat().st_mtime_ns
    assert curate(CONFIG, str(folder), str(folder.parent / "out")) == made
    assert Path(made.uri, "manifest.json").stat().st_mtime_ns == published_ns
    alone = curate(dataclasses.replace(CONFIG, num_actors=1), str(folder), str(tmp_path))
    assert (alone.hash, alone.files) == (made.hash, made.files)


def test_cuts_scores_filters_and_near_copies(ray_cluster, tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    two_scenes = np.concatenate([scene(1), scene(2)])
    (source / "a.mp4").write_bytes(media.encode_mp4(two_scenes, 8))
    again = np.stack([cv2.resize(frame, (128, 128), interpolation=cv2.INTER_CUBIC) for frame in scene(2)])
    (source / "b_larger.mp4").write_bytes(media.encode_mp4(again, 8))
    (source / "c_frozen.mp4").write_bytes(media.encode_mp4(np.repeat(scene(3)[:1], 17, axis=0), 8))
    (source / "d_wide.mp4").write_bytes(media.encode_mp4(moving(17, 48, 96), 8))
    config = dataclasses.replace(
        CONFIG,
        filters=FilterConfig(min_motion=0.02, max_aspect=1.5),
        near_duplicate_bits=12,
        max_reject_fraction=0.6,
    )
    made = curate(config, str(source), str(tmp_path / "out"))
    clips, rejects = made.read("clips").to_pylist(), made.read("rejects").to_pylist()
    assert [(clip["start_s"], clip["num_frames"]) for clip in clips] == [(0.0, 17), (17 / 8, 17)]
    assert dict(clips[0]["scores"])["motion"] == pytest.approx(16 / 96, rel=0.15)
    assert [(reject["stage"], reject["reason"]) for reject in rejects] == [
        ("dedupe", "near_duplicate"), ("filter", "low_motion"), ("filter", "aspect")
    ]  # fmt: skip
    assert rejects[0]["detail"].endswith("a.mp4 at 2.125 s")


def test_missing_captions_are_asked_for_clip_by_clip(ray_cluster, tmp_path):
    source = tmp_path / "videos"
    source.mkdir()
    (source / "a.mp4").write_bytes(media.encode_mp4(moving(45), 8))
    (source / "b.mp4").write_bytes(media.encode_mp4(moving(17), 8))
    (source / "b.txt").write_text("a given caption")
    with endpoint(completion("A grey ramp grows brighter.")) as server:
        asked = CaptionConfig(fallback="endpoint", url=server.url, model="seer", num_frames=3, num_tries=1)
        config = dataclasses.replace(CONFIG, caption=asked, max_reject_fraction=0.9)
        clips = curate(config, str(source), str(tmp_path / "out")).read("clips").to_pylist()
        assert [clip["caption"] for clip in clips] == ["A grey ramp grows brighter."] * 2 + ["a given caption"]
        assert [clip["lineage"]["caption_source"] for clip in clips] == ["endpoint:seer"] * 2 + ["sidecar"]
        assert len(server.requests) == 2
        assert len(server.requests[0][2]["messages"][0]["content"]) == 4  # three frames and the question
        server.replies[:] = [(400, {}, b"no")]
        (source / "c.mp4").write_bytes(media.encode_mp4(moving(17, 48, 96), 8))
        rejects = curate(config, str(source), str(tmp_path / "out")).read("rejects").to_pylist()
    assert [(reject["stage"], reject["reason"]) for reject in rejects] == [("caption_clip", "caption_failed")] * 3


def test_too_many_rejects_publish_nothing(ray_cluster, folder, tmp_path):
    manifest = tmp_path / "list.jsonl"
    rows = [{"video": str(folder / "b.mp4")}, {"caption": "no file"}, {"video": "missing.mp4"}]
    manifest.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(TooManyRejectsError, match=r"2 of 3 rows gave nothing \(bad_row 1, unreadable 1\)"):
        curate(CONFIG, str(manifest), str(tmp_path / "out"))
    (unpublished,) = (tmp_path / "out" / "curate").iterdir()
    assert not (unpublished / "manifest.json").exists()
    assert [path.suffix for path in (unpublished / "rejects").iterdir()] == [".parquet"]


def test_no_source_is_an_error_before_the_cluster(tmp_path):
    with pytest.raises(SourceError):
        curate(CONFIG, str(tmp_path / "none"), str(tmp_path / "out"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"fps": 0.0},
        {"max_frames": 32},
        {"min_frames": 34},
        {"max_side_px": 8},
        {"max_reject_fraction": 2.0},
        {"num_actors": 0},
        {"hop_frames": 0},
        {"scene_threshold": 1.0},
        {"near_duplicate_bits": 24},
        {"rows_per_shard": 0},
    ],
)
def test_config_names_field_value_and_rule(wrong):
    with pytest.raises(ValueError, match="must"):
        CurateConfig(**wrong)
