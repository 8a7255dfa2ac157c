"""Model folders: config.json plus safetensors, in the layout and with the key names of diffusers.

Our modules may be named and fused differently: `key_tables` maps them, both ways. Loading is strict: every missing,
unexpected and mis-shaped tensor is named. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import fsspec
import torch
from torch import Tensor, nn

from video_dit.key_tables import KEY_TABLES, ORIGINAL_DIT, match_published, published_names, to_published
from video_dit.published import translate_config
from video_dit.tensor_files import TensorReader, write_tensors

MAX_SHARD_BYTES = 5 * 10**9

Model = TypeVar("Model", bound=nn.Module)


def read_bytes(url: str, *parts: str) -> bytes:
    """A file of a model folder.

    Raises:
        FileNotFoundError: naming the URL.
    """
    with fsspec.open(_join(url, *parts), "rb") as file:
        return bytes(file.read())


def write_bytes(data: bytes, url: str, *parts: str) -> None:
    """Write a file of a model folder, making the folders it stands in."""
    fs, path = fsspec.core.url_to_fs(_join(url, *parts))
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    fs.pipe_file(path, data)


def copy_files(source: str, target: str) -> None:
    """Copy the files of a folder, any fsspec URL, into another; what may hold code (pickles, scripts) stays behind.

    A folder that is copied onto itself stays as it is.

    Raises:
        FileNotFoundError: nothing to copy.
    """
    fs, root = fsspec.core.url_to_fs(source.rstrip("/"))
    paths = [path for path in fs.find(root) if path.endswith((".json", ".safetensors", ".model", ".txt"))]
    if not paths:
        raise FileNotFoundError(f"{source}: no files of a model")
    target_fs, target_root = fsspec.core.url_to_fs(target.rstrip("/"))
    if (fs, root) == (target_fs, target_root):
        return
    for path in paths:
        copy = f"{target_root}/{path.removeprefix(root).lstrip('/')}"
        target_fs.makedirs(copy.rsplit("/", 1)[0], exist_ok=True)
        with fs.open(path, "rb") as reader, target_fs.open(copy, "wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 24)


def read_config(config_class: Callable[..., Any], url: str, subfolder: str = "") -> Any:
    """The config of a model folder as `config_class`.

    Raises:
        ValueError: a key that the class does not know.
    """
    folder, values = _join(url, subfolder), _read_json(url, subfolder)
    if values.get("_class_name") != ORIGINAL_DIT:
        return parse_config(config_class, values, {}, f"{folder}/config.json")
    with TensorReader(folder) as reader:
        return parse_config(config_class, values, _shapes(reader.tensors), f"{folder}/config.json")


def parse_config(
    config_class: Callable[..., Any], values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str
) -> Any:
    """The values of a published config.json as `config_class`.

    Args:
        config_class: dataclass with the field names of diffusers' config.json.
        values: of config.json.
        shapes: of the tensors beside it; only Wan's own config.json needs them.
        where: what errors name.

    Raises:
        ValueError: a key that the class does not know.
    """
    translated = translate_config(values, shapes)
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in translated.items()}
    known = {field.name for field in dataclasses.fields(cast(Any, config_class))}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{where}: unknown keys {unknown}; known: {sorted(known)}")
    return config_class(**values)


def read_state(url: str, subfolder: str = "") -> dict[str, Tensor]:
    """All tensors of a model folder, under their published names."""
    with TensorReader(_join(url, subfolder)) as reader:
        return {name: reader.read(name) for name in reader.tensors}


def load_model(
    model_class: Callable[[Any], Model],
    config_class: Callable[..., Any],
    url: str,
    subfolder: str,
    dtype: torch.dtype | None = None,
) -> Model:
    """Build a model from its folder; memory holds the weights once, and one tensor more where dtypes differ.

    Args:
        model_class: built as `model_class(config)`; names its published class in `published_class`.
        config_class: dataclass with the field names of diffusers' config.json.
        url: any fsspec URL or path of a pipeline folder.
        subfolder: the model's folder in it; "" when `url` is the model's own.
        dtype: of the weights in memory; None for the one they were saved in.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: config or weights do not fit.
    """
    folder, values = _join(url, subfolder), _read_json(url, subfolder)
    class_name = values.get("_class_name")
    if class_name is not None and class_name not in KEY_TABLES:
        raise ValueError(f"{folder}/config.json: _class_name={class_name!r}, known: {', '.join(KEY_TABLES)}")
    with TensorReader(folder) as reader:
        shapes = _shapes(reader.tensors)
        with torch.device("meta"):
            model = model_class(parse_config(config_class, values, shapes, f"{folder}/config.json"))
        expected = model.state_dict()
        for key, names in match_published(shapes, expected, class_name or str(model.published_class)).items():
            value = torch.empty(expected[key].shape, dtype=dtype or reader.tensors[names[0]].dtype)
            for name, rows in zip(names, value.chunk(len(names)) if len(names) > 1 else [value], strict=True):
                reader.read_into(name, rows)
            expected[key] = value
    model.load_state_dict(expected, assign=True)
    return model.eval()


def save_model(
    model: nn.Module,
    url: str,
    subfolder: str,
    state: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a model folder that diffusers reads.

    Args:
        model: with `.config`, a dataclass, and `.published_class`.
        url: any fsspec URL or path of the pipeline folder.
        subfolder: the model's folder in it.
        state: tensors to write instead of the model's own (gathered or averaged weights).
        max_shard_bytes: larger weights are written as numbered files with an index.
    """
    _save_config(model, url, subfolder)
    tensors = to_published(model.state_dict() if state is None else state, str(model.published_class))
    write_tensors(_join(url, subfolder), tensors, max_shard_bytes)


