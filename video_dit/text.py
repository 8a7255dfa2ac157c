"""Text encoders: captions to sequences of vectors, unpadded.

`HashedWordEncoder` needs no weights: a word's vector is drawn from a hash of its spelling (feature hashing), its place
in the sentence is a sinusoid beside it. It is enough for worlds with a small vocabulary, and exact everywhere.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from video_dit import weights

END_OF_TEXT = "</s>"


class TextEncoder(Protocol):
    """Captions to vectors."""

    @property
    def dim(self) -> int:
        """Width d of the vectors."""

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """One (s, d) float tensor a caption, s >= 1 even for the empty caption."""

    def save_pretrained(self, url: str, subfolder: str = "text_encoder") -> None:
        """Write the encoder into a model folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HashedWordConfig:
    """Sizes of a hashed-word encoder.

    Attributes:
        dim: width of a vector: hashed part plus place.
        position_dim: how much of `dim` tells the word's place.
        max_words: words beyond are an error, never cut in silence.
    """

    dim: int = 96
    position_dim: int = 16
    max_words: int = 256

    def __post_init__(self) -> None:
        if self.position_dim < 2 or self.position_dim % 2:
            raise ValueError(f"position_dim={self.position_dim}: must be even and at least 2 (sine and cosine pairs)")
        if self.dim - self.position_dim < 8 or (self.dim - self.position_dim) % 8:
            raise ValueError(f"dim={self.dim}: dim - position_dim must be a positive multiple of 8 (one bit a sign)")


class HashedWordEncoder:
    """Frozen feature hashing (Weinberger et al., arXiv 0902.2206): signs from a hash of each word, plus its place."""

    def __init__(self, config: HashedWordConfig) -> None:
        self.config = config

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.config.dim

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Encode captions; case and punctuation are ignored.

        Returns:
            one float32 (s, dim) tensor a caption: a row a word, then one for the end.

        Raises:
            ValueError: a caption of more than `max_words` words.
        """
        return [self._encode(caption) for caption in captions]

    def _encode(self, caption: str) -> Tensor:
        words = [*re.findall(r"\w+", caption.lower()), END_OF_TEXT]
        if len(words) - 1 > self.config.max_words:
            raise ValueError(f"caption of {len(words) - 1} words: max_words={self.config.max_words}")
        signs = torch.stack([self._signs(word) for word in words])  # s d'
        return torch.cat([signs, self._positions(len(words))], dim=1)  # s d

    def _signs(self, word: str) -> Tensor:
        num_bytes = (self.config.dim - self.config.position_dim) // 8
        digest = hashlib.shake_256(word.encode()).digest(num_bytes)
        bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8))
        return torch.from_numpy(bits.astype(np.float32)) * 2 - 1

    def _positions(self, num_words: int) -> Tensor:
        half = self.config.position_dim // 2
        frequency = torch.exp(-math.log(100.0) * torch.arange(half) / half)
        angle = torch.arange(num_words)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    def save_pretrained(self, url: str, subfolder: str = "text_encoder") -> None:
        """Write the encoder's config; there are no weights."""
        config = {"_class_name": type(self).__name__, **dataclasses.asdict(self.config)}
        weights.write_bytes((json.dumps(config, indent=2) + "\n").encode(), url, subfolder, "config.json")


def load_text_encoder(url: str, subfolder: str = "text_encoder") -> TextEncoder:
    """The text encoder of a model folder.

    Raises:
        ValueError: an encoder this version does not know.
    """
    name = json.loads(weights.read_bytes(url, subfolder, "config.json")).get("_class_name")
    if name != HashedWordEncoder.__name__:
        raise ValueError(f"{url}/{subfolder}: text encoder {name!r} is not known; known: {HashedWordEncoder.__name__}")
    return HashedWordEncoder(weights.read_config(HashedWordConfig, url, subfolder))
