"""The hashed-word encoder: deterministic, case-blind, order-aware, one vector a word."""

import pytest
import torch

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
