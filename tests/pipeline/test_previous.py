"""An earlier result is used again: only what is new, changed or failed by chance is done."""

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline import media, store
from pipeline.curate import CurateConfig, curate
from pipeline.encode import EncodeConfig, encode
from pipeline.errors import ManifestError
from pipeline.previous import source_keys
from pipeline.source_rows import SourceRow
from tests.pipeline.clip_files import moving
from tests.pipeline.test_encode import model  # noqa: F401 - a fixture

CURATE = CurateConfig(num_actors=2, max_reject_fraction=0.9)
ENCODE = EncodeConfig(num_actors=2, rows_per_shard=2)


def write(folder, name, first_value, caption=None):
    video = moving(17)
    video[0, 0, 0] = first_value
    (folder / f"{name}.mp4").write_bytes(media.encode_mp4(video, 8))
    if caption:
        (folder / f"{name}.txt").write_text(caption)


def rows_of(manifest, table):
    return {row["clip_id"]: row for row in manifest.read(table).to_pylist()}


def reused(manifest):
    return json.loads(Path(manifest.uri, "report.json").read_text())["reused"]


def test_only_what_is_new_is_done(ray_cluster, model, tmp_path):  # noqa: F811
    folder, weights = tmp_path / "videos", store.join(model.uri, "model")
    folder.mkdir()
    for number in range(5):
        write(folder, f"clip{number}", 10 * number, f"number {number}")
    (folder / "late.mp4").write_bytes(b"not yet here")
    (folder / "short.mp4").write_bytes(media.encode_mp4(moving(3), 8))
    before = curate(CURATE, str(folder), str(tmp_path / "out"))
    assert before.counts == {"sources": 7, "clips": 5, "rejects": 2}
    latents = encode(ENCODE, before, model, weights, str(tmp_path / "out"))

    write(folder, "late", 77)  # failed by chance
    write(folder, "aaa_new", 88)
    (folder / "clip1.txt").write_text("another caption")
    (folder / "clip2.mp4").unlink()
    config = dataclasses.replace(CURATE, previous=before.uri)
    after = curate(config, str(folder), str(tmp_path / "out"))
    fresh = curate(CURATE, str(folder), str(tmp_path / "fresh"))
    assert after.counts == fresh.counts == {"sources": 7, "clips": 6, "rejects": 1}
    assert rows_of(after, "clips") == rows_of(fresh, "clips")
    assert after.read("rejects") == fresh.read("rejects")
    assert reused(after) == 4  # clip0, clip3, clip4 and the one that is too short for good
    assert [parent["hash"] for parent in after.parents] == [before.hash]
    assert curate(config, str(folder), str(tmp_path / "out")) == after

    more = encode(dataclasses.replace(ENCODE, previous=latents.uri), after, model, weights, str(tmp_path / "out"))
    whole = encode(ENCODE, after, model, weights, str(tmp_path / "fresh"))
    assert more.counts == whole.counts == {"clips": 6, "latents": 6, "rejects": 0}
    ours, theirs = rows_of(more, "latents"), rows_of(whole, "latents")
    assert {clip: row["caption"] for clip, row in ours.items()} == {
        clip: row["caption"] for clip, row in theirs.items()
    }
    assert reused(more) == 3
    assert [parent["hash"] for parent in more.parents] == [after.hash, model.hash, latents.hash]


def test_what_cannot_be_used_again_is_refused(ray_cluster, model, tmp_path):  # noqa: F811
    folder, out = tmp_path / "videos", str(tmp_path / "out")
    folder.mkdir()
    write(folder, "one", 1)
    made = curate(CURATE, str(folder), out)
    with pytest.raises(ManifestError, match=r"fps was 8.0 and is 4.0; take the old values"):
        curate(dataclasses.replace(CURATE, fps=4.0, previous=made.uri), str(folder), out)
    with pytest.raises(ManifestError, match="is a result of train_vae, must be one of curate"):
        curate(dataclasses.replace(CURATE, previous=model.uri), str(folder), out)
    latents = encode(ENCODE, made, model, store.join(model.uri, "model"), out)
    other = dataclasses.replace(model, hash="0" * 12)
    with pytest.raises(ManifestError, match="made with another model"):
        encode(dataclasses.replace(ENCODE, previous=latents.uri), made, other, store.join(model.uri, "model"), out)


def test_keys_of_equal_rows_differ():
    row = SourceRow(source_uri="a.mp4", version="1")
    changed = dataclasses.replace(row, version="2")
    keys = source_keys([row, changed, row, row])
    assert len(set(keys)) == 4
    assert keys[2:] == [f"{keys[0]}-1", f"{keys[0]}-2"]
    assert source_keys([changed, row]) == [keys[1], keys[0]]
