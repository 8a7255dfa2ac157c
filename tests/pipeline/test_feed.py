"""Random access to LATENTS, the bounded cache and prefetching."""

import itertools
import time

import numpy as np
import pytest
import torch

from pipeline import store
from pipeline.feed import BoundedCache, LatentDataset, pinned, prefetch
from video_dit.diffusion.losses import DiffusionBatch
from video_dit.packing import pack
from video_dit.shapes import Stride


def latents_row(number):
    shape = (2, 1 + number % 3, 2, 4)
    return {
        "clip_id": f"clip{number}",
        "latents": np.full(shape, number, np.float16).tobytes(),
        "latents_std": np.full(shape, 0.5, np.float16).tobytes() if number % 2 else None,
        "latents_shape": list(shape),
        "text": np.full((1 + number % 4, 3), -number, np.float16).tobytes(),
        "text_shape": [1 + number % 4, 3],
        "caption": "",
        "fps": 8.0 if number else 6.0,
        "decode_backend": "decord",
        "lineage": {"source_id": "", "caption_source": "sidecar"},
    }


@pytest.fixture
def manifest(tmp_path):
    def produce(folder):
        rows = [latents_row(number) for number in range(30)]
        files = [store.write_shard(folder, "latents", part, rows_per_group=4) for part in (rows[:17], rows[17:])]
        return store.Produced(counts={"latents": 30}, files={"latents": files})

    return store.publish_once(str(tmp_path), "encode", "test", {}, [], produce)


def test_samples_come_by_place_in_any_order(manifest):
    data = LatentDataset(manifest, cache_bytes=100)  # smaller than two groups: most reads go to the file
    assert len(data) == 30
    assert data.fps == 8.0
    samples = data.samples(Stride(1, 2, 2))
    assert samples.num_tokens.tolist() == [2 * (1 + number % 3) for number in range(30)]
    assert samples.is_image.tolist() == [number % 3 == 0 for number in range(30)]
    for number in np.random.default_rng(0).permutation(30).tolist():
        sample = data[number]
        assert sample.clip_id == data.clip_ids[number] == f"clip{number}"
        assert torch.equal(sample.latents, torch.full((2, 1 + number % 3, 2, 4), float(number)))
        assert torch.equal(sample.text, torch.full((1 + number % 4, 3), -float(number)))


def test_several_data_sets_lie_one_behind_the_other(manifest):
    data = LatentDataset(manifest, manifest)
    assert data.data_sets == [0] * 30 + [1] * 30 == data.samples(Stride(1, 2, 2)).data_set.tolist()
    assert data[34].clip_id == data.clip_ids[34] == "clip4"


def test_latents_are_drawn_where_the_deviation_is_kept(manifest):
    data = LatentDataset(manifest)
    mean_only, with_std = data[2], data[3]
    assert torch.equal(mean_only.draw(7, 1), mean_only.latents)
    noise = [(with_std.draw(7, step) - 3.0) / 0.5 for step in range(400)]
    assert torch.equal(noise[1] * 0.5 + 3.0, data[3].draw(7, 1))
    assert len({value[0, 0, 0, 0].item() for value in noise}) == 400
    every = torch.stack(noise)
    assert abs(every.mean().item()) < 0.03
    assert abs(every.std().item() - 1) < 0.03


def test_cache_keeps_the_recent_values_that_fit():
    made = []
    cache = BoundedCache(max_bytes=10, size_of=len)

    def get(key):
        return cache.get(key, lambda: made.append(key) or key * 4)

    for key in ("a", "b", "a", "c", "a", "b"):
        assert get(key) == key * 4
    assert made == ["a", "b", "c", "b"]
    assert cache.num_bytes == 8


def test_prefetch_keeps_order_runs_ahead_and_passes_errors_on():
    started = []

    def values():
        for number in range(5):
            started.append(number)
            yield number
        raise KeyError("broken sample")

    batches = prefetch(values(), depth=2)
    assert next(batches).value == 0
    time.sleep(0.3)
    assert started == [0, 1, 2, 3]  # two waiting, one in hand
    assert [batch.value for batch in itertools.islice(batches, 4)] == [1, 2, 3, 4]
    with pytest.raises(KeyError, match="broken sample"):
        next(batches)


def test_waiting_is_measured():
    def values():
        yield 1
        time.sleep(0.2)
        yield 2

    waits = [batch.wait_s for batch in prefetch(values())]
    assert waits[1] > 0.15


def test_pinned_memory_holds_the_same_in_the_same_places(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())  # page-locked where a GPU is
    packed = pack([torch.randn(4, 1, 2, 2), torch.randn(4, 3, 2, 4)], [1.0, 2.0], [torch.randn(2, 3)] * 2)
    batch = DiffusionBatch(packed, target=torch.randn(3, 2), weight=torch.ones(3), sigma=torch.randn(3))
    given = {"batch": batch, "others": [torch.ones(2), "text", None, (torch.zeros(1), 3)]}
    found = pinned(given)
    assert type(found["batch"]) is DiffusionBatch
    for name in ("tokens", "timesteps", "text", "frame_of_token"):
        own, other = getattr(found["batch"].packed, name), getattr(packed, name)
        assert own is not other
        assert torch.equal(own, other)
    assert found["batch"].packed.grids == packed.grids
    assert torch.equal(found["batch"].target, batch.target)
    assert found["batch"].target is not batch.target
    assert found["others"][1:3] == ["text", None]
    assert found["others"][3] == (torch.zeros(1), 3)
