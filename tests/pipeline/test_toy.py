"""The toy world and its judge: exact captions, a fixed held-out set, and measurements that see what was drawn."""

import itertools
from collections import Counter

import numpy as np
import pytest

from pipeline import media, store, toy, toy_checker, toy_scenes
from video_dit.shapes import VideoShape

CONFIG = toy.ToyConfig(num_clips=440, seed=7)
RED_CIRCLE = {"colour": "red", "shape": "circle", "size": "large", "background": "black"}


def everything() -> list[toy_scenes.Scene]:
    return [*toy_scenes.all_scenes(), *toy_scenes.all_scenes(images=True)]


def through_file(clip: toy.ToyClip) -> np.ndarray:
    return clip.video_u8 if clip.scene.is_image else media.decode_frames(media.encode_mp4(clip.video_u8, toy.FPS))


def degrade(video_u8: np.ndarray, rng: np.random.Generator, sigma_px: float = 1.0, noise: float = 8.0) -> np.ndarray:
    """Gaussian blur over rows and columns, then white noise."""
    offsets = np.arange(-4, 5)
    kernel = np.exp(-0.5 * (offsets / sigma_px) ** 2)
    kernel /= kernel.sum()
    video = video_u8.astype(np.float64)
    for axis in (1, 2):
        padding = [(4, 4) if each == axis else (0, 0) for each in range(4)]
        padded = np.pad(video, padding, mode="edge")
        size = video.shape[axis]
        video = sum(k * np.take(padded, np.arange(i, i + size), axis) for i, k in enumerate(kernel))
    return (video + rng.normal(0, noise, video.shape)).clip(0, 255).round().astype(np.uint8)


def moving(**changes: str | None) -> toy_scenes.Scene:
    return toy_scenes.Scene(**{**RED_CIRCLE, "direction": "right", "speed": "slow", **changes})


def film(scene: toy_scenes.Scene, start: tuple[float, float] = (20, 14), num_frames: int = 17) -> np.ndarray:
    return toy.render(scene, num_frames, 64, 64, start)


@pytest.fixture(scope="module")
def clips() -> list[tuple[toy.ToyClip, np.ndarray]]:
    made = [toy.toy_clip(CONFIG, index) for index in range(CONFIG.num_clips)]
    return [(clip, through_file(clip)) for clip in made]


def test_held_out_is_a_fixed_tenth_and_training_sees_every_value():
    for images, num_scenes, num_held_out in ((False, 1836, 189), (True, 108, 11)):
        scenes = toy_scenes.all_scenes(images=images)
        trained = [scene for scene in scenes if not toy_scenes.is_held_out(scene)]
        assert len(set(scenes)) == num_scenes
        assert num_scenes - len(trained) == num_held_out
        for name in toy_scenes.ATTRIBUTES:
            assert {getattr(s, name) for s in trained} == {getattr(s, name) for s in scenes}


def test_captions_state_the_scene_in_every_phrasing():
    for scene in everything():
        captions = [toy_scenes.caption(scene, variant) for variant in range(toy_scenes.NUM_VARIANTS)]
        assert len(set(captions)) == toy_scenes.NUM_VARIANTS >= 6
        assert {toy_scenes.parse_caption(words) for words in captions} == {scene}


