"""LPIPS by its formula, and the weights of a file under their published names."""

import pytest
import torch
from safetensors.torch import save_file

from video_dit.perceptual import BLOCKS, MEAN, STD, Lpips


@pytest.fixture(scope="module")
def published():
    """Random weights under the names of torchvision and lpips."""
    generator = torch.Generator().manual_seed(0)
    tensors, channels, place = {}, 3, 0
    for number, block in enumerate(BLOCKS):
        place += number > 0  # the pooling
        for width in block:
            scale = (2 / (9 * channels)) ** 0.5
            tensors[f"features.{place}.weight"] = torch.randn(width, channels, 3, 3, generator=generator) * scale
            tensors[f"features.{place}.bias"] = torch.randn(width, generator=generator) * 0.1
            channels, place = width, place + 2
        tensors[f"lin{number}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    tensors["classifier.0.weight"] = torch.ones(2)  # of no use here
    return tensors


@pytest.fixture(scope="module")
def file(published, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips") / "lpips_vgg.safetensors"
    save_file(published, path)
    return str(path)


def by_formula(published, x, y):
    """The paper's equation 1 over the layers relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, for pictures 3 h w."""
    total = 0.0
    pictures = [(p - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None] for p in (x, y)]
    for number, convolutions in enumerate([(0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28)]):
        if number:
            pictures = [torch.nn.functional.max_pool2d(p, 2) for p in pictures]
        for place in convolutions:
            weight, bias = (published[f"features.{place}.{name}"] for name in ("weight", "bias"))
            pictures = [torch.nn.functional.conv2d(p[None], weight, bias, padding=1)[0].relu() for p in pictures]
        unit = [p / p.square().sum(dim=0).sqrt() for p in pictures]
        head = published[f"lin{number}.model.1.weight"][0]
        total += float(((unit[0] - unit[1]).square() * head).sum(dim=0).mean())
    return total


def test_the_distance_is_that_of_the_formula_frame_by_frame(published, file):
    model = Lpips.from_pretrained(file)
    x, y = torch.rand(2, 2, 3, 2, 32, 48) * 2 - 1
    expected = [by_formula(published, x[b, :, t], y[b, :, t]) for b in range(2) for t in range(2)]
    assert model(x, y).item() == pytest.approx(sum(expected) / 4, rel=1e-4)
    assert model(x, x) == 0


def test_gradients_reach_the_video_and_no_weights(file):
    model = Lpips.from_pretrained(file)
    x, y = torch.rand(2, 1, 3, 1, 16, 16) * 2 - 1
    model(x.requires_grad_(), y).backward()
    assert x.grad.abs().max() > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_file_without_the_heads_says_what_to_put_in(published, tmp_path):
    path = tmp_path / "vgg.safetensors"
    save_file({name: value for name, value in published.items() if not name.startswith("lin")}, path)
    with pytest.raises(ValueError, match="no tensor lin0.model.1.weight: save torchvision's"):
        Lpips.from_pretrained(str(path))


def test_frames_that_vanish_in_the_network_are_refused(file):
    with pytest.raises(ValueError, match="frames of 8x32"):
        Lpips.from_pretrained(file)(*torch.rand(2, 1, 3, 1, 8, 32))
