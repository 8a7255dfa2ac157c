"""The toy world: one coloured shape on a plain background, with a caption that states all there is to see.

Small enough for a CPU to learn and exact enough to be judged by arithmetic (`pipeline.toy_checker`): the whole pipeline
runs on it in minutes, from real MP4 files to a generator whose score means something.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import media, store
from video_dit.shapes import VideoShape

Floats = NDArray[np.floating[Any]]

FPS = 8.0
FRAMING_PX = 2.0  # the middle of the path lies so near the middle of the frame: whoever filmed it took aim
MARGIN_PX = 1.0  # kept free around the object, so that its soft edge stays inside as well
COLOURS = {  # saturated, on neutral backgrounds: chroma alone tells them apart
    "red": (220, 40, 40),
    "green": (40, 180, 40),
    "blue": (50, 50, 230),
    "yellow": (220, 220, 40),
    "cyan": (40, 200, 200),
    "magenta": (210, 40, 210),
}
BACKGROUNDS = {"black": (16, 16, 16), "gray": (128, 128, 128), "white": (240, 240, 240)}
SIZES_PX = {"small": 16.0, "large": 24.0}  # across
SPEEDS_PX = {"slow": 1.0, "fast": 2.0}  # a frame, along each axis the object moves on
DIRECTIONS = {  # steps in rows and columns
    "still": (0, 0),
    "right": (0, 1),
    "left": (0, -1),
    "up": (-1, 0),
    "down": (1, 0),
    "up right": (-1, 1),
    "up left": (-1, -1),
    "down right": (1, 1),
    "down left": (1, -1),
}
LOOKS = {  # what an image shows as well: attribute -> values
    "colour": tuple(COLOURS),
    "shape": ("circle", "square", "triangle"),
    "size": tuple(SIZES_PX),
    "background": tuple(BACKGROUNDS),
}
_NUM_LOOKS = {name: len(values) for name, values in LOOKS.items()}
NUM_VALUES = {**_NUM_LOOKS, "direction": len(DIRECTIONS), "speed": len(SPEEDS_PX)}
ATTRIBUTES = tuple(NUM_VALUES)
NUM_FRAMES = (1, 9, 17, 25, 33)  # 1 + a multiple of the video VAE's temporal stride
SIDES_PX = (32, 48, 64, 80, 96)
MAX_ASPECT = 2
HELD_OUT_ONE_IN = 10
CLIPS_PER_TASK = 64

_ADVERBS = {"slowly": "slow", "quickly": "fast"}
_MOTION_WORDS = {"moves", "moving", "up", "down", "left", "right", *_ADVERBS}
_PHRASES = (
    "a {size} {colour} {shape} {moves} on a {background} background",
    "on a {background} background, a {size} {colour} {shape} {moves}",
    "a {medium} of a {size} {colour} {shape} {moving} on a {background} background",
    "the background is {background} and a {size} {colour} {shape} {moves}",
    "a {shape}, {size} and {colour}, {moves} on a {background} background",
    "a {medium} with a {background} background and a {size} {colour} {shape} {moving}",
    "a {size} {colour} {shape} {moving}, the background is {background}",
)
NUM_VARIANTS = len(_PHRASES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """All there is to know of a toy clip but its shape and start. Values are keys of the tables above.

    `direction` is None in an image; `speed` is None in an image and when the object is still.
    """

    colour: str
    shape: str
    size: str
    background: str
    direction: str | None = None
    speed: str | None = None

    def __post_init__(self) -> None:
        speeds = (None,) if self.direction in (None, "still") else tuple(SPEEDS_PX)
        for name, values in {**LOOKS, "direction": (None, *DIRECTIONS), "speed": speeds}.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}, must be one of {values}")

    @property
    def is_image(self) -> bool:
        """Whether the scene has no motion, not even stillness."""
        return self.direction is None

    @functools.cached_property
    def velocity_px(self) -> Floats:
        """Rows and columns a frame."""
        return np.array(DIRECTIONS[self.direction or "still"]) * SPEEDS_PX.get(self.speed or "", 0.0)


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


@functools.cache
def all_scenes(*, images: bool = False) -> tuple[Scene, ...]:
    """Every combination of attributes: 1836 videos, or 108 images."""
    looks = [dict(zip(LOOKS, values, strict=True)) for values in itertools.product(*LOOKS.values())]
    moving = [direction for direction in DIRECTIONS if direction != "still"]
    motions = [(None, None)] if images else [("still", None), *itertools.product(moving, SPEEDS_PX)]
    return tuple(Scene(**look, direction=direction, speed=speed) for look in looks for direction, speed in motions)


def is_held_out(scene: Scene) -> bool:
    """Whether the scene is kept for evaluation: a tenth of all combinations, the same ones whatever the seed."""
    key = ":".join(str(getattr(scene, name)) for name in ATTRIBUTES)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()) % HELD_OUT_ONE_IN == 0


@functools.cache
def select_scenes(*, images: bool, held_out: bool) -> tuple[Scene, ...]:
    """The scenes kept for evaluation, or the others."""
    return tuple(scene for scene in all_scenes(images=images) if is_held_out(scene) == held_out)


def caption(scene: Scene, variant: int) -> str:
    """The scene in words that state every attribute; `variant` (modulo NUM_VARIANTS) picks the phrasing."""
    medium, moves, moving = "video", "stays still", "standing still"
    if scene.is_image:
        medium, moves, moving = "picture", "is shown", ""
    elif scene.speed:
        steps = [f"to the {step}" if step in ("left", "right") else step for step in str(scene.direction).split()]
        way = " ".join([*(word for word, speed in _ADVERBS.items() if speed == scene.speed), " and ".join(steps)])
        moves, moving = f"moves {way}", f"moving {way}"
    phrase = _PHRASES[variant % NUM_VARIANTS]
    text = phrase.format(medium=medium, moves=moves, moving=moving, **dataclasses.asdict(scene))
    return " ".join(text.split()).replace(" ,", ",")  # an image has nothing where the motion stands


def parse_caption(text: str) -> Scene:
    """The scene a caption states, in one of the phrasings or others of the same words; without motion it is an image.

    Raises:
        ValueError: an attribute is missing or named twice; the message says which.
    """
    words = re.findall(r"[a-z]+", text.lower())

    def the_one(name: str, values: Sequence[str]) -> str:
        found = [value for value in values if value in words]
        if len(found) != 1:
            raise ValueError(f"caption {text!r} names {' and '.join(found) or 'no'} {name}, must be one of {values}")
        return found[0]

    direction = speed = None
    if "still" in words:
        direction = "still"
    elif _MOTION_WORDS.intersection(words):
        speed = _ADVERBS[the_one("speed", tuple(_ADVERBS))]
        direction = " ".join(word for word in ("up", "down", "left", "right") if word in words)
        if direction not in DIRECTIONS:
            raise ValueError(f"caption {text!r} names {direction or 'no'} direction, must be one of {[*DIRECTIONS]}")
    looks = {name: the_one(name, values) for name, values in LOOKS.items()}
    return Scene(**looks, direction=direction, speed=speed)


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