def test_captions_by_hand():
    assert toy_scenes.caption(moving(), 0) == "a large red circle moves slowly to the right on a black background"
    fast = moving(direction="up left", speed="fast", shape="square", background="white")
    assert toy_scenes.caption(fast, 1) == "on a white background, a large red square moves quickly up and to the left"
    assert (
        toy_scenes.caption(moving(direction="still", speed=None), 0)
        == "a large red circle stays still on a black background"
    )
    assert (
        toy_scenes.caption(toy_scenes.Scene(**RED_CIRCLE), 2) == "a picture of a large red circle on a black background"
    )
    assert toy_scenes.caption(toy_scenes.Scene(**RED_CIRCLE), 6) == "a large red circle, the background is black"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a large circle on a black background", "no colour"),
        ("a red large circle", "no background"),
        ("a red and blue large circle on a black background", "red and blue colour"),
        ("a large red circle moves to the right on a black background", "no speed"),
        ("a large red circle moves slowly on a black background", "no direction"),
        ("a large red circle moves slowly up and down on a black background", "up down direction"),
    ],
)
def test_captions_that_state_too_little_or_too_much(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        toy_scenes.parse_caption(text)


def test_scene_and_config_name_what_is_wrong():
    with pytest.raises(ValueError, match="colour='pink'"):
        moving(colour="pink")
    with pytest.raises(ValueError, match="speed='slow'"):
        moving(direction="still")
    with pytest.raises(ValueError, match="speed=None"):
        moving(speed=None)
    for field, value in (("num_clips", 0), ("seed", -1), ("image_share", 1.5)):
        with pytest.raises(ValueError, match=f"{field}={value}"):
            toy.ToyConfig(**{field: value})


@pytest.mark.parametrize("size", list(toy_scenes.SIZES_PX))
@pytest.mark.parametrize(("shape", "share"), list(toy_checker.AREA_SHARE.items()))
def test_coverage_has_the_area_and_centre_of_the_shape(shape: str, share: float, size: str):
    across_px = toy_scenes.SIZES_PX[size]
    middle_px = np.array([[20.3, 17.8]])
    alpha = toy.coverage(shape, across_px, middle_px, 40, 36)[0]
    assert alpha.sum() == pytest.approx(share * across_px**2, rel=0.02)
    centroid_px = [(alpha.sum(1) @ (np.arange(40) + 0.5)), (alpha.sum(0) @ (np.arange(36) + 0.5))] / alpha.sum()
    below_px = toy_checker.CENTROID_BELOW_MIDDLE[shape] * across_px
    np.testing.assert_allclose(centroid_px, middle_px[0] + [below_px, 0], atol=0.1)
    rows, columns = (np.flatnonzero(alpha.max(axis) > 0.5) for axis in (1, 0))
    assert abs(np.ptp(rows) + 1 - across_px) <= 1
    assert abs(np.ptp(columns) + 1 - across_px) <= 1


def test_render_moves_by_the_stated_pixels_and_stays_inside():
    for scene in toy_scenes.all_scenes()[::31]:
        shape = next(shape for shape in toy.clip_shapes()[::-1] if toy.fits(scene, shape))
        for start in toy.start_range(scene, shape):
            video_u8 = toy.render(scene, *shape, start)
            border = np.concatenate([video_u8[:, [0, -1]].reshape(-1, 3), video_u8[:, :, [0, -1]].reshape(-1, 3)])
            assert (border == toy_scenes.BACKGROUNDS[scene.background]).all()
    velocity_px = moving(direction="down left", speed="fast").velocity_px
    np.testing.assert_allclose(velocity_px, [2, -2])
    np.testing.assert_array_equal(film(moving(), (30, 20))[4], film(moving(), (30, 24))[0])


def test_render_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="start="):
        film(moving(), (30, 5))
    with pytest.raises(ValueError, match="start="):
        film(toy_scenes.Scene(**RED_CIRCLE))
    assert not toy.fits(moving(speed="fast"), VideoShape(17, 64, 57))  # 32 + 24 + 2 columns
    assert toy.fits(moving(speed="fast"), VideoShape(17, 32, 58))


def test_toy_clip_is_a_pure_function_of_seed_and_index(clips):
    again, original = toy.toy_clip(CONFIG, 12), clips[12][0]
    assert again[:2] == original[:2]
    np.testing.assert_array_equal(again.video_u8, original.video_u8)
    assert toy.toy_clip(toy.ToyConfig(seed=8), 12)[:2] != original[:2]
    grown = toy.toy_clip(toy.ToyConfig(num_clips=9999, seed=7), 12)
    assert grown.caption == original.caption


def test_clips_are_small_varied_and_never_held_out(clips):
    scenes = [clip.scene for clip, _ in clips]
    shapes = np.array([clip.video_u8.shape[:3] for clip, _ in clips])
    assert not any(map(toy_scenes.is_held_out, scenes))
    assert all(toy_scenes.parse_caption(clip.caption) == clip.scene for clip, _ in clips)
    assert {VideoShape(*shape) for shape in shapes.tolist()} <= set(toy.clip_shapes())
    assert np.mean([scene.is_image for scene in scenes]) == pytest.approx(0.15, abs=0.04)
    videos = shapes[shapes[:, 0] > 1]
    assert videos.mean(0) == pytest.approx([10.7, 51, 51], rel=0.1)
    assert set(videos[:, 0]) == {9, 17, 25, 33}


