"""Over a real S3 server, in this process: listing, reading by ranges, and a job whose results are there."""

import os
import subprocess
import sys

import numpy as np
import pytest

from pipeline import media, store
from pipeline.errors import ClipRejected, SourceError
from pipeline.sources import list_sources
from pipeline.stages.decode import read_clip
from pipeline.stages.reader import ClipReader
from tests.pipeline.clip_files import encode, moving
from tests.s3_server import s3_server

s3fs = pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

pytestmark = pytest.mark.usefixtures("bucket")


@pytest.fixture(scope="module")
def bucket():
    """A bucket of three videos with captions; the environment that leads to it."""
    with s3_server() as client:
        client.create_bucket(Bucket="videos")
        for number in range(3):
            video = media.encode_mp4(moving(17 + 8 * number), 8)
            client.put_object(Bucket="videos", Key=f"in/clip{number}.mp4", Body=video)
            client.put_object(Bucket="videos", Key=f"in/clip{number}.txt", Body=f"number {number}".encode())
        rows = "\n".join(f'{{"video": "in/clip{number}.mp4", "caption": "row {number}"}}' for number in range(2))
        client.put_object(Bucket="videos", Key="list.jsonl", Body=rows.encode())
        yield client


def test_folders_and_manifests_are_listed():
    rows = list_sources("s3://videos/in")
    assert [row.source_uri for row in rows] == [f"s3://videos/in/clip{number}.mp4" for number in range(3)]
    assert [row.caption for row in rows] == ["number 0", "number 1", "number 2"]
    assert len({row.version for row in rows}) == 3
    assert [row.caption for row in list_sources("s3://videos/list.jsonl")] == ["row 0", "row 1"]
    with pytest.raises(SourceError, match="is not there"):
        list_sources("s3://videos/nothing")


def test_missing_credentials_are_named(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(SourceError, match=r"NoCredentialsError.*kinoray\[s3\].*AWS_ACCESS_KEY_ID"):
        list_sources("s3://videos/in")
    with pytest.raises(ClipRejected, match="unreadable: .*NoCredentialsError"):
        read_clip("s3://videos/in/clip0.mp4", 0.0, 1.0)
    s3fs.S3FileSystem.clear_instance_cache()


def test_the_readers_child_reaches_the_bucket():
    with ClipReader() as reader:
        assert reader.probe("s3://videos/in/clip1.mp4").num_frames == 25
        clip = reader.read("s3://videos/in/clip1.mp4", 1.0, 2.0, fps=8.0)
    assert clip.video_u8.shape == (8, 64, 64, 3)


def test_a_window_of_a_large_file_is_a_part_of_its_bytes(bucket, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (600, 192, 192, 3), np.uint8)
    data = encode(noise, fps=24, options={"g": "24"})
    bucket.put_object(Bucket="videos", Key="large.mp4", Body=data)
    fetched = []
    fetch = s3fs.core.S3File._fetch_range
    monkeypatch.setattr(s3fs.core.S3File, "_fetch_range", lambda file, a, b: fetched.append(b - a) or fetch(file, a, b))
    clip = read_clip("s3://videos/large.mp4", 8.0, 8.5)
    assert clip.video_u8.shape == (12, 192, 192, 3)
    assert 0 < sum(fetched) <= 6 << 20 < len(data)  # begin, index, window


def test_a_job_reads_and_writes_buckets_and_the_second_run_is_a_lookup(tmp_path):
    command = [sys.executable, "jobs/curate_clips.py", "--source", "s3://videos/in", "--storage", "s3://videos/out"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path)}
    environment.pop("RAY_ADDRESS", None)
    done = [subprocess.run(command, env=environment, capture_output=True, text=True, check=True) for _ in range(2)]
    results = [run.stdout.strip().splitlines()[-1].removeprefix("result: ") for run in done]
    assert results[0] == results[1]
    made = store.Manifest.load(results[0])
    assert made.uri.startswith("s3://videos/out/curate/in-")
    assert made.counts == {"sources": 3, "clips": 3, "rejects": 0}
    assert made.read("clips")["caption"].to_pylist() == ["number 0", "number 1", "number 2"]
    assert store.exists(store.join(made.uri, "report.html"))
