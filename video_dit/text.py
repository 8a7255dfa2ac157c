"""Text encoders: captions to sequences of vectors, of the length that their model folder asks for.

`HashedWordEncoder` needs no weights: a word's vector is drawn from a hash of its spelling (feature hashing), its place
in the sentence is a sinusoid beside it. It is enough for worlds with a small vocabulary, and exact everywhere.
`UMT5Encoder` is what Wan's transformers were trained with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import html
import json
import math
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Protocol

import fsspec
import numpy as np
import torch
import torch.nn.functional as F
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor, nn

from video_dit import weights

END_OF_TEXT = "</s>"


class TextEncoder(Protocol):
    """Captions to vectors.

    Attributes:
        index_rows: what a folder's `model_index.json` says of it: component, library and class.
    """

    index_rows: ClassVar[tuple[tuple[str, str, str], ...]]

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

    index_rows: ClassVar[tuple[tuple[str, str, str], ...]] = (("text_encoder", __name__, "HashedWordEncoder"),)

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class UMT5Config:
    """How captions become a UMT5 encoder's vectors; the folder's config.json may say so beside transformers' fields.

    Attributes:
        d_model: width of a vector.
        max_tokens: captions of more tokens are an error, never cut in silence.
        zero_padded: every caption gets `max_tokens` vectors, zeros behind its own. Wan's transformers look at the zeros
            too, without a mask, and were trained so; False leaves captions as long as they are.
    """

    d_model: int
    max_tokens: int = 512
    zero_padded: bool = True

    def __post_init__(self) -> None:
        for name in ("d_model", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")


class UMT5Encoder:
    """A model folder's UMT5 encoder (arXiv 2304.09151) through transformers, loaded when the first caption comes.

    Captions go through it one by one: their vectors do not depend on what else is encoded.

    Args:
        config: sizes.
        url: the model folder, with `tokenizer/` beside the encoder.
        subfolder: the encoder's.
        device: it computes on; vectors come back on the CPU.
    """

    index_rows: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("text_encoder", "transformers", "UMT5EncoderModel"),
        ("tokenizer", "transformers", "T5TokenizerFast"),
    )

    def __init__(self, config: UMT5Config, url: str, subfolder: str, device: torch.device | str) -> None:
        self.config, self._url, self._subfolder, self._device = config, url, subfolder, device

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return self.config.d_model

    @functools.cached_property
    def _parts(self) -> tuple[Any, Any]:
        """Tokenizer and model."""
        return load_umt5(self._url, self._subfolder, self._device)

    def __call__(self, captions: Sequence[str]) -> list[Tensor]:
        """Encode captions; runs of white space and HTML entities are resolved as in Wan.

        Returns:
            one float32 (s, dim) tensor a caption: a row a token, the last for the end, then zeros if they are padded.

        Raises:
            ValueError: a caption of more than `max_tokens` tokens.
        """
        return [self._encode(caption) for caption in captions]

    @torch.inference_mode()
    def _encode(self, caption: str) -> Tensor:
        tokenizer, model = self._parts
        text = " ".join(html.unescape(html.unescape(caption)).split())
        tokens = tokenizer(text, return_tensors="pt").input_ids  # 1 s
        num_tokens, limit = tokens.shape[1], self.config.max_tokens
        if num_tokens > limit:
            raise ValueError(f"caption of {num_tokens} tokens: max_tokens={limit}")
        vectors = model(tokens.to(self._device)).last_hidden_state[0].float().cpu()  # s d
        return F.pad(vectors, (0, 0, 0, limit - num_tokens)) if self.config.zero_padded else vectors  # max_tokens d

    def save_pretrained(self, url: str, subfolder: str = "text_encoder") -> None:
        """Copy the encoder and its tokenizer into a model folder."""
        weights.copy_files(f"{self._url}/{self._subfolder}", f"{url}/{subfolder}")
        weights.copy_files(f"{self._url}/tokenizer", f"{url}/tokenizer")


def load_umt5(url: str, subfolder: str, device: torch.device | str) -> tuple[Any, Any]:
    """Tokenizer and encoder of a model folder, from safetensors.

    Raises:
        ValueError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer, UMT5EncoderModel
    except ImportError as error:
        raise ValueError(f"{url}/{subfolder} needs transformers: pip install 'kinoray[wan]'") from error
    with _local(url, [subfolder, "tokenizer"]) as folder:
        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
        model: nn.Module = UMT5EncoderModel.from_pretrained(f"{folder}/{subfolder}", dtype="auto", use_safetensors=True)
    return tokenizer, model.to(device).eval()


@contextlib.contextmanager
def _local(url: str, subfolders: Sequence[str]) -> Iterator[str]:
    """The folder, or a copy of its subfolders for as long as it is needed if it is elsewhere."""
    fs, path = fsspec.core.url_to_fs(url)
    if isinstance(fs, LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for subfolder in subfolders:
            weights.copy_files(f"{url}/{subfolder}", f"{folder}/{subfolder}")
        yield folder


def load_text_encoder(
    url: str, subfolder: str = "text_encoder", device: torch.device | str = "cpu"
) -> HashedWordEncoder | UMT5Encoder:
    """The text encoder of a model folder, ours or Wan's.

    Args:
        url: the model folder.
        subfolder: the encoder's.
        device: that an encoder with weights computes on.

    Raises:
        ValueError: an encoder this version does not know.
    """
    values = json.loads(weights.read_bytes(url, subfolder, "config.json"))
    name = values.get("_class_name", *values.get("architectures", [])[:1] or [None])
    if name == "HashedWordEncoder":
        return HashedWordEncoder(weights.read_config(HashedWordConfig, url, subfolder))
    if name == "UMT5EncoderModel":
        fields = {field.name for field in dataclasses.fields(UMT5Config)}
        return UMT5Encoder(UMT5Config(**{key: values[key] for key in fields & values.keys()}), url, subfolder, device)
    raise ValueError(
        f"{url}/{subfolder}: text encoder {name!r} is not known; known: HashedWordEncoder, UMT5EncoderModel"
    )