def convert_model(
    model: nn.Module,
    class_name: str,
    tensors: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    url: str,
    subfolder: str,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Write a model folder from a published checkpoint, tensor by tensor: memory never holds more than one.

    Args:
        model: of the checkpoint's config, on the meta device.
        class_name: whose names the checkpoint has, a key of KEY_TABLES.
        tensors: the checkpoint's, by name; only shapes and dtypes are looked at (meta tensors do).
        read: gives a tensor by its name.
        url, subfolder: as for `save_model`.
        dtype: to write; None for the checkpoint's own.

    Returns:
        what was written, by name, on the meta device.

    Raises:
        ValueError: listing every missing, unexpected and mis-shaped tensor.
    """
    origin: dict[str, str] = {}
    for key, names in match_published(_shapes(tensors), model.state_dict(), class_name).items():
        origin.update(zip(published_names(key, str(model.published_class)), names, strict=True))
    written = {
        name: torch.empty(tensors[source].shape, dtype=dtype or tensors[source].dtype, device="meta")
        for name, source in origin.items()
    }
    _save_config(model, url, subfolder)
    write_tensors(
        _join(url, subfolder), written, MAX_SHARD_BYTES, lambda name: read(origin[name]).to(written[name].dtype)
    )
    return written


def _save_config(model: nn.Module, url: str, subfolder: str) -> None:
    config = {"_class_name": str(model.published_class), **dataclasses.asdict(cast(Any, model.config))}
    write_bytes((json.dumps(config, indent=2) + "\n").encode(), url, subfolder, "config.json")


def save_index(url: str, components: Iterable[tuple[str, str, str]], pipeline_class: str = "WanPipeline") -> None:
    """Write `model_index.json` of a pipeline folder from (component, library, class) rows."""
    index: dict[str, Any] = {"_class_name": pipeline_class}
    index.update({component: [library, class_name] for component, library, class_name in components})
    write_bytes((json.dumps(index, indent=2) + "\n").encode(), url, "model_index.json")


def _join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *filter(None, parts)])


def _read_json(url: str, subfolder: str) -> dict[str, Any]:
    return dict(json.loads(read_bytes(url, subfolder, "config.json")))


def _shapes(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}
