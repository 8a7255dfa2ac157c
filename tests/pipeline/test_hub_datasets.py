"""Datasets with a Video or Image column, as the datasets library writes them: read in place, never unpacked."""

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import media
from pipeline.errors import ClipRejected, SourceError
from pipeline.sources import list_sources
from pipeline.stages import files
from pipeline.stages.decode import read_clip
from pipeline.stages.probe import inspect
from tests.pipeline.clip_files import moving, picture_bytes

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def videos():
    return [media.encode_mp4(moving(9 + 8 * number), 8) for number in range(5)]


def with_videos(values, captions):
    features = datasets.Features({"video": datasets.Video(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_dict({"video": values, "caption": captions}, features=features)


def test_embedded_videos_are_read_where_they_are(tmp_path, videos):
    folder = tmp_path / "data"
    folder.mkdir()
    values = [{"bytes": video, "path": f"clip{number}.mp4"} for number, video in enumerate(videos)]
    table = with_videos(values, [f"number {number}" for number in range(5)])
    for shard in range(2):
        part = table.shard(2, shard, contiguous=True)
        part.to_parquet(folder / f"train-{shard:05}-of-00002.parquet", batch_size=2)
    rows = list_sources(str(tmp_path))
    first = str(folder / "train-00000-of-00002.parquet")
    assert [row.source_uri for row in rows[:3]] == [f"{first}#video@{row}#clip{row}.mp4" for row in range(3)]
    assert [row.caption for row in rows] == [f"number {number}" for number in range(5)]
    assert {row.problem for row in rows} == {None}
    for number, row in enumerate(rows):
        assert inspect(row.source_uri).num_frames == 9 + 8 * number
        (tmp_path / "plain.mp4").write_bytes(videos[number])
        plain = read_clip(str(tmp_path / "plain.mp4"), 0.25, 1.0)
        assert np.array_equal(read_clip(row.source_uri, 0.25, 1.0).video_u8, plain.video_u8)
    before = rows[0].version
    os.utime(first, (1, 1))
    assert list_sources(str(tmp_path))[0].version != before


def test_listing_reads_no_videos(tmp_path, videos, monkeypatch):
    values = [{"bytes": videos[0] + bytes(1 << 20), "path": "a.mp4"}] * 20
    with_videos(values, ["x"] * 20).to_parquet(tmp_path / "data.parquet")
    read = []
    reads = pq.ParquetFile.read_row_group

    def spy(file, group, columns):
        read.append(columns)
        return reads(file, group, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", spy)
    assert len(list_sources(str(tmp_path))) == 20
    assert read
    assert all(columns == ["video.path", "caption"] for columns in read)


def test_paths_beside_and_pictures(tmp_path, videos):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(videos[1])
    file = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # written so without embed_external_files
    table = {"video": pa.array([{"bytes": None, "path": "clips/a.mp4"}], file), "caption": ["beside"]}
    pq.write_table(pa.table(table), tmp_path / "paths.parquet")
    (row,) = list_sources(str(tmp_path / "paths.parquet"))
    assert (row.source_uri, row.caption) == (str(tmp_path / "clips" / "a.mp4"), "beside")
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    pictures = {"image": [{"bytes": picture_bytes(), "path": None}], "text": ["a picture"]}
    datasets.Dataset.from_dict(pictures, features=features).to_parquet(tmp_path / "pictures.parquet")
    (row,) = list_sources(str(tmp_path / "pictures.parquet"))
    assert (row.source_uri.rsplit("#", 1)[1], row.caption) == ("picture.png", "a picture")
    assert inspect(row.source_uri).num_frames == 1


def test_video_folders(tmp_path, videos):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        for number in range(2):
            (tmp_path / split / f"{number}.mp4").write_bytes(videos[number])
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\n0.mp4,zero\n1.mp4,one\n")
    (tmp_path / "test" / "metadata.jsonl").write_text(json.dumps({"file_name": "0.mp4", "text": "two"}))
    rows = {row.source_uri.removeprefix(f"{tmp_path}/"): row.caption for row in list_sources(str(tmp_path))}
    assert rows == {"train/0.mp4": "zero", "train/1.mp4": "one", "test/0.mp4": "two", "test/1.mp4": None}


def test_damage_and_other_forms_are_told(tmp_path, videos):
    values = [{"bytes": video, "path": "a.mp4"} for video in (*videos[:2], b"")]
    with_videos(values, ["a", "b", "c"]).to_parquet(tmp_path / "good.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    bad, *good = list_sources(str(tmp_path))
    assert "cannot be read" in bad.problem
    assert [row.problem for row in good] == [None] * 3
    for uri in (good[2].source_uri, files.embedded_uri(str(tmp_path / "good.parquet"), "video", 7, "a.mp4")):
        with pytest.raises(ClipRejected, match="unreadable.*no bytes in row"):
            inspect(uri)
    with_videos(values, ["a", "b", "c"]).save_to_disk(tmp_path / "saved")
    with pytest.raises(SourceError, match=r"save_to_disk.*to_parquet"):
        list_sources(str(tmp_path / "saved"))
