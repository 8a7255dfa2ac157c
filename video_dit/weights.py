"""Model folders: config.json plus safetensors, in the layout and with the key names of diffusers.

Our modules may be named and fused differently: `key_tables` maps them, both ways. Loading is strict: every missing,
unexpected and mis-shaped tensor is named. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import fsspec
import torch
from torch import Tensor, nn

from video_dit.key_tables import KEY_TABLES, match_published, to_published, translate_config
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


def read_config(config_class: Callable[..., Any], url: str, subfolder: str = "") -> Any:
    """The config of a model folder as `config_class`.

    Raises:
        ValueError: a key that the class does not know.
    """
    return _parse_config(config_class, _read_json(url, subfolder), _join(url, subfolder))


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
    folder = _join(url, subfolder)
    values = _read_json(url, subfolder)
    with torch.device("meta"):
        model = model_class(_parse_config(config_class, values, folder))
    class_name = values.get("_class_name", str(model.published_class))
    if class_name not in KEY_TABLES:
        raise ValueError(f"{folder}/config.json: _class_name={class_name!r}, known: {', '.join(KEY_TABLES)}")
    expected = model.state_dict()
    with TensorReader(folder) as reader:
        shapes = {name: stored.shape for name, stored in reader.tensors.items()}
        for key, names in match_published(shapes, expected, class_name).items():
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
    name = str(model.published_class)
    config = {"_class_name": name, **dataclasses.asdict(cast(Any, model.config))}
    write_bytes((json.dumps(config, indent=2) + "\n").encode(), url, subfolder, "config.json")
    tensors = to_published(model.state_dict() if state is None else state, name)
    write_tensors(_join(url, subfolder), tensors, max_shard_bytes)


def save_index(url: str, components: Iterable[tuple[str, str, str]], pipeline_class: str = "WanPipeline") -> None:
    """Write `model_index.json` of a pipeline folder from (component, library, class) rows."""
    index: dict[str, Any] = {"_class_name": pipeline_class}
    index.update({component: [library, class_name] for component, library, class_name in components})
    write_bytes((json.dumps(index, indent=2) + "\n").encode(), url, "model_index.json")


def _join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *filter(None, parts)])


def _read_json(url: str, subfolder: str) -> dict[str, Any]:
    return dict(json.loads(read_bytes(url, subfolder, "config.json")))


def _parse_config(config_class: Callable[..., Any], published: Mapping[str, Any], folder: str) -> Any:
    translated = translate_config(published)
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in translated.items()}
    known = {field.name for field in dataclasses.fields(cast(Any, config_class))}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{folder}/config.json: unknown keys {unknown}; known: {sorted(known)}")
    return config_class(**values)
