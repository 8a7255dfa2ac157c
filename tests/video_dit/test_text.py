"""Text encoders: hashed words are deterministic, case-blind and order-aware; UMT5 is used as Wan's pipelines use it."""

import json
from types import SimpleNamespace

import diffusers
import fsspec
import pytest
import tokenizers
import torch
import transformers

from video_dit import text
from video_dit.packing import pack
from video_dit.text import HashedWordConfig, HashedWordEncoder, load_text_encoder

ENCODER = HashedWordEncoder(HashedWordConfig(dim=40, position_dim=8))


def test_one_row_a_word_and_one_for_the_end():
    red_square, empty = ENCODER(["A red, square!", ""])
    assert red_square.shape == (4, 40)
    assert empty.shape == (1, 40)
    assert torch.equal(red_square[3, :32], empty[0, :32])  # the end's own vector


def test_a_word_keeps_its_vector_and_the_place_tells_order():
    first, second = ENCODER(["red over BLUE", "blue over red"])
    assert torch.equal(first[0, :32], second[2, :32])
    assert torch.equal(first[:, 32:], second[:, 32:])
    assert not torch.equal(first, second)


def test_vectors_are_what_they_were_when_models_were_trained():
    (vector,) = ENCODER(["circle"])
    assert vector[0, :8].tolist() == [1, 1, 1, 1, 1, -1, -1, 1]
    assert vector[0, 32:].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_words_are_nearly_orthogonal():
    words = ["red", "green", "blue", "circle", "square", "triangle", "left", "right", "up", "down", "slowly", "fast"]
    signs = torch.cat([HashedWordEncoder(HashedWordConfig())([word])[0][:1, :80] for word in words])
    overlap = (signs @ signs.T / 80 - torch.eye(len(words))).abs().max()
    assert overlap < 0.5


def test_round_trip_and_errors(tmp_path):
    ENCODER.save_pretrained(str(tmp_path))
    assert torch.equal(load_text_encoder(str(tmp_path))(["a b"])[0], ENCODER(["a b"])[0])
    (tmp_path / "text_encoder" / "config.json").write_text('{"_class_name": "Other"}')
    with pytest.raises(ValueError, match="'Other' is not known"):
        load_text_encoder(str(tmp_path))
    with pytest.raises(ValueError, match="caption of 3 words: max_words=2"):
        HashedWordEncoder(HashedWordConfig(max_words=2))(["a b c"])
    with pytest.raises(ValueError, match="dim=20"):
        HashedWordConfig(dim=20, position_dim=16)


class FakeTokenizer:
    """A word a token, its length the id; 1 is the end."""

    def __call__(self, text, return_tensors):
        ids = [[*map(len, text.split(" ")), 1]]
        return SimpleNamespace(input_ids=torch.tensor(ids))


def fake_model(ids):
    """A token's vector is its id, and its place."""
    places = torch.arange(ids.shape[1]).expand_as(ids)
    return SimpleNamespace(last_hidden_state=torch.stack([ids, places], dim=-1).to(torch.bfloat16))


def umt5_folder(folder, **fields):
    """What Wan's pipeline folders say of their text encoder, and what ours may say besides."""
    config = {"architectures": ["UMT5EncoderModel"], "model_type": "umt5", "d_model": 2, "num_heads": 64, **fields}
    for name, values in (("text_encoder", config), ("tokenizer", {"model_max_length": 512})):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(values))
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"")
    return str(folder)


def test_a_wan_folder_gets_512_tokens_with_zeros_behind_the_captions_own(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "load_umt5", lambda url, subfolder, device: (FakeTokenizer(), fake_model))
    encoder = load_text_encoder(umt5_folder(tmp_path))
    assert encoder.dim == 2
    caption, empty = encoder(["  a\n &amp;amp; dog ", ""])
    expected = torch.zeros(512, 2)
    expected[:4] = torch.tensor([[1.0, 0.0], [1.0, 1.0], [3.0, 2.0], [1.0, 3.0]])  # a & dog </s>
    assert caption.dtype == torch.float32
    assert torch.equal(caption, expected)
    assert empty.shape == (512, 2)
    assert not empty[2:].any()
    with pytest.raises(ValueError, match="caption of 513 tokens: max_tokens=512"):
        encoder([" ".join(["a"] * 512)])
    packed = pack([torch.zeros(4, 1, 2, 2)] * 2, [0.0, 0.0], [caption, empty])
    assert packed.text_lengths == (512, 512)  # no mask: attention sees the zeros


def test_a_folder_of_ours_may_leave_umt5s_captions_as_long_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "load_umt5", lambda url, subfolder, device: (FakeTokenizer(), fake_model))
    encoder = load_text_encoder(umt5_folder(tmp_path, zero_padded=False, max_tokens=3))
    assert [vectors.tolist() for vectors in encoder(["a dog"])] == [[[1.0, 0.0], [3.0, 1.0], [1.0, 2.0]]]
    with pytest.raises(ValueError, match="caption of 4 tokens: max_tokens=3"):
        encoder(["a a a"])
    encoder.save_pretrained("memory://umt5")  # the folder's own files, without its pickle
    copy = load_text_encoder("memory://umt5")
    copy.save_pretrained("memory://umt5/")  # onto itself
    assert copy.config == encoder.config
    assert torch.equal(copy(["a dog"])[0], encoder(["a dog"])[0])
    assert not fsspec.filesystem("memory").exists("/umt5/text_encoder/pytorch_model.bin")


def test_umt5_equals_diffusers_pipeline(tmp_path):
    words = ["<pad>", "</s>", "<unk>", "a", "red", "dog"]
    model = tokenizers.models.Unigram([(f"▁{w}" if i > 2 else w, 0.0) for i, w in enumerate(words)], unk_id=2)
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    fast.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **special)
    torch.manual_seed(0)
    sizes = {"vocab_size": 6, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    umt5 = transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)).eval()
    umt5.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    parts = {"tokenizer": tokenizer, "text_encoder": umt5}
    pipe = diffusers.WanPipeline(**parts, transformer=None, vae=None, scheduler=None)
    captions = ["a red  dog", "dog"]
    expected = pipe._get_t5_prompt_embeds(captions, max_sequence_length=512, device="cpu")
    vectors = load_text_encoder(str(tmp_path))(captions)
    torch.testing.assert_close(torch.stack(vectors), expected, rtol=1e-4, atol=1e-5)
    assert vectors[0][:4].abs().min() > 0
