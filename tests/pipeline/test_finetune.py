"""A published model trained further on clips of one's own: whole, and by adapters that diffusers loads."""

import dataclasses
from pathlib import Path

import diffusers
import pytest
import torch
from random_pipeline import save_random_pipeline

from pipeline import store
from pipeline.chain import Chain
from pipeline.models import model_folder
from video_dit import weights
from video_dit.generator import GenerationRequest, Generator
from video_dit.lora import LORA_FILE
from video_dit.model import VideoDiT
from video_dit.packing import pack


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "wan"
    save_random_pipeline(folder)
    return str(folder)


@pytest.fixture(scope="module")
def source(chain):
    return store.join(chain.toy_clips().uri, "clips")


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """Of all runs: they train on the same latents."""
    return tmp_path_factory.mktemp("runs")


def chain_of(recipe, source, storage, published, **video):
    optimizer = dataclasses.replace(recipe.video.optimizer, num_steps=6, learning_rate=1e-2, matrix_learning_rate=None)
    settings = {"start": published, "optimizer": optimizer, "num_validation_prompts": 0, **video}
    curate = dataclasses.replace(recipe.curate, stride_px=16)
    recipe = dataclasses.replace(recipe, curate=curate, video=dataclasses.replace(recipe.video, **settings))
    return Chain(recipe, source, str(storage))


@pytest.fixture(scope="module")
def adapted(recipe, source, storage, published):
    chain = chain_of(recipe, source, storage, published, lora_rank=4, lora_alpha=8)
    return chain.model()


def difference(uri, other):
    ours, theirs = (weights.read_state(url, "transformer") for url in (uri, other))
    assert ours.keys() == theirs.keys()
    return {name: (ours[name] - theirs[name]).abs().max().item() for name in ours}


def test_all_weights_are_trained_on_latents_of_the_models_own_vae(recipe, source, storage, published):
    chain = chain_of(recipe, source, storage, published)
    model = chain.model()
    assert all(change > 0 for change in difference(model.uri, published).values())
    assert weights.read_state(model.uri, "vae").keys() == weights.read_state(published, "vae").keys()
    (latents,) = chain.latents()
    assert latents.parents[1] == {"uri": published, "hash": store.Manifest.of_folder(published).hash}
    (video,) = Generator.from_pretrained(model.uri)(
        [GenerationRequest(prompt="a red circle", num_frames=5, height_px=32, width_px=32, num_steps=2)]
    )
    assert video.shape == (5, 32, 32, 3)


def test_adapters_change_attention_alone_and_are_merged_for_serving(adapted, published):
    changes = difference(adapted.uri, published)
    changed = {name for name, change in changes.items() if change > 0}
    assert changed == {
        f"blocks.{block}.{part}.weight"
        for block in range(2)
        for part in (*(f"attn{n}.to_{x}" for n in (1, 2) for x in "qkv"), "attn1.to_out.0", "attn2.to_out.0")
    }


@torch.no_grad()
def test_diffusers_loads_the_adapters_and_changes_as_we_do(adapted, published):
    """Of the same model; what it predicts, with and without."""
    latents, text = torch.randn(4, 3, 4, 6), torch.randn(5, 24)
    packed = pack([latents], [500.0], [text])
    before, after = (packed.unpack(VideoDiT.from_pretrained(url)(packed))[0] for url in (published, adapted.uri))
    peer = diffusers.WanTransformer3DModel.from_pretrained(Path(published) / "transformer")

    def theirs():
        return peer(latents[None], torch.tensor([500.0]), text[None], return_dict=False)[0][0]

    torch.testing.assert_close(theirs(), before, rtol=0, atol=1e-4)
    peer.load_lora_adapter(adapted.uri, weight_name=LORA_FILE)
    torch.testing.assert_close(theirs(), after, rtol=0, atol=1e-4)
    assert (after - before).abs().max() > 1e-3


def test_a_checkpoint_of_adapters_holds_nothing_else(adapted):
    run = adapted.run
    folder = Path(run.uri, "checkpoints", f"step-{run.counts['step']}")
    parameters = sum(value.numel() for value in weights.read_state(adapted.uri, "transformer").values())
    assert sum(path.stat().st_size for path in folder.iterdir()) < 4 * 4 * parameters
    assert model_folder(run) == adapted.uri


def test_adapters_need_a_model(recipe):
    with pytest.raises(ValueError, match="lora_rank=4: start must name the model"):
        dataclasses.replace(recipe.video, lora_rank=4)