def test_evaluation_prompts_are_held_out_and_even():
    prompts = toy.evaluation_prompts(60, seed=3)
    assert prompts == toy.evaluation_prompts(60, seed=3) != toy.evaluation_prompts(60, seed=4)
    assert prompts[:20] == toy.evaluation_prompts(20, seed=3)
    assert len({scene for scene, _, _ in prompts}) == 60
    assert sum(scene.is_image for scene, _, _ in prompts) == 9
    for scene, words, shape in prompts:
        assert toy_scenes.is_held_out(scene)
        assert toy_scenes.parse_caption(words) == scene
        assert toy.fits(scene, shape)
    for name in toy_scenes.ATTRIBUTES:
        counts = Counter(getattr(scene, name) for scene, _, _ in prompts)
        del counts[None]
        assert max(counts.values()) - min(counts.values()) <= 3, counts
    assert len(toy.evaluation_prompts(250, seed=0)) == 250


def test_the_same_video_is_the_same_file():
    clip, junk, files = toy.toy_clip(toy.ToyConfig(num_clips=150, seed=7), 149), [], set()
    for number in range(40):  # whatever lies about in memory
        junk.append(np.full(3000 * (number % 7 + 1), 37 * number % 256, np.uint8))
        del junk[: number % 3 == 0]
        files.add(media.encode_mp4(clip.video_u8, toy.FPS))
    assert len(files) == 1


def test_ray_writes_each_clip_and_caption_once(ray_cluster, tmp_path):
    config = toy.ToyConfig(num_clips=150, seed=7)
    manifest = toy.make_toy_clips(config, str(tmp_path))
    folder = tmp_path / manifest.uri.rsplit("/", 2)[-2] / manifest.uri.rsplit("/", 1)[-1] / "clips"
    kinds = Counter(path.suffix for path in folder.iterdir())
    assert manifest.verb == "toy"
    assert manifest.counts == {"clips": 150, "images": kinds[".png"], "videos": kinds[".mp4"]}
    assert kinds[".txt"] == kinds[".png"] + kinds[".mp4"] == 150
    for index in (0, 63, 64, 149):
        clip = toy.toy_clip(config, index)
        path = folder / f"clip-{index:06d}.{'png' if clip.scene.is_image else 'mp4'}"
        assert path.with_suffix(".txt").read_text() == clip.caption
        np.testing.assert_array_equal(media.decode_frames(path.read_bytes()), through_file(clip))
    assert store.read_json(f"{manifest.uri}/report.json")["clips_per_s"] > 0
    assert toy.make_toy_clips(config, str(tmp_path)) == manifest


def test_checker_is_right_on_files(clips):
    table = toy_checker.score_table([toy_checker.score(video_u8, clip.caption) for clip, video_u8 in clips])
    assert table["all"] >= 0.995, table


def test_checker_tolerates_blur_and_noise(clips):
    rng = np.random.default_rng(0)
    rows = [toy_checker.score(degrade(video_u8, rng), clip.scene) for clip, video_u8 in clips]
    table = toy_checker.score_table(rows)
    assert table["all"] >= 0.97, table


def test_checker_tolerates_sizes_ten_percent_off():
    for shape, (size, across_px), factor in itertools.product(
        toy_checker.AREA_SHARE, toy_scenes.SIZES_PX.items(), (0.9, 1.0, 1.1)
    ):
        alpha = toy.coverage(shape, across_px * factor, np.full((5, 2), 23.7), 48, 48)[..., None]
        video_u8 = (16 + alpha * (np.array([190, 60, 50]) - 16)).astype(np.uint8)  # a paler red as well
        measured = toy_checker.measure(degrade(video_u8, np.random.default_rng(0)))
        assert (measured.colour, measured.shape, measured.size) == ("red", shape, size)


