"""Verb "import_weights": published checkpoints to a model folder, tensor by tensor.

The one place that reads pickles (.pt, .pth), and of those only ones that hold nothing but tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor, nn

from pipeline import store
from video_dit import weights
from video_dit.diffusion.schedules import RectifiedFlow
from video_dit.generator import SamplingConfig, read_limits, save_pipeline_parts
from video_dit.key_tables import DIFFUSERS_DIT, ORIGINAL_DIT, match_published
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.published import default_config, recognize
from video_dit.tensor_files import TensorReader
from video_dit.text import TextEncoder, load_text_encoder
from video_dit.vae import VideoVAE, VideoVAEConfig

PREFIX = "model.diffusion_model."  # of all names, in files that were packed again for other programs
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """What to import, and where to.

    Attributes:
        out: model folder to write, a path or any fsspec URL; parts that it already has stay unless they are given anew.
        transformer: a Wan transformer under diffusers' or its original names: a .safetensors, .pt or .pth file, or a
            folder with one safetensors file, or with shards and their index.
        vae: a Wan VAE, likewise (Wan2.1_VAE.pth, Wan2.2_VAE.pth, a pipeline's vae folder).
        text_encoder: a pipeline folder whose `text_encoder` and `tokenizer` are copied.
        transformer_config: config.json of the transformer. Without it the folder's own counts; a file's architecture is
            found from the shapes of its tensors.
        vae_config: config.json of the VAE. Without it the folder's own counts; original ones are known by their names.
        dtype: of the written weights; without it they stay as they are.
        shift: of the sampling schedule. Wan's: 3 for 480p, 5 for 720p.
        fps: frames per second of the videos. Wan 2.1: 16; Wan 2.2 TI2V-5B: 24.
        num_steps, guidance_scale: what the model is sampled with where nothing else is asked.
    """

    out: str
    transformer: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    transformer_config: str | None = None
    vae_config: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    shift: float = 5.0
    fps: float = 16.0
    num_steps: int = 50
    guidance_scale: float = 5.0

    def __post_init__(self) -> None:
        if not (self.transformer or self.vae or self.text_encoder):
            raise ValueError("nothing to import: give transformer, vae or text_encoder")
        for name in ("shift", "fps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must be positive")


class Checkpoint(NamedTuple):
    """A published checkpoint, open.

    Attributes:
        tensors: by name; only their shapes and dtypes are in memory.
        read: gives a tensor by its name.
        config: of the config.json beside it; None without one.
    """

    tensors: Mapping[str, Tensor]
    read: Callable[[str], Tensor]
    config: dict[str, Any] | None


class Imported(NamedTuple):
    """A part of the model folder that was written: from which class, and how large."""

    part: str
    class_name: str
    num_parameters: int
    num_bytes: int


class Plan(NamedTuple):
    """A checkpoint that fits the model (on the meta device) whose folder it becomes."""

    part: str
    class_name: str
    model: nn.Module
    checkpoint: Checkpoint


def import_weights(config: ImportConfig) -> list[Imported]:
    """Write a model folder; every checkpoint is checked before the first is written, `model_index.json` comes last.

    Memory holds one tensor at a time; of a pickle, the pages that the system keeps of its file.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: not a checkpoint, or one that does not fit its config, with every tensor that is at fault.
    """
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    text = _text_encoder(config)
    sources = [
        (part, url, given)
        for part, url, given in (
            ("transformer", config.transformer, config.transformer_config),
            ("vae", config.vae, config.vae_config),
        )
        if url is not None
    ]
    for part, url, _ in sources:
        _check_apart(url, store.join(config.out, part))
    with contextlib.ExitStack() as stack:
        plans = [
            _plan(part, url, given, stack.enter_context(open_checkpoint(url)), dtype) for part, url, given in sources
        ]
        written = [_write(plan, config.out, dtype) for plan in plans]
    models = [part for part in ("transformer", "vae") if _has(config.out, part)]
    sampling = SamplingConfig(
        schedule=RectifiedFlow(shift=config.shift),
        fps=config.fps,
        num_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
    )
    save_pipeline_parts(config.out, text, sampling, models)
    return written


def next_step(url: str) -> str:
    """The command that an imported model folder is ready for."""
    missing = [part for part in ("transformer", "vae", "text_encoder") if not _has(url, part)]
    if missing:
        flags = " ".join(f"--{part.replace('_', '-')} <path or URL>" for part in missing)
        return f"python jobs/import_weights.py --out {url} {flags}"
    try:
        read_limits(url)
    except ValueError:
        return f"python -c 'from video_dit.model import VideoDiT; print(VideoDiT.from_pretrained(\"{url}\").config)'"
    size = "--sample.num-frames 81 --sample.height-px 480 --sample.width-px 832"
    return f'python jobs/sample_video.py --model {url} {size} --sample.prompts "a dog runs along a beach"'


@contextlib.contextmanager
def open_checkpoint(url: str) -> Iterator[Checkpoint]:
    """A safetensors file, a folder of them, or a pickle of tensors.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: something else.
    """
    url = url.rstrip("/")
    fs, path = store.filesystem(url)
    if not fs.exists(path):
        raise FileNotFoundError(f"{url}: no such file or folder")
    if fs.exists(f"{path}/model_index.json"):
        raise ValueError(f"{url}: a whole pipeline, to be used as it is; to import a part, give its folder in it")
    config = store.read_json(f"{url}/config.json") if fs.exists(f"{path}/config.json") else None
    with contextlib.ExitStack() as stack:
        if url.endswith((".pt", ".pth")):
            state = _read_pickle(url, stack.enter_context(_local_file(url)))
            tensors, read = state, state.__getitem__
        elif url.endswith(".safetensors") or fs.isdir(path):
            reader = stack.enter_context(TensorReader(url))
            stored = reader.tensors.items()
            tensors = {name: torch.empty(x.shape, dtype=x.dtype, device="meta") for name, x in stored}
            read = reader.read
        else:
            raise ValueError(f"{url}: must be a .safetensors, .pt or .pth file, or a folder of safetensors")
        origin = {name.removeprefix(PREFIX): name for name in tensors}
        named = {name: tensors[given] for name, given in origin.items()}
        yield Checkpoint(named, lambda name: read(origin[name]), config)


def _read_pickle(url: str, path: str) -> dict[str, Tensor]:
    """A state dict, its tensors mapped from the file."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{url}: not a checkpoint (a zip file, as torch.save writes)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{url}: holds more than tensors and would run code when read; refused") from error
    except RuntimeError as error:
        raise ValueError(f"{url}: not a checkpoint (a zip file, but not of torch.save)") from error
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)] if isinstance(state, dict) else []
    if not isinstance(state, dict) or strange:
        found = f"{strange[0]!r} is not one" if strange else f"it is a {type(state).__name__}"
        raise ValueError(f"{url}: must be a dict of tensors by name, {found}")
    return state


