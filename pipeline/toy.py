"""Clips of the toy world: one coloured shape on a plain background, with a caption that states all there is to see.

Small enough for a CPU to learn and exact enough to be judged by arithmetic (`pipeline.toy_checker`): the whole pipeline
runs on it in minutes, from real MP4 files to a generator whose score means something.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import media, store
from pipeline.toy_scenes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    NUM_VALUES,
    NUM_VARIANTS,
    SIZES_PX,
    Scene,
    caption,
    select_scenes,
)
from video_dit.shapes import VideoShape

Floats = NDArray[np.floating[Any]]

FPS = 8.0
FRAMING_PX = 2.0  # the middle of the path lies so near the middle of the frame: whoever filmed it took aim
MARGIN_PX = 1.0  # kept free around the object, so that its soft edge stays inside as well
NUM_FRAMES = (1, 9, 17, 25, 33)  # 1 + a multiple of the video VAE's temporal stride
SIDES_PX = (32, 48, 64, 80, 96)
MAX_ASPECT = 2
CLIPS_PER_TASK = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig:
    """Which toy clips to make: how many, images and videos together; their seed; the expected share of images."""

    num_clips: int = 3000
    seed: int = 0
    image_share: float = 0.15

    def __post_init__(self) -> None:
        if self.num_clips < 1:
            raise ValueError(f"num_clips={self.num_clips}, must be at least 1")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}, must not be negative")
        if not 0 <= self.image_share <= 1:
            raise ValueError(f"image_share={self.image_share}, must be in [0, 1]")


class ToyClip(NamedTuple):
    """A scene, one of its captions and its frames (t h w 3)."""

    scene: Scene
    caption: str
    video_u8: media.Frames


class EvaluationPrompt(NamedTuple):
    """A scene never shown in training, one of its captions and the shape to generate it in."""

    scene: Scene
    caption: str
    shape: VideoShape


def coverage(shape: str, across_px: Floats | float, middles_px: Floats, height_px: int, width_px: int) -> Floats:
    """How much of each pixel the object covers, t h w in [0, 1]: its signed distance, softened over one pixel.

    Args:
        shape: squares lie parallel to the axes; triangles point up and are as high as they are wide.
        across_px: one size, or one a frame.
        middles_px: t 2, row and column of the middle of the bounding box; pixel i spans i .. i + 1.
    """
    half = np.reshape(across_px, (-1, 1, 1)) / 2
    y = np.arange(height_px)[:, None] + 0.5 - middles_px[:, 0, None, None]  # t h 1
    x = np.abs(np.arange(width_px) + 0.5 - middles_px[:, 1, None, None])  # t 1 w
    distance = (np.hypot(y, x) if shape == "circle" else np.maximum(np.abs(y), x)) - half
    if shape == "triangle":
        distance = np.maximum(distance, (2 * x - y - half) / math.sqrt(5))  # a square without what lies above the sides
    return np.clip(0.5 - distance, 0, 1)


def start_range(scene: Scene, shape: VideoShape) -> tuple[Floats, Floats]:
    """Lowest and highest start (row, column) that keep the object inside; lowest > highest where nothing does."""
    travel_px = scene.velocity_px * (shape.t - 1)
    reach_px = SIZES_PX[scene.size] / 2 + MARGIN_PX
    return reach_px - np.minimum(0, travel_px), np.array(shape[1:]) - reach_px - np.maximum(0, travel_px)


def draw_start(scene: Scene, shape: VideoShape, rng: np.random.Generator) -> Floats:
    """A start (row, column) that keeps the object inside and its path near the middle of the frame."""
    lowest, highest = start_range(scene, shape)
    centred = (lowest + highest) / 2
    return rng.uniform(np.maximum(lowest, centred - FRAMING_PX), np.minimum(highest, centred + FRAMING_PX))


def fits(scene: Scene, shape: VideoShape) -> bool:
    """Whether the whole motion fits into the frame, and an image scene meets an image shape."""
    lowest, highest = start_range(scene, shape)
    return scene.is_image == (shape.t == 1) and bool(np.all(lowest <= highest))


def render(
    scene: Scene, num_frames: int, height_px: int, width_px: int, start: Sequence[float] | Floats
) -> media.Frames:
    """The scene's frames, t h w 3 uint8 at FPS, from `start`: row and column of the bounding box's middle at first.

    Raises:
        ValueError: the object leaves the frame, or an image has more than one frame.
    """
    shape = VideoShape(num_frames, height_px, width_px)
    lowest, highest = start_range(scene, shape)
    if not fits(scene, shape) or np.any(start < lowest) or np.any(start > highest):
        raise ValueError(f"start={tuple(start)} in {shape}, must be in {lowest} .. {highest} for {scene}")
    middles_px = np.asarray(start) + scene.velocity_px * np.arange(num_frames)[:, None]
    alpha = coverage(scene.shape, SIZES_PX[scene.size], middles_px, height_px, width_px)[..., None]  # t h w 1
    colour, background = np.array(COLOURS[scene.colour]), np.array(BACKGROUNDS[scene.background])
    return (background + alpha * (colour - background)).round().astype(np.uint8)


@functools.cache
def clip_shapes() -> tuple[VideoShape, ...]:
    """Every shape a toy clip may have, images (one frame) first."""
    sides = [(h, w) for h in SIDES_PX for w in SIDES_PX if max(h, w) <= MAX_ASPECT * min(h, w)]
    return tuple(VideoShape(t, h, w) for t in NUM_FRAMES for h, w in sides)


def draw_shape(scene: Scene, rng: np.random.Generator) -> VideoShape:
    """One of the shapes that the scene fits into, the small ones more often: CPUs train on them."""
    shapes = [shape for shape in clip_shapes() if fits(scene, shape)]
    weights = np.array([1 / (t**1.5 * (h * w) ** 3) for t, h, w in shapes])  # a mean video of about 10.7 x 51 x 51
    return shapes[rng.choice(len(shapes), p=weights / weights.sum())]


def toy_clip(config: ToyConfig, index: int) -> ToyClip:
    """The training clip of an index, never of a held-out scene: a pure function of seed, image share and index."""
    rng = np.random.default_rng([config.seed, index])
    scenes = select_scenes(images=bool(rng.random() < config.image_share), held_out=False)
    scene = scenes[rng.integers(len(scenes))]
    shape = draw_shape(scene, rng)
    start = draw_start(scene, shape, rng)
    return ToyClip(scene, caption(scene, int(rng.integers(NUM_VARIANTS))), render(scene, *shape, start))


def evaluation_prompts(num: int, seed: int, image_share: float = 0.15) -> list[EvaluationPrompt]:
    """`num` held-out scenes to generate, as even over the values of each attribute as they allow.

    A pure function of its arguments. Any first k are as even; when the scenes are used up they come again.
    """
    rng = np.random.default_rng(seed)
    used: Counter[Any] = Counter()  # scenes, and (attribute, value)

    def cost(scene: Scene) -> tuple[float, ...]:
        common = sum(NUM_VALUES[name] * used[name, getattr(scene, name)] for name in ATTRIBUTES)
        return used[scene], common, rng.random()

    prompts = []
    for index in range(num):
        is_image = int((index + 1) * image_share) > int(index * image_share)
        scene = min(select_scenes(images=is_image, held_out=True), key=cost)
        used.update([scene, *((name, getattr(scene, name)) for name in ATTRIBUTES)])
        words = caption(scene, int(rng.integers(NUM_VARIANTS)))
        prompts.append(EvaluationPrompt(scene, words, draw_shape(scene, rng)))
    return prompts


def write_clips(batch: dict[str, NDArray[Any]], config: ToyConfig, folder: str) -> dict[str, NDArray[Any]]:
    """Write the clips of the indices in `batch["id"]` and their captions into `folder`; one row of counts."""
    counts = Counter(images=0, videos=0)
    fs, path = store.filesystem(folder)
    for index in batch["id"].tolist():
        scene, words, video_u8 = toy_clip(config, index)
        counts["images" if scene.is_image else "videos"] += 1
        data = media.encode_png(video_u8[0]) if scene.is_image else media.encode_mp4(video_u8, FPS)
        stem = store.join(path, f"clip-{index:06d}")
        fs.pipe_file(f"{stem}.{'png' if scene.is_image else 'mp4'}", data)  # the manifest vouches for all files at once
        fs.pipe_file(f"{stem}.txt", words.encode())
    return {kind: np.array([count]) for kind, count in counts.items()}


def make_toy_clips(config: ToyConfig, storage: str) -> store.Manifest:
    """Write the clips as MP4 and PNG files, each with its caption in a .txt beside it, below `<uri>/clips/`.

    Runs on the connected Ray cluster; the same config is made once.
    """

    def produce(uri: str) -> store.Produced:
        import ray

        folder = store.join(uri, "clips")
        fs, path = store.filesystem(folder)
        fs.makedirs(path, exist_ok=True)
        start_s = time.monotonic()
        indices = ray.data.range(config.num_clips, override_num_blocks=math.ceil(config.num_clips / CLIPS_PER_TASK))
        write = functools.partial(write_clips, config=config, folder=folder)
        rows = indices.map_batches(write, batch_size=CLIPS_PER_TASK).take_all()
        counts = {kind: sum(row[kind] for row in rows) for kind in ("images", "videos")}
        assert sum(counts.values()) == config.num_clips
        return store.Produced(
            counts={"clips": config.num_clips, **counts},
            measures={"clips_per_s": round(config.num_clips / (time.monotonic() - start_s), 1)},
        )

    return store.publish_once(storage, "toy", "clips", dataclasses.asdict(config), [], produce)
