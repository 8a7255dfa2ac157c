"""Checkpoints in every published form become model folders with the same tensors, or are refused in one clear line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from jobs import cli
from jobs.import_weights import job
from pipeline.import_weights import ImportConfig, import_weights, next_step
from video_dit.generator import Generator
from video_dit.key_tables import DIFFUSERS_DIT, ORIGINAL_DIT, ORIGINAL_RESIDUAL_VAE, ORIGINAL_VAE, to_published
from video_dit.model import VideoDiT, VideoDiTConfig
from video_dit.text import HashedWordConfig, HashedWordEncoder
from video_dit.vae import VideoVAE, VideoVAEConfig
from video_dit.weights import save_model

ROOT = Path(__file__).parents[2]
DIT = {"num_attention_heads": 1, "ffn_dim": 32, "num_layers": 2, "text_dim": 24, "freq_dim": 8}
I2V = {**DIT, "in_channels": 36, "image_dim": 10, "added_kv_proj_dim": 128, "pos_embed_seq_len": 6}
RESIDUAL = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}


def random_model(model_class, config):
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def random_dit(**fields):
    return random_model(VideoDiT, VideoDiTConfig(**(fields or DIT)))


def named(model, class_name):
    return {name: value.detach().contiguous() for name, value in to_published(model.state_dict(), class_name).items()}


def write_checkpoint(folder, form, model):
    """The model as one of the forms that people publish; its path."""
    original = named(model, ORIGINAL_DIT)
    if form == "original safetensors":
        save_file(original, folder / "wan.safetensors")
        return folder / "wan.safetensors"
    if form == "original packed again":
        save_file({f"model.diffusion_model.{name}": x for name, x in original.items()}, folder / "wan.safetensors")
        return folder / "wan.safetensors"
    if form == "original pickle":
        torch.save(original, folder / "wan.pth")
        return folder / "wan.pth"
    if form == "diffusers safetensors":
        save_file(named(model, DIFFUSERS_DIT), folder / "wan.safetensors")
        return folder / "wan.safetensors"
    save_model(model, str(folder), "transformer", max_shard_bytes=100_000)
    return folder / "transformer"


FORMS = [
    "original safetensors",
    "original packed again",
    "original pickle",
    "diffusers safetensors",
    "diffusers shards",
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("fields", [DIT, I2V], ids=["t2v", "flf2v"])
def test_every_form_gives_the_same_model(tmp_path, form, fields):
    model = random_dit(**fields)
    path = write_checkpoint(tmp_path, form, model)
    (written,) = import_weights(ImportConfig(transformer=str(path), out=str(tmp_path / "out")))
    imported = VideoDiT.from_pretrained(str(tmp_path / "out"))
    assert imported.config == model.config
    for name, value in model.state_dict().items():
        assert torch.equal(imported.state_dict()[name], value), name
    num_parameters = sum(value.numel() for value in model.state_dict().values())
    assert (written.num_parameters, written.num_bytes) == (num_parameters, 4 * num_parameters)
    assert written.class_name == (ORIGINAL_DIT if form.startswith("original") else DIFFUSERS_DIT)
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "WanTransformer3DModel"]
    assert "vae" not in index


@pytest.mark.parametrize(("class_name", "fields"), [(ORIGINAL_VAE, {}), (ORIGINAL_RESIDUAL_VAE, RESIDUAL)])
def test_original_vaes_by_another_file_system_in_another_precision(tmp_path, class_name, fields):
    vae = random_model(VideoVAE, VideoVAEConfig(base_dim=4, **fields))
    torch.save(named(vae, class_name), tmp_path / "vae.pth")
    vae.save_pretrained(str(tmp_path))  # for its config.json
    config = str(tmp_path / "vae" / "config.json")
    url = f"memory://imported/{class_name}"
    (written,) = import_weights(
        ImportConfig(vae=str(tmp_path / "vae.pth"), vae_config=config, dtype="bfloat16", out=url)
    )
    imported = VideoVAE.from_pretrained(url)
    assert imported.config == vae.config
    assert all(torch.equal(imported.state_dict()[name], x.bfloat16()) for name, x in vae.state_dict().items())
    assert written.num_bytes == 2 * written.num_parameters


def test_an_original_vae_of_another_size_than_the_published_ones_wants_its_config(tmp_path):
    torch.save(named(VideoVAE(VideoVAEConfig(base_dim=4)), ORIGINAL_VAE), tmp_path / "vae.pth")
    with pytest.raises(
        ValueError, match=r"vae.pth: the weights do not fit Wan2\.1_VAE .* mis-shaped: .*\(96, 3, 3, 3, 3"
    ):
        import_weights(ImportConfig(vae=str(tmp_path / "vae.pth"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_parts_come_one_after_the_other_and_make_a_folder_that_samples(tmp_path):
    out = str(tmp_path / "out")
    random_dit().save_pretrained(str(tmp_path))
    random_model(VideoVAE, VideoVAEConfig(base_dim=4, num_res_blocks=1)).save_pretrained(str(tmp_path))
    HashedWordEncoder(HashedWordConfig(dim=24, position_dim=8)).save_pretrained(str(tmp_path))
    import_weights(ImportConfig(transformer=str(tmp_path / "transformer"), out=out))
    flags = "--vae <path or URL> --text-encoder <path or URL>"
    assert next_step(out) == f"python jobs/import_weights.py --out {out} {flags}"
    import_weights(ImportConfig(text_encoder=str(tmp_path), out=out))
    import_weights(ImportConfig(vae=str(tmp_path / "vae"), out=out, shift=3.0, fps=24.0))
    assert next_step(out).startswith(f"python jobs/sample_video.py --model {out} ")
    generator = Generator.from_pretrained(out)
    assert (generator.sampling.schedule.shift, generator.fps, generator.text.dim) == (3.0, 24.0, 24)
    index = json.loads((Path(out) / "model_index.json").read_text())
    assert set(index) == {"_class_name", "transformer", "vae", "text_encoder", "scheduler"}
    with pytest.raises(ValueError, match="lies where it would be written"):
        import_weights(ImportConfig(transformer=f"{out}/transformer/diffusion_pytorch_model.safetensors", out=out))
    random_dit(**I2V).save_pretrained(str(tmp_path))
    import_weights(ImportConfig(transformer=str(tmp_path / "transformer"), out=out))
    assert "VideoDiT.from_pretrained" in next_step(out)  # no request can give it images


class Code:
    """What a pickle must not get to do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def strange_files(folder):
    """A file, and what is said of it."""
    state = named(random_dit(), ORIGINAL_DIT)
    (folder / "noise.pth").write_bytes(b"no checkpoint" * 100)
    (folder / "noise.safetensors").write_bytes(b"no checkpoint" * 100)
    (folder / "noise.ckpt").write_bytes(b"no checkpoint" * 100)
    torch.save({**state, "code": Code(folder / "was run")}, folder / "code.pth")
    torch.save({"model": state, "step": 3}, folder / "nested.pth")
    torch.save(torch.zeros(3), folder / "tensor.pth")
    torch.save({"a": torch.zeros(3)}, folder / "other.pth")
    torch.save(named(random_model(VideoVAE, VideoVAEConfig(base_dim=4)), ORIGINAL_VAE), folder / "vae.pth")
    torch.save({name: value.to(torch.float8_e4m3fn) for name, value in state.items()}, folder / "fp8.pth")
    missing = {name: value for name, value in state.items() if name != "blocks.1.cross_attn.v.bias"}
    save_file({**missing, "vace": torch.zeros(1), "head.head.weight": torch.zeros(64, 3)}, folder / "bad.safetensors")
    (folder / "pipe").mkdir()
    (folder / "pipe" / "model_index.json").write_text("{}")
    return {
        "noise.pth": "not a checkpoint (a zip file, as torch.save writes)",
        "noise.safetensors": "not a safetensors file",
        "noise.ckpt": "must be a .safetensors, .pt or .pth file, or a folder of safetensors",
        "code.pth": "holds more than tensors and would run code when read; refused",
        "nested.pth": "must be a dict of tensors by name, 'model' is not one",
        "tensor.pth": "must be a dict of tensors by name, it is a Tensor",
        "other.pth": "1 tensors (a, ...) are no checkpoint of",
        "vae.pth": "the tensors of Wan2.1_VAE, which is no transformer",
        "fp8.pth": "tensors of torch.float8_e4m3fn: give the dtype that they are to become",
        "bad.safetensors": "missing: blocks.1.cross_attn.v.bias; unexpected: vace; mis-shaped: head.head.weight",
        "pipe": "a whole pipeline, to be used as it is",
        "nowhere.pth": "no such file or folder",
    }


