"""The figures of a result and its page: against the tables, with hostile texts."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from pipeline import media, report, report_page, store
from tests.pipeline.clip_files import moving
from tests.pipeline.test_feed import latents_row

HOSTILE = "<script>alert('x')</script> & \"more\""


def clip_row(number, uri):
    return {
        "clip_id": f"{number:016x}",
        "source_uri": uri,
        "start_s": 0.0,
        "end_s": 2.125 if number % 2 else 1.125,
        "fps": 8.0,
        "num_frames": 17 if number % 2 else 9,
        "height_px": 64,
        "width_px": 64 if number % 3 else 32,
        "caption": HOSTILE if number == 0 else "two words",
        "scores": [("motion", number / 10)] if number else [],
        "lineage": {"source_id": "s", "caption_source": "sidecar" if number % 2 else "filename"},
    }


def reject_row(number):
    return {
        "what": f"/no/{number}{HOSTILE}.mp4",
        "reason": "timeout" if number else "unreadable",
        "detail": "d",
        "stage": "probe",
    }


@pytest.fixture
def curated(tmp_path):
    """Ten clips in three files, seven rejects."""
    video = tmp_path / "a.mp4"
    video.write_bytes(media.encode_mp4(moving(17), 8))

    def produce(folder):
        clips = [clip_row(number, str(video)) for number in range(10)]
        names = [store.write_shard(folder, "clips", part) for part in (clips[:3], clips[3:4], clips[4:])]
        rejects = [store.write_shard(folder, "rejects", [reject_row(number) for number in range(7)])]
        return store.Produced(
            counts={"sources": 17, "clips": 10, "rejects": 7}, files={"clips": names, "rejects": rejects}
        )

    config = {"source": "/videos", "source_hash": "abc"}
    return store.publish_once(str(tmp_path), "curate", "test", config, [], produce)


def test_figures_are_those_of_the_tables(curated):
    made = report.make_report(curated)
    assert made.sizes == [("64 x 64", 6), ("64 x 32", 4)]
    assert sorted(made.caption_sources) == [("filename", 5), ("sidecar", 5)]
    assert made.reasons == [("timeout", 6), ("unreadable", 1)]
    assert [len(made.examples[reason]) for reason in ("timeout", "unreadable")] == [5, 1]
    charts = {chart.name: chart for chart in made.histograms}
    assert charts["frames"].counts.tolist() == [5, 0, 0, 0, 0, 0, 0, 0, 5]
    assert (charts["frames"].edges[0], charts["frames"].low, charts["frames"].high) == (8.5, 9, 17)
    assert charts["motion"].counts.sum() == 9
    assert charts["motion"].mean == pytest.approx(0.5)
    assert charts["duration, s"].mean == pytest.approx(1.625)
    assert charts["width / height"].counts[[0, -1]].tolist() == [4, 6]
    assert charts["caption, words"].counts.sum() == 10
    assert [step["verb"] for step in made.lineage] == ["curate", "source"]


@pytest.mark.parametrize("num", [1, 2, 4, 10, 20])
def test_rows_are_spread_over_the_table(curated, num):
    ids = [int(row["clip_id"], 16) for row in report.spread(curated, "clips", num, ["clip_id"])]
    assert ids == np.unique(np.linspace(0, 9, min(num, 10)).round().astype(int)).tolist()


def test_the_page_shows_clips_and_escapes_texts(curated):
    url = report_page.write_page(curated, num_thumbnails=5)
    text = store.read_bytes(url).decode()
    assert url == f"{curated.uri}/report.html"
    assert "<script>" not in text
    assert text.count("&lt;script&gt;") >= 2
    images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", text)]
    assert [image.size for image in images] == [(180, 120)] + [(360, 120)] * 3 + [(180, 120)]
    assert text.count("no picture: unreadable") == 5
    assert not re.findall(r"(?:src|href)=\"(?!data:)", text)  # nothing from elsewhere


def test_results_of_encode_find_their_clips(curated, tmp_path):
    def produce(folder):
        rows = [{**latents_row(number), "clip_id": f"{number:016x}"} for number in (1, 4)]
        reject = {"what": f"{2:016x}", "reason": "crashed", "detail": "died", "stage": "decode"}
        return store.Produced(
            counts={"clips": 3, "latents": 2, "rejects": 1},
            files={
                "latents": [store.write_shard(folder, "latents", rows)],
                "rejects": [store.write_shard(folder, "rejects", [reject])],
            },
        )

    encoded = store.publish_once(str(tmp_path), "encode", "test", {}, [curated], produce)
    made = report.make_report(encoded)
    charts = {chart.name: chart for chart in made.histograms}
    assert charts["latent positions (t h w)"].mean == pytest.approx((2 * 8 + 2 * 8) / 2)
    assert [step["verb"] for step in made.lineage] == ["encode", "curate", "source"]
    text = report_page.page(made, 5)
    assert text.count("data:image/jpeg") == 3


def test_results_without_tables_have_counts_and_lineage(curated, tmp_path):
    trained = store.publish_once(
        str(tmp_path), "train_vae", "vae", {"steps": 3}, [curated], lambda folder: store.Produced(counts={"steps": 3})
    )
    text = report_page.page(report.make_report(trained), 5)
    assert "<b>3</b>" in text
    assert curated.hash in text
    assert "<h2>Rejects" not in text
