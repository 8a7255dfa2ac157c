"""What VAE training feeds on and measures: keyed crops, the loss's elements, latent statistics, PSNR."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from jobs.recipes import toy_cpu
from pipeline import media, store
from pipeline.reconstruction import latent_statistics, reconstruction_scores, reconstruction_table, to_video
from pipeline.train_vae import VaeTask, random_crop
from video_dit.train_step import MicroBatch, train_step
from video_dit.training import SingleProcess, TrainState
from video_dit.vae import VideoVAE
from video_dit.vae_losses import VaeLossConfig

CONFIG = toy_cpu().vae
SHAPES = [(17, 32, 48), (1, 48, 32), (9, 32, 32)]


def clip_video(number):
    rng = np.random.default_rng(number)
    return rng.integers(0, 256, (*SHAPES[number], 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clips_uri(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")

    def produce(uri):
        rows = []
        for number, (num_frames, height_px, width_px) in enumerate(SHAPES):
            is_image = num_frames == 1
            path = folder / f"{number}.{'png' if is_image else 'mp4'}"
            video_u8 = clip_video(number)
            path.write_bytes(media.encode_png(video_u8[0]) if is_image else media.encode_mp4(video_u8, 8.0))
            rows.append(
                {
                    "clip_id": f"clip{number}",
                    "source_uri": str(path),
                    "start_s": 0.0,
                    "end_s": num_frames / 8,
                    "fps": 8.0,
                    "num_frames": num_frames,
                    "height_px": height_px,
                    "width_px": width_px,
                    "caption": "",
                    "scores": {},
                    "lineage": {"source_id": "", "caption_source": "sidecar"},
                }
            )
        return store.Produced(counts={"clips": 3}, files={"clips": [store.write_shard(uri, "clips", rows)]})

    return store.publish_once(str(folder), "curate", "test", {}, [], produce).uri


@pytest.fixture(scope="module")
def trainee(clips_uri):
    config = dataclasses.replace(CONFIG, image_steps=10, crop_frames=9, crop_px=32)
    return VaeTask(clips_uri=clips_uri, config=config).build()


def test_a_crop_is_a_part_of_the_video_and_a_function_of_its_key():
    video_u8 = np.arange(9 * 40 * 50 * 3, dtype=np.int64).reshape(9, 40, 50, 3)
    crop = random_crop(video_u8, 5, 32, 0, 7, "clip")
    assert crop.shape == (5, 32, 32, 3)
    t, y, x, _ = np.argwhere(video_u8 == crop[0, 0, 0, 0])[0]
    assert np.array_equal(crop, video_u8[t : t + 5, y : y + 32, x : x + 32])
    assert np.array_equal(crop, random_crop(video_u8, 5, 32, 0, 7, "clip"))
    starts = {int(random_crop(video_u8, 5, 32, 0, step, "clip")[0, 0, 0, 0]) for step in range(40)}
    assert len(starts) > 30
    assert random_crop(video_u8, 99, 99, 0).shape == (9, 40, 50, 3)


def test_pictures_first_then_videos(trainee):
    assert trainee.samples.num_tokens.tolist() == [9, 1, 9]
    pictures, videos = (trainee.load(step, (0, 1, 2)).videos for step in (9, 10))
    assert [tuple(video.shape) for video in pictures] == [(3, 3, 1, 32, 32)]
    assert sorted(tuple(video.shape) for video in videos) == [(1, 3, 1, 32, 32), (2, 3, 9, 32, 32)]
    assert trainee.num_elements(9, (0, 1, 2)) == sum(video.numel() for video in pictures)
    assert trainee.num_elements(10, (0, 1, 2)) == sum(video.numel() for video in videos)
    assert trainee.sample_ids((2, 0)) == ("clip2", "clip0")


def test_losses_are_sums_over_the_elements_of_all_shapes(trainee):
    both, first, second = (trainee.load(10, places) for places in ((0, 1), (0,), (1,)))
    losses = trainee.loss_function(trainee.model, both)
    assert losses == trainee.loss_function(trainee.model, both)  # its noise has a key too
    assert set(losses) == {"l2", "l1", "gradient", "kl"}
    assert 0.05 < losses["l2"] / trainee.num_elements(10, (0, 1)) < 2
    parts = [trainee.loss_function(trainee.model, batch)["l2"] for batch in (first, second)]
    assert losses["l2"].item() == pytest.approx(sum(parts).item(), rel=1e-2)  # but for the noise


def test_a_discriminator_trains_beside_the_vae_and_stays_out_of_the_model_folder(trainee, clips_uri, tmp_path):
    loss = VaeLossConfig(l1_weight=1.0, gradient_weight=0.5, adversarial_weight=0.1, adversarial_start=1)
    config = dataclasses.replace(trainee.config, loss=loss, num_statistics_clips=2)
    task = VaeTask(clips_uri=clips_uri, config=config)
    torch.manual_seed(0)
    adversarial = task.build()
    state = TrainState(adversarial.model, task.optimizer, SingleProcess(), task.part_optimizers)
    rows = []
    for step in range(3):
        batch = MicroBatch(inputs=adversarial.load(step + 10, (0, 2)), weight=1.0, sample_ids=())
        elements = adversarial.num_elements(step + 10, (0, 2))
        rows.append(train_step(state, [batch], adversarial.loss_function, elements))
    assert rows[0]["discriminator"] == pytest.approx(2, abs=0.5)
    assert {"l1", "l2", "gradient", "kl", "adversarial", "r1", "grad_norm_discriminator"} <= set(rows[0])
    figures = adversarial.export(str(tmp_path), state.ema)
    rows = json.loads((tmp_path / "reconstruction.json").read_text())
    assert len(rows) == 2
    assert figures["psnr_db"] == pytest.approx(np.mean([row["psnr_db"] for row in rows]))
    VideoVAE.from_pretrained(str(tmp_path))


def test_statistics_normalise_the_latents():
    torch.manual_seed(0)
    vae = VideoVAE(CONFIG.vae).eval()
    videos = [clip_video(number) for number in range(3)]
    vae.with_latent_statistics(*latent_statistics(vae, videos))
    with torch.no_grad():
        means = [vae.encode(to_video(video_u8[None])).mean[0].flatten(1) for video_u8 in videos]
    values = torch.cat(means, dim=1)
    assert torch.allclose(values.mean(dim=1), torch.zeros(16), atol=1e-4)
    assert torch.allclose(values.std(dim=1), torch.ones(16), atol=1e-3)


def test_psnr_is_that_of_its_definition():
    class Shifted:
        """Gives the video back, 0.1 too bright."""

        def encode(self, video):
            self.mean = video
            return self

        def decode(self, latents):
            return latents + 0.1

    rows = reconstruction_scores(Shifted(), [clip_video(2), clip_video(0), clip_video(2)])
    assert [(row["frames"], row["height_px"], row["width_px"]) for row in rows] == [
        (9, 32, 32),
        (17, 32, 48),
        (9, 32, 32),
    ]
    assert rows[0]["psnr_db"] == pytest.approx(10 * np.log10(2**2 / 0.1**2), rel=1e-4)


def test_the_table_has_frequent_shapes_first_and_all_clips():
    sizes = [32, 48, 48, 64, 80, 48, 32]
    rows = [{"frames": 9, "height_px": size, "width_px": 32, "psnr_db": size / 2, "ssim": size / 100} for size in sizes]
    assert reconstruction_table(rows, most=2) == {
        "9x48x32": {"clips": 3, "psnr_db": 24, "ssim": pytest.approx(0.48)},
        "9x32x32": {"clips": 2, "psnr_db": 16, "ssim": pytest.approx(0.32)},
        "2 other shapes": {"clips": 2, "psnr_db": 36, "ssim": pytest.approx(0.72)},
        "all": {"clips": 7, "psnr_db": pytest.approx(sum(sizes) / 14), "ssim": pytest.approx(sum(sizes) / 700)},
    }
    assert list(reconstruction_table(rows[:1])) == ["9x32x32", "all"]


def test_the_worst_the_median_and_the_best_are_shown(trainee, tmp_path):
    torch.manual_seed(0)
    trainee.export(str(tmp_path), trainee.model.state_dict())
    shown, _ = trainee.show(str(tmp_path))
    rows = sorted(json.loads((tmp_path / "reconstruction.json").read_text()), key=lambda row: row["psnr_db"])
    for name, row in zip(("worst", "median", "best"), (rows[0], rows[len(rows) // 2], rows[-1]), strict=True):
        above, below = np.split(shown[f"reconstructions/{name}"], 2, axis=1)
        assert above.shape[1] == row["height_px"]
        assert 10 * np.log10(255**2 / np.square(above.astype(float) - below).mean()) == pytest.approx(
            row["psnr_db"], abs=0.2
        )
    assert (tmp_path / "reconstructions.png").exists()


def test_crops_must_fit_the_stride():
    with pytest.raises(ValueError, match="crop_frames=8: must be 1 \\+ a multiple of 4"):
        dataclasses.replace(CONFIG, crop_frames=8)
    with pytest.raises(ValueError, match="crop_px=20: must be a multiple of 8"):
        dataclasses.replace(CONFIG, crop_px=20)