def test_strange_files_are_refused_before_anything_is_written(tmp_path):
    for name, message in strange_files(tmp_path).items():
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            import_weights(ImportConfig(transformer=str(tmp_path / name), out=str(tmp_path / "out")))
        assert str(caught.value).startswith(f"{tmp_path}/{name}: ")
        assert message in str(caught.value)
        assert str(caught.value).count("\n") == 0
    assert not (tmp_path / "was run").exists()
    assert not (tmp_path / "out").exists()
    (written,) = import_weights(
        ImportConfig(transformer=str(tmp_path / "fp8.pth"), out=str(tmp_path / "out"), dtype="float32")
    )
    assert written.num_bytes == 4 * written.num_parameters
    with pytest.raises(ValueError, match="nothing to import"):
        ImportConfig(out="out")


def test_the_job_says_what_it_wrote_and_what_is_next(tmp_path):
    path = write_checkpoint(tmp_path, "original pickle", random_dit())
    flags = ["--out", "out", "--transformer", path.name, "--dtype", "bfloat16"]
    command = [sys.executable, ROOT / "jobs" / "import_weights.py", *flags]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    written, following, result = run.stdout.splitlines()
    num_parameters = sum(parameter.numel() for parameter in random_dit().parameters())
    assert f"{num_parameters:,} parameters, {2 * num_parameters:,} bytes, from WanModel" in written
    assert following.startswith("next: python jobs/import_weights.py --out out --vae ")
    assert result == "result: out"
    one_line = pytest.raises(SystemExit, match=r"^error: .*wan\.pth: the tensors of WanModel, which is no vae")
    with one_line, cli.errors_in_one_line():
        job(ImportConfig(vae=str(path), out=str(tmp_path / "out")))


@pytest.mark.parametrize(("name", "limit"), [("wan.safetensors", 0.5), ("wan.pth", 1.3)])
def test_memory_holds_a_tensor_at_a_time(tmp_path, name, limit):
    """The peak of a process above what it had before, in units of the weights; of a pickle the file's pages count."""
    write_checkpoint(tmp_path, "original pickle", random_dit()).rename(tmp_path / "small.pth")
    fields = {"num_attention_heads": 4, "ffn_dim": 2048, "num_layers": 10}
    state = named(VideoDiT(VideoDiTConfig(**fields)), ORIGINAL_DIT)
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    program = f"""
import pathlib, re
from pipeline.import_weights import ImportConfig, import_weights
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
import_weights(ImportConfig(transformer="small.pth", out="small"))  # what is imported on the way is not the weights
before = peak()
(written,) = import_weights(ImportConfig(transformer={name!r}, out="out"))
print((peak() - before) / written.num_bytes)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True, text=True, env=os.environ
    )
    assert float(run.stdout) <= limit