def test_a_caption_wrong_in_one_attribute_fails_in_that_one_only(clips):
    rng = np.random.default_rng(0)
    for clip, video_u8 in clips[:60]:
        stated = [name for name in toy_scenes.ATTRIBUTES if getattr(clip.scene, name) is not None]
        wrong = {
            **toy_scenes.LOOKS,
            "direction": tuple(toy_scenes.DIRECTIONS)[1:],
            "speed": tuple(toy_scenes.SPEEDS_PX),
        }
        for name in stated:
            if clip.scene.direction == "still" and name == "direction":
                continue  # any other direction brings a speed with it
            value = str(rng.choice([value for value in wrong[name] if value != getattr(clip.scene, name)]))
            scene = toy_scenes.Scene(
                **{**{each: getattr(clip.scene, each) for each in toy_scenes.ATTRIBUTES}, name: value}
            )
            row = toy_checker.score(video_u8, toy_scenes.caption(scene, int(rng.integers(9))))
            assert row == {each: each != name for each in stated} | {"all": False}


def spoiled() -> dict[str, np.ndarray]:
    """Videos that begin like a large red circle moving slowly to the right on black, and are not."""
    good, half = film(moving()), 8
    rng = np.random.default_rng(0)

    def then(**changes: str | None) -> np.ndarray:
        return np.concatenate([good[:half], film(moving(**changes))[half:]])

    def beside(start: tuple[float, float], **changes: str | None) -> np.ndarray:
        other = film(moving(**changes), start)
        return np.where((other != toy_scenes.BACKGROUNDS["black"]).any(-1, keepdims=True), other, good)

    blank = np.broadcast_to(np.uint8(toy_scenes.BACKGROUNDS["black"]), good.shape)
    return {
        "vanishes": np.concatenate([good[:half], blank[half:]]),
        "appears": np.concatenate([blank[:3], good[3:]]),
        "blinks": np.concatenate([good[:half], blank[:2], good[half + 2 :]]),
        "changes colour": then(colour="green"),
        "changes colour late": np.concatenate([good[:14], film(moving(colour="yellow"))[14:]]),
        "changes shape": then(shape="square"),
        "changes size": then(size="small"),
        "changes background": then(background="white"),
        "turns back": np.concatenate([good[:half], good[half::-1], good[:half]]),
        "jumps": np.concatenate([good[:half], film(moving(), (30, 18))[half:]]),
        "stops": np.concatenate(
            [film(moving(speed="fast"))[:half], film(moving(speed="fast"))[half : half + 1].repeat(9, 0)]
        ),
        "two alike": beside((48, 33)),
        "two close": beside((45, 16)),
        "a second one, small": beside((54, 38), size="small"),
        "a second one, small and blue": beside((54, 38), size="small", colour="blue"),
        "a second one, overlapping": beside((33, 22), shape="square", colour="blue"),
        "blank": blank,
        "noise": rng.integers(0, 256, good.shape, dtype=np.uint8),
        "gray noise": rng.normal(128, 30, good.shape).clip(0, 255).astype(np.uint8),
        "scrambled in time": good[rng.permutation(len(good))],
        "flattened": good[:, ::2],
        "all red": np.broadcast_to(np.uint8(toy_scenes.COLOURS["red"]), good.shape),
    }


@pytest.mark.parametrize("name", list(spoiled()))
def test_checker_fails_spoiled_videos(name: str):
    assert toy_checker.score(film(moving()), moving())["all"]
    video_u8 = spoiled()[name]
    assert not toy_checker.score(video_u8, moving())["all"]
    assert not toy_checker.score(video_u8, moving(speed="fast"))["all"]


def test_measure_blank_and_score_image():
    blank = np.full((9, 32, 32, 3), 240, np.uint8)
    assert toy_checker.measure(blank) == toy_checker.Measured(background="white")
    picture = toy_scenes.Scene(**RED_CIRCLE)
    row = toy_checker.score(toy.render(picture, 1, 48, 48, (20, 20)), picture)
    assert row == dict.fromkeys([*toy_scenes.LOOKS, "all"], True)
    assert toy_checker.score(toy.render(picture, 1, 48, 48, (20, 20)), moving())["direction"] is False


def test_score_table_counts_only_rows_that_have_the_attribute():
    rows = [{"colour": True, "all": True}, {"colour": False, "speed": True, "all": False}]
    assert toy_checker.score_table(rows) == {"colour": 0.5, "speed": 1.0, "all": 0.5}
    with pytest.raises(ValueError, match="rows"):
        toy_checker.score_table([])
