"""What there is in the toy world: every scene, the ones held out from training, and the words for them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
VALUES = {**LOOKS, "direction": tuple(DIRECTIONS), "speed": tuple(SPEEDS_PX)}
NUM_VALUES = {name: len(values) for name, values in VALUES.items()}
ATTRIBUTES = tuple(VALUES)
HELD_OUT_ONE_IN = 10

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
    def velocity_px(self) -> NDArray[np.float64]:
        """Rows and columns a frame."""
        return np.array(DIRECTIONS[self.direction or "still"]) * SPEEDS_PX.get(self.speed or "", 0.0)


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
