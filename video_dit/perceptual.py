"""LPIPS (arXiv 1801.03924): how different pictures look, from the features of a VGG-16 (arXiv 1409.1556)."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from video_dit.tensor_files import TensorReader

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels; pooling in between
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of ImageNet's colours in [-1, 1], as LPIPS has them
SMALLEST_PX = 16  # of a side: four times halved


class Lpips(nn.Module):
    """A distance of videos, frame by frame; never trained.

    Names of the weights are those of torchvision's VGG-16 ("features.0.weight") and of the lpips package's linear heads
    ("lin0.model.1.weight", one for each of the five blocks).
    """

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends: list[int] = []  # of the blocks, whose outputs are compared
        channels = 3
        for block in BLOCKS:
            if layers:
                layers.append(nn.MaxPool2d(2))
            for width in block:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
            self.ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        self.heads = nn.ParameterList([nn.Parameter(torch.zeros(block[-1])) for block in BLOCKS])
        self.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, url: str) -> Lpips:
        """Weights of a safetensors file (any fsspec URL) with both networks' tensors; others in it are left out.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a tensor is not there, or has another shape.
        """
        with torch.device("meta"):
            model = cls()
        state = {}
        with TensorReader(url) as reader:
            for name, parameter in model.named_parameters():
                stored = name.replace("heads.", "lin") + ".model.1.weight" if name.startswith("heads.") else name
                if stored not in reader.tensors:
                    raise ValueError(
                        f"{url}: no tensor {stored}: save torchvision's VGG-16 features and the lpips package's heads "
                        "(vgg, version 0.1) under their own names in one file"
                    )
                value = reader.read(stored).float()
                if value.numel() != parameter.numel():
                    raise ValueError(f"{url}: {stored} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}")
                state[name] = value.reshape(parameter.shape)  # heads are 1 c 1 1
        model.load_state_dict(state, assign=True)
        return model.requires_grad_(False)

    def forward(self, video: Tensor, reference: Tensor) -> Tensor:
        """The mean distance of the frames, a scalar; b 3 t h w in [-1, 1] each.

        Raises:
            ValueError: frames too small for the network.
        """
        if min(video.shape[3:]) < SMALLEST_PX:
            raise ValueError(f"frames of {video.shape[3]}x{video.shape[4]}: LPIPS needs at least {SMALLEST_PX} a side")
        both = rearrange(torch.cat([video, reference]), "b c t h w -> (b t) c h w")
        mean, std = (both.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        x, distance, start = (both - mean) / std, both.new_zeros(()), 0
        for end, head in zip(self.ends, self.heads, strict=True):
            x = self.features[start:end](x)
            own, other = (x / (x.norm(dim=1, keepdim=True) + 1e-10)).chunk(2)
            distance = distance + torch.einsum("nchw,c->nhw", (own - other).square(), head).mean()
            start = end
        return distance
