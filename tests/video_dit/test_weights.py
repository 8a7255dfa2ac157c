"""Model folders: which layouts load, how little memory loading takes, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from video_dit.key_tables import DIFFUSERS_DIT, ORIGINAL_DIT, match_published, to_published
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.tensor_files import INDEX, WEIGHTS, TensorReader, write_tensors
from video_dit.weights import load_model, read_state, save_model

SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 4096, "ffn_dim": 48, "num_layers": 2}


def make_dit(**fields):
    torch.manual_seed(0)
    model = VideoDiT(VideoDiTConfig(**{**SMALL, **fields}))
    for parameter in model.parameters():  # no zero: every tensor must matter
        torch.nn.init.normal_(parameter)
    return model


def shapes_of(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def test_a_folder_in_the_original_layout_loads(tmp_path):
    model = make_dit()
    config = {"_class_name": "WanModel", "model_type": "t2v", "dim": 24, "num_heads": 2, "num_layers": 2, "ffn_dim": 48}
    config |= {"in_dim": 16, "out_dim": 16, "freq_dim": 256, "text_len": 512, "eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_tensors(str(tmp_path), to_published(model.state_dict(), ORIGINAL_DIT), 1 << 30)
    loaded = VideoDiT.from_pretrained(str(tmp_path), subfolder="")
    assert loaded.config == model.config
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "vace"}))
    with pytest.raises(ValueError, match="model_type='vace'"):
        VideoDiT.from_pretrained(str(tmp_path), subfolder="")


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 100_000])
def test_any_file_system_and_any_precision(max_shard_bytes):
    model, url = make_dit().bfloat16(), f"memory://models/{max_shard_bytes}"
    save_model(model, url, "transformer", max_shard_bytes=max_shard_bytes)
    same = VideoDiT.from_pretrained(url)
    wider = load_model(VideoDiT, VideoDiTConfig, url, "transformer", dtype=torch.float32)
    for name, value in model.state_dict().items():
        assert same.state_dict()[name].dtype == torch.bfloat16
        assert torch.equal(same.state_dict()[name], value)
        assert torch.equal(wider.state_dict()[name], value.float())


def test_one_file_replaces_the_shards_before_it(tmp_path):
    model = make_dit()
    save_model(model, str(tmp_path), "", max_shard_bytes=100_000)
    assert len(list(tmp_path.glob("*-of-*"))) == len(
        set(json.loads((tmp_path / INDEX).read_text())["weight_map"].values())
    )
    again = make_dit()
    torch.nn.init.ones_(again.head.out.bias)
    save_model(again, str(tmp_path), "")
    assert torch.equal(read_state(str(tmp_path))["proj_out.bias"], again.head.out.bias)


def test_loading_holds_the_weights_once(tmp_path):
    """The peak of a process that loads, above what it had before, is at most 1.2 times the weights."""
    sizes = {"num_attention_heads": 8, "attention_head_dim": 128, "ffn_dim": 4096, "num_layers": 8}
    save_model(make_dit(), str(tmp_path), "small")
    save_model(VideoDiT(VideoDiTConfig(**sizes)), str(tmp_path), "transformer", max_shard_bytes=1 << 27)
    program = f"""
import pathlib, re
from video_dit.model import VideoDiT
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
VideoDiT.from_pretrained({str(tmp_path)!r}, "small")  # what is imported on the way is not the weights
before = peak()
model = VideoDiT.from_pretrained({str(tmp_path)!r})
print((peak() - before) / sum(p.nbytes for p in model.parameters()))
"""
    printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert 0.8 < float(printed) <= 1.2


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
    model = make_dit()
    state = to_published(model.state_dict(), DIFFUSERS_DIT)
    state["extra.weight"] = torch.zeros(1)
    state["proj_out.bias"] = torch.zeros(3)
    del state["blocks.1.attn1.to_k.weight"]
    with pytest.raises(
        ValueError,
        match=r"missing: blocks\.1\.attn1\.to_k\.weight; unexpected: extra\.weight; mis-shaped: proj_out\.bias \(3,\)",
    ):
        match_published(shapes_of(state), model.state_dict(), DIFFUSERS_DIT)


def test_damaged_and_strange_files_are_refused(tmp_path):
    save_model(make_dit(), str(tmp_path), "")
    file, whole = tmp_path / WEIGHTS, (tmp_path / WEIGHTS).read_bytes()
    for data, message in (
        (whole[:-1], "cut short"),
        (whole[:100], "not a safetensors file"),
        (b"", "not a safetensors file"),
        (whole[:8] + b"?" + whole[9:], "not a safetensors file"),
        (whole.replace(b'"F32"', b'"F99"', 1), "dtype F99"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            TensorReader(str(tmp_path))
    file.unlink()
    with pytest.raises(FileNotFoundError):
        VideoDiT.from_pretrained(str(tmp_path), subfolder="")


def test_an_index_that_lies_and_a_class_that_nobody_knows(tmp_path):
    save_model(make_dit(), str(tmp_path), "", max_shard_bytes=100_000)
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["ghost"] = index["weight_map"].pop("proj_out.bias")
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"differ in ghost, proj_out\.bias"):
        TensorReader(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "_class_name": "Other"}))
    with pytest.raises(ValueError, match="_class_name='Other', known: "):
        VideoDiT.from_pretrained(str(tmp_path), subfolder="")


def test_files_of_mixed_tensors_are_read_by_safetensors(tmp_path):
    tensors = {
        "odd": torch.arange(3).bfloat16(),
        "turned": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
        "rows": torch.arange(8.0).reshape(4, 2)[1:3],  # of another tensor's memory
        "number": torch.tensor(7),
        "none": torch.zeros(0, 4, dtype=torch.float16),
    }
    write_tensors(str(tmp_path), tensors, 1 << 30)
    read = load_file(tmp_path / WEIGHTS)
    assert read.keys() == tensors.keys()
    for name, value in tensors.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
    on_meta = {name: value.to("meta") for name, value in tensors.items()}
    write_tensors(str(tmp_path / "lazy"), on_meta, 1 << 30, tensors.__getitem__)
    assert (tmp_path / "lazy" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
