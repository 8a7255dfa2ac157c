"""Encode with a small real VAE on a local cluster: values, order, conservation."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from einops import rearrange

from pipeline import media, schema, store
from pipeline.curate import CurateConfig, curate_stages
from pipeline.encode import EncodeConfig, EncodeShard, encode
from pipeline.errors import ManifestError, TooManyRejectsError
from pipeline.sources import list_sources
from pipeline.stages import guard
from pipeline.stages.decode import read_clip
from pipeline.stages.reader import ClipReader
from pipeline.tasks import TaskFolder
from tests.pipeline.test_decode import moving, png_bytes
from video_dit.text import HashedWordConfig, HashedWordEncoder
from video_dit.vae import VideoVAE, VideoVAEConfig

CONFIG = EncodeConfig(num_actors=2, rows_per_shard=4, max_pixels_per_batch=2 * 17 * 64 * 64, timeout_s=10.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A published model folder with a small VAE of random weights and a hashed-word text encoder."""

    def produce(folder):
        torch.manual_seed(0)
        sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": (1, 1, 2, 2), "num_res_blocks": 1}
        VideoVAE(VideoVAEConfig(**sizes, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)).save_pretrained(
            store.join(folder, "model")
        )
        HashedWordEncoder(HashedWordConfig(dim=24, position_dim=8)).save_pretrained(store.join(folder, "model"))
        return store.Produced(counts={})

    return store.publish_once(str(tmp_path_factory.mktemp("models")), "train_vae", "small", {}, [], produce)


@pytest.fixture
def clips(tmp_path):
    """A published table of five videos of two shapes and a picture."""
    source = tmp_path / "videos"
    source.mkdir()
    for number in range(5):
        (source / f"clip_{number}.mp4").write_bytes(media.encode_mp4(moving(9 + 8 * (number % 2), 48, 64), 8))
        (source / f"clip_{number}.txt").write_text(f"ramp number {number}")
    (source / "picture.png").write_bytes(png_bytes())

    def produce(folder):
        with ClipReader() as reader:
            stages = curate_stages(CurateConfig(), reader)
            found = [dataclasses.asdict(row) for row in list_sources(str(source))]
            rows = [after for before in found for after in guard.run_stages(before, stages)]
        table = [{name: row[name] for name in schema.CLIPS.names} for row in rows]
        return store.Produced(counts={"clips": 6}, files={"clips": [store.write_shard(folder, "clips", table)]})

    return store.publish_once(str(tmp_path / "out"), "curate", "videos", {"source": str(source)}, [], produce)


def run(clips, model, tmp_path, config=CONFIG):
    return encode(config, clips, model, store.join(model.uri, "model"), str(tmp_path / "out"))


def array(row, name):
    return np.frombuffer(row[name], np.float16).reshape(row[f"{name}_shape"])


def check_latents(rows, sources, model):
    """The rows hold, in the clips' order, what VAE and text encoder say of each clip alone."""
    vae = VideoVAE.from_pretrained(store.join(model.uri, "model")).eval()
    words = HashedWordEncoder(HashedWordConfig(dim=24, position_dim=8))
    window = ("start_s", "end_s", "fps", "height_px", "width_px", "num_frames")
    for row, source in zip(rows, sources, strict=True):
        clip = read_clip(source["source_uri"], **{name: source[name] for name in window})
        video = rearrange(torch.from_numpy(clip.video_u8.copy()), "t h w c -> 1 c t h w") / 127.5 - 1
        with torch.inference_mode():
            expected = vae.encode(video).mean[0].numpy()
        assert row["clip_id"] == source["clip_id"]
        assert np.allclose(array(row, "latents"), expected, atol=2e-3, rtol=2e-3)
        assert np.array_equal(array(row, "text"), words([source["caption"]])[0].half().numpy())
        assert (row["lineage"], row["decode_backend"]) == (source["lineage"], clip.backend)


def test_values_order_and_identity(ray_cluster, clips, model, tmp_path):
    made = run(clips, model, tmp_path)
    assert made.counts == {"clips": 6, "latents": 6, "rejects": 0}
    assert len(made.files["latents"]) == 2
    check_latents(made.read("latents").to_pylist(), clips.read("clips").to_pylist(), model)
    assert [parent["hash"] for parent in made.parents] == [clips.hash, model.hash]
    assert json.loads(Path(made.uri, "report.json").read_text())["frames_per_s"] > 0
    assert run(clips, model, tmp_path) == made
    Path(made.uri, "manifest.json").unlink()
    alone = run(clips, model, tmp_path, dataclasses.replace(CONFIG, num_actors=1))
    assert (alone.hash, alone.files, alone.counts) == (made.hash, made.files, made.counts)


def test_a_shard_keeps_its_good_rows_and_rejects_the_others(clips, model, tmp_path):
    table = clips.read("clips")
    damaged, missing = (Path(uri) for uri in table["source_uri"].to_pylist()[1:3])
    damaged.write_bytes(b"gone bad")
    missing.unlink()
    odd = table.to_pylist()
    odd[3]["num_frames"] = 10  # not 1 + a multiple of the VAE's stride
    folder = tmp_path / "odd"
    names = [store.write_shard(str(folder), "clips", part) for part in (odd[:2], odd[2:])]
    given = dataclasses.replace(clips, uri=str(folder), files={"clips": names})
    (parts,) = given.slices("clips", 8)
    work = EncodeShard(CONFIG, given, store.join(model.uri, "model"), str(tmp_path / "shard"))
    record = work(pa.Table.from_pylist(parts), TaskFolder(str(tmp_path / "shard")).attempt(7))
    assert (record["num_rows"], record["num_latents"], record["num_rejects"]) == (6, 3, 3)
    assert record["num_frames"] == 9 + 9 + 1
    rejects = pq.read_table(tmp_path / "shard" / record["files"]["rejects"]).to_pylist()
    assert [reject["what"] for reject in rejects] == [row["clip_id"] for row in odd[1:4]]
    assert [reject["reason"] for reject in rejects] == ["unreadable", "unreadable", "wrong_frames"]
    assert "use 9 or 13" in rejects[2]["detail"]
    with pq.ParquetFile(tmp_path / "shard" / record["files"]["latents"]) as file:
        check_latents(file.read().to_pylist(), [odd[0], *odd[4:]], model)


def test_too_many_rejects_publish_nothing(ray_cluster, clips, model, tmp_path):
    for uri in clips.read("clips")["source_uri"].to_pylist():
        Path(uri).unlink()
    with pytest.raises(TooManyRejectsError, match=r"6 of 6 rows gave nothing \(unreadable 6\)"):
        run(clips, model, tmp_path)
    (folder,) = (tmp_path / "out" / "encode").iterdir()
    assert not (folder / "manifest.json").exists()
    assert list((folder / "rejects").iterdir())


def test_the_wrong_parent_is_named(model, tmp_path):
    with pytest.raises(ManifestError, match="holds no clips"):
        encode(CONFIG, model, model, model.uri, str(tmp_path))


@pytest.mark.parametrize("wrong", [{"rows_per_shard": 0}, {"timeout_s": 0.0}, {"num_gpus": -1.0}, {"num_actors": 0}])
def test_config_names_field_value_and_rule(wrong):
    with pytest.raises(ValueError, match="must"):
        EncodeConfig(**wrong)