@contextlib.contextmanager
def _local_file(url: str) -> Iterator[str]:
    """The path of a file, or of a copy for as long as it is needed if it is elsewhere: only local files are mapped."""
    fs, path = store.filesystem(url)
    if isinstance(fs, LocalFileSystem):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        fs.get_file(path, f"{folder}/checkpoint")
        yield f"{folder}/checkpoint"


def _check_apart(url: str, target: str) -> None:
    """What is read must not be written over."""
    fs, path = store.filesystem(url)
    target_fs, target_path = store.filesystem(target)
    if fs == target_fs and f"{path}/".startswith(f"{target_path}/"):
        raise ValueError(f"{url}: lies where it would be written, {target}: give another out")


def _plan(part: str, url: str, config_url: str | None, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Plan:
    tensors = checkpoint.tensors
    try:
        class_name = recognize(tensors.keys())
        is_transformer = class_name in (DIFFUSERS_DIT, ORIGINAL_DIT)
        if is_transformer != (part == "transformer"):
            raise ValueError(f"the tensors of {class_name}, which is no {part}")
        strange = sorted({str(value.dtype) for value in tensors.values() if value.dtype not in FLOATS})
        if strange and dtype is None:
            raise ValueError(f"tensors of {', '.join(strange)}: give the dtype that they are to become")
        shapes = {name: tuple(value.shape) for name, value in tensors.items()}
        values = checkpoint.config if config_url is None else store.read_json(config_url)
        values = default_config(class_name, shapes) if values is None else values
        config_class = VideoDiTConfig if is_transformer else VideoVAEConfig
        config = weights.parse_config(config_class, values, shapes, config_url or "config.json")
        with torch.device("meta"):
            model = VideoDiT(config) if is_transformer else VideoVAE(config)
        match_published(shapes, model.state_dict(), class_name)
    except json.JSONDecodeError as error:
        raise ValueError(f"{config_url}: not JSON: {error}") from error
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error
    return Plan(part, class_name, model, checkpoint)


def _write(plan: Plan, out: str, dtype: torch.dtype | None) -> Imported:
    checkpoint = plan.checkpoint
    written = weights.convert_model(
        plan.model, plan.class_name, checkpoint.tensors, checkpoint.read, out, plan.part, dtype
    ).values()
    num_parameters, num_bytes = (sum(x.numel() for x in written), sum(x.nbytes for x in written))
    return Imported(plan.part, plan.class_name, num_parameters, num_bytes)


def _text_encoder(config: ImportConfig) -> TextEncoder | None:
    """The one that is given, or the one that is there."""
    if config.text_encoder is not None:
        return load_text_encoder(config.text_encoder)
    return load_text_encoder(config.out) if _has(config.out, "text_encoder") else None


def _has(url: str, part: str) -> bool:
    return store.exists(store.join(url, part, "config.json"))
