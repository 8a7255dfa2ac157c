"""Model folders: config.json plus safetensors, in the layout and with the key names of diffusers.

Our modules may be named and fused differently: one table per published class maps them, both ways. Loading is strict:
every missing, unexpected or mis-shaped tensor is named. Nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import fsspec
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = WEIGHTS + ".index.json"

Model = TypeVar("Model", bound=nn.Module)

# Ours -> theirs, as paths of modules; {n} is a block's number. Several of theirs are rows of one of ours, in order.
KEY_TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "AutoencoderKLWan": {},
    "WanTransformer3DModel": {
        "time_mlp.0": ("condition_embedder.time_embedder.linear_1",),
        "time_mlp.2": ("condition_embedder.time_embedder.linear_2",),
        "time_modulation": ("condition_embedder.time_proj",),
        "text_mlp.0": ("condition_embedder.text_embedder.linear_1",),
        "text_mlp.2": ("condition_embedder.text_embedder.linear_2",),
        "blocks.{n}.modulation": ("blocks.{n}.scale_shift_table",),
        "blocks.{n}.self_attention.qkv": tuple(f"blocks.{{n}}.attn1.to_{part}" for part in "qkv"),
        "blocks.{n}.self_attention.norm_q": ("blocks.{n}.attn1.norm_q",),
        "blocks.{n}.self_attention.norm_k": ("blocks.{n}.attn1.norm_k",),
        "blocks.{n}.self_attention.out": ("blocks.{n}.attn1.to_out.0",),
        "blocks.{n}.cross_attention.q": ("blocks.{n}.attn2.to_q",),
        "blocks.{n}.cross_attention.kv": tuple(f"blocks.{{n}}.attn2.to_{part}" for part in "kv"),
        "blocks.{n}.cross_attention.norm_q": ("blocks.{n}.attn2.norm_q",),
        "blocks.{n}.cross_attention.norm_k": ("blocks.{n}.attn2.norm_k",),
        "blocks.{n}.cross_attention.out": ("blocks.{n}.attn2.to_out.0",),
        "blocks.{n}.norm_cross": ("blocks.{n}.norm2",),
        "blocks.{n}.mlp.0": ("blocks.{n}.ffn.net.0.proj",),
        "blocks.{n}.mlp.2": ("blocks.{n}.ffn.net.2",),
        "head.modulation": ("scale_shift_table",),
        "head.out": ("proj_out",),
    },
}


def published_names(key: str, class_name: str) -> tuple[str, ...]:
    """The published tensors that make up our tensor `key`; itself where no row of the table applies."""
    number = re.match(r"blocks\.(\d+)\.", key)
    generic = re.sub(r"^blocks\.\d+\.", "blocks.{n}.", key)
    for ours, theirs in KEY_TABLES[class_name].items():
        if generic == ours or generic.startswith(ours + "."):
            suffix = generic[len(ours) :]
            return tuple((name + suffix).replace("{n}", number[1] if number else "") for name in theirs)
    return (key,)


def to_published(state: Mapping[str, Tensor], class_name: str) -> dict[str, Tensor]:
    """Our state dict under the published names, fused tensors split."""
    published: dict[str, Tensor] = {}
    for key, value in state.items():
        names = published_names(key, class_name)
        published.update(zip(names, value.chunk(len(names)), strict=True))
    return {key: value.contiguous() for key, value in published.items()}


def from_published(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], class_name: str) -> dict[str, Tensor]:
    """A published state dict under our names, fused where ours are.

    Args:
        state: tensors by published name.
        expected: our state dict; only names and shapes are looked at (meta tensors do).

    Raises:
        ValueError: listing every missing, unexpected and mis-shaped tensor.
    """
    ours: dict[str, Tensor] = {}
    missing: list[str] = []
    misshaped: list[str] = []
    used: set[str] = set()
    for key, target in expected.items():
        names = published_names(key, class_name)
        used.update(names)
        absent = [name for name in names if name not in state]
        if absent:
            missing += absent
            continue
        value = torch.cat([state[name] for name in names]) if len(names) > 1 else state[names[0]]
        if value.shape != target.shape:
            misshaped.append(f"{names[0]} {tuple(value.shape)} instead of {tuple(target.shape)}")
        ours[key] = value
    unexpected = sorted(set(state) - used)
    problems = [
        f"{kind}: {', '.join(map(str, names))}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
        if names
    ]
    if problems:
        raise ValueError(f"the weights do not fit {class_name} with this config; " + "; ".join(problems))
    return ours


def read_bytes(url: str, *parts: str) -> bytes:
    """A file of a model folder.

    Raises:
        FileNotFoundError: naming the URL.
    """
    path = "/".join([url.rstrip("/"), *filter(None, parts)])
    with fsspec.open(path, "rb") as file:
        return bytes(file.read())


def write_bytes(data: bytes, url: str, *parts: str) -> None:
    """Write a file of a model folder, making the folders it stands in."""
    fs, root = fsspec.core.url_to_fs(url)
    path = "/".join([root.rstrip("/"), *filter(None, parts)])
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    fs.pipe_file(path, data)


def read_config(config_class: Callable[..., Any], url: str, subfolder: str = "") -> Any:
    """The config of a model folder as `config_class`.

    Raises:
        ValueError: a key that the class does not know.
    """
    values = json.loads(read_bytes(url, subfolder, "config.json"))
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if not key.startswith("_")}
    known = {field.name for field in dataclasses.fields(cast(Any, config_class))}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{url}/{subfolder}/config.json: unknown keys {unknown}; known: {sorted(known)}")
    return config_class(**values)


def read_state(url: str, subfolder: str = "") -> dict[str, Tensor]:
    """All tensors of a model folder, from one safetensors file or from shards with an index."""
    try:
        index = json.loads(read_bytes(url, subfolder, INDEX))
    except FileNotFoundError:
        return load_safetensors(read_bytes(url, subfolder, WEIGHTS))
    state: dict[str, Tensor] = {}
    for name in sorted(set(index["weight_map"].values())):
        state.update(load_safetensors(read_bytes(url, subfolder, name)))
    return state


def load_model(
    model_class: Callable[[Any], Model], config_class: Callable[..., Any], url: str, subfolder: str
) -> Model:
    """Build a model from its folder, weights in the dtype they were saved in.

    Args:
        model_class: built as `model_class(config)`; names its published class in `published_class`.
        config_class: dataclass with the field names of the published config.json.
        url: any fsspec URL or path of a pipeline folder.
        subfolder: the model's folder in it.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: config or weights do not fit.
    """
    config = read_config(config_class, url, subfolder)
    with torch.device("meta"):
        model = model_class(config)
    state = from_published(read_state(url, subfolder), model.state_dict(), str(model.published_class))
    model.load_state_dict(state, assign=True)
    return model.eval()


def save_model(
    model: nn.Module,
    url: str,
    subfolder: str,
    class_name: str | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model folder that diffusers reads.

    Args:
        model: with `.config`, a dataclass, and `.published_class`.
        url: any fsspec URL or path of the pipeline folder.
        subfolder: the model's folder in it.
        class_name: the published class, when it is not `model.published_class`.
        state: tensors to write instead of the model's own (gathered or averaged weights).
    """
    name = class_name or str(model.published_class)
    config = {"_class_name": name, **dataclasses.asdict(cast(Any, model.config))}
    write_bytes((json.dumps(config, indent=2) + "\n").encode(), url, subfolder, "config.json")
    tensors = to_published(model.state_dict() if state is None else state, name)
    write_bytes(save_safetensors(tensors, metadata={"format": "pt"}), url, subfolder, WEIGHTS)


def save_index(url: str, components: Iterable[tuple[str, str, str]], pipeline_class: str = "WanPipeline") -> None:
    """Write `model_index.json` of a pipeline folder from (component, library, class) rows."""
    index: dict[str, Any] = {"_class_name": pipeline_class}
    index.update({component: [library, class_name] for component, library, class_name in components})
    write_bytes((json.dumps(index, indent=2) + "\n").encode(), url, "model_index.json")
