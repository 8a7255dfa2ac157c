"""The captioner of transformers, on a model of random weights, against transformers itself."""

import sys
from unittest import mock

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from transformers.models.clip import CLIPImageProcessorPil

from pipeline.errors import ClipRejected
from pipeline.stages.caption import CaptionConfig, caption_clip
from pipeline.stages.captioners import ModelCaptioner, load_captioner
from pipeline.stages.probe import Probe
from pipeline.stages.window import Clip

SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
WORDS = [*SPECIAL.values(), "<image>", "a", "the", "red", "grey", "dog", "car", "ramp", "runs", "turns", "left", "."]
SIZES = {"height_px": 24, "width_px": 32, "pixel_aspect": 1.0, "rotation_deg": 0, "num_frames": 2}
ROW = {
    "source_uri": "/a.mp4",
    "probe": Probe(source_id="s", codec="h264", fps=8.0, start_s=0.0, end_s=0.25, **SIZES),
    **{"start_s": 0.0, "end_s": 0.25, "fps": 8.0, "num_frames": 2, "caption": None},
    "lineage": {"source_id": "s", "caption_source": None},
}
CHAT = (
    "{% for message in messages %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image> {% else %}{{ part.text }} {% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A vision-language model of a few thousand random weights, that never ends by itself."""
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, additional_special_tokens=["<image>"], **SPECIAL
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8),
        text_config=transformers.LlamaConfig(**sizes, **ends, vocab_size=len(WORDS), num_key_value_heads=2),
        image_token_id=WORDS.index("<image>"),
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)  # so that words depend on what is shown
        model.lm_head.weight[:5] = 0
    processor = transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def model_settings(path, **changes):
    return CaptionConfig(fallback="model", model=str(path), prompt="a dog .", max_tokens=6, **changes)


def test_a_model_says_what_transformers_says(folder):
    captioner = load_captioner(model_settings(folder))
    videos_u8 = [np.random.default_rng(seed).integers(0, 256, (3, 24, 32, 3), np.uint8) for seed in range(2)]
    answers = [captioner.describe(video_u8) for video_u8 in videos_u8]
    processor = transformers.AutoProcessor.from_pretrained(folder)
    peer = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    for video_u8, answer in zip(videos_u8, answers, strict=True):
        prompt = "<image> <image> <image> These are 3 frames of one video, in order. a dog . "
        inputs = processor(images=[Image.fromarray(frame) for frame in video_u8], text=prompt, return_tensors="pt")
        tokens = inputs["input_ids"]
        with torch.no_grad():
            for _ in range(6):
                logits = peer(input_ids=tokens, pixel_values=inputs["pixel_values"]).logits
                tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
        expected = " ".join(WORDS[token] for token in tokens[0, -6:])
        assert answer == (expected, "length")
    assert len({answer.text for answer in answers}) > 1  # it sees what is shown


def test_a_model_of_half_precision_captions_a_clip(folder, tmp_path, monkeypatch):
    transformers.LlavaForConditionalGeneration.from_pretrained(folder).bfloat16().save_pretrained(tmp_path)
    transformers.AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    captioner = ModelCaptioner(model_settings(tmp_path, min_words=1))
    assert captioner._model.dtype == torch.bfloat16
    given = mock.Mock(side_effect=captioner._model.generate)
    monkeypatch.setattr(captioner._model, "generate", given)
    captioner._model.generation_config.eos_token_id = list(range(len(WORDS)))  # any word ends it
    clip = Clip(np.zeros((2, 24, 32, 3), np.uint8), np.zeros(2), "fake")
    row = caption_clip(ROW, read=lambda *_, **__: clip, captioner=captioner)
    assert given.call_args.kwargs["pixel_values"].dtype == torch.bfloat16
    assert row["caption"] in WORDS
    assert row["lineage"]["caption_source"] == f"model:{tmp_path}"


def test_a_picture_that_a_model_does_not_take_is_a_verdict(folder):
    captioner = ModelCaptioner(model_settings(folder))

    def strict(*_, **__):
        raise ValueError("absolute aspect ratio must be smaller than 200,\ngot 300")

    captioner._processor.apply_chat_template = strict
    with pytest.raises(ClipRejected, match="caption_failed: .*smaller than 200, got 300"):
        captioner.describe(np.zeros((1, 2, 600, 3), np.uint8))


def test_a_model_that_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"model='.*nothing': cannot be loaded"):
        ModelCaptioner(model_settings(tmp_path / "nothing"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"model='.*': cannot be loaded"):
        ModelCaptioner(model_settings(tmp_path))
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'kinoray\[vlm\]'"):
        ModelCaptioner(model_settings(tmp_path))
