"""Losses of the VAE by closed form, and whose weights their gradients reach."""

import numpy as np
import pytest
import torch
from torch import nn

from video_dit.patch_discriminator import PatchDiscriminator, hinge_discriminator, r1_penalty
from video_dit.quality import psnr_db, ssim
from video_dit.vae import VideoVAE, VideoVAEConfig
from video_dit.vae_losses import AdversarialVae, VaeLossConfig, balance, gradient_distance, reconstruction_losses

VAE = VideoVAEConfig(base_dim=4, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4)


def video(seed=0, t=5, size=16):
    return torch.rand(2, 3, t, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_gradient_distance_sees_edges_and_no_brightness():
    x = video()
    assert gradient_distance(x + 0.3, x) == pytest.approx(0, abs=1e-6)
    step = torch.zeros(1, 1, 2, 2, 4)
    step[..., 2:] = 1  # one edge in each of four rows
    assert gradient_distance(step, torch.zeros_like(step)) == pytest.approx(4 / (8 + 8 + 12))


def test_psnr_and_ssim_of_a_shift_are_those_of_their_formulas():
    x = torch.full((1, 3, 2, 16, 20), 0.2)
    assert psnr_db(x + 0.1, x).item() == pytest.approx(10 * np.log10(4 / 0.01), rel=1e-4)
    c1 = 0.01**2
    expected = (2 * 0.6 * 0.65 + c1) / (0.6**2 + 0.65**2 + c1)
    assert ssim(x + 0.1, x).item() == pytest.approx(expected, rel=1e-4)
    noise = video(1, size=24)
    assert ssim(noise, noise).tolist() == pytest.approx([1, 1])
    assert psnr_db(noise, noise).tolist() == [100, 100]
    assert (ssim(noise, video(2, size=24)).abs() < 0.05).all()
    assert ssim(-noise, noise).max() < -0.5  # what is light is dark
    assert ssim(noise[:, :, :, :6, :6], noise[:, :, :, :6, :6]).tolist() == pytest.approx([1, 1])


def test_reconstruction_losses_are_the_weighted_means():
    class Shifted(nn.Module):
        def forward(self, x, generator, touch_all):
            return x + 0.5, self

        def kl(self):
            return torch.tensor([3.0, 5.0])

    config = VaeLossConfig(l2_weight=2, l1_weight=3, gradient_weight=1, kl_weight=0.5)
    _, losses = reconstruction_losses(Shifted(), video(), torch.Generator(), config)
    found = {name: loss.item() for name, loss in losses.items()}
    assert found == pytest.approx({"l2": 2 * 0.25, "l1": 3 * 0.5, "gradient": 0, "kl": 0.5 * 4}, abs=1e-6)


def test_r1_is_the_squared_gradient_of_the_logits():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1.0, -2.0, 2.0]))

        def forward(self, x):
            return torch.einsum("bcthw,c->bthw", x, self.weight)

    model, real = Linear(), video().requires_grad_()
    penalty = r1_penalty(model(real), real)
    assert penalty.item() == pytest.approx(9 * 5 * 16 * 16)
    penalty.backward()
    torch.testing.assert_close(model.weight.grad, 2 * 5 * 16 * 16 * torch.tensor([1.0, -2.0, 2.0]))


def test_hinge_is_zero_beyond_the_margins():
    assert hinge_discriminator(torch.tensor([1.0, 7.0]), torch.tensor([-1.0, -3.0])) == 0
    assert hinge_discriminator(torch.zeros(3), torch.zeros(3)) == 2


def test_balance_makes_gradients_equally_long():
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    assert balance(x.square().sum(), 2 * x[0], x).item() == pytest.approx(10 / 2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = VaeLossConfig(l1_weight=1.0, adversarial_weight=0.3, discriminator_width=8, discriminator_layers=2)
    return AdversarialVae(VideoVAE(VAE), config)


def gradients(model, names):
    losses = model(video(), torch.Generator().manual_seed(0), True)
    model.zero_grad()
    torch.stack([losses[name] for name in names]).sum().backward()
    return {
        part: any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
        for part, module in (("vae", model.vae), ("discriminator", model.discriminator))
    }


def test_each_loss_trains_its_own_part(model):
    assert gradients(model, ["l2", "l1", "kl", "adversarial"]) == {"vae": True, "discriminator": False}
    assert gradients(model, ["discriminator", "r1"]) == {"vae": False, "discriminator": True}


def test_the_verdict_weighs_a_share_of_the_errors_at_the_reconstruction(model):
    x = video()
    reconstruction, losses = reconstruction_losses(model.vae, x, torch.Generator().manual_seed(0), model.config)
    found = model(x, torch.Generator().manual_seed(0), True)
    verdict = -model.discriminator(reconstruction).mean()
    errors = losses["l2"] + losses["l1"] + losses["gradient"]
    norms = [torch.autograd.grad(v, reconstruction, retain_graph=True)[0].norm() for v in (errors, verdict)]
    assert found["adversarial"].item() == pytest.approx((0.3 * norms[0] / norms[1] * verdict).item(), rel=1e-4)


def test_before_its_start_the_discriminator_is_silent(model):
    losses = model(video(), torch.Generator().manual_seed(0), False)
    assert [losses[name].item() for name in ("adversarial", "discriminator", "r1")] == [0, 0, 0]
    assert list(losses) == list(model(video(), torch.Generator().manual_seed(0), True))


def test_a_discriminator_learns_to_tell_noise_from_flat_pictures():
    torch.manual_seed(0)
    model = PatchDiscriminator(width=8, num_layers=2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(80):
        flat = torch.rand(2, 3, 1, 1, 1).expand(2, 3, 5, 16, 16) * 2 - 1
        loss = hinge_discriminator(model(video(step)), model(flat))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    assert model(video(99)).shape == (2, 1, 5, 4, 4)


def test_a_perceptual_distance_can_be_added():
    def distance(x, y):
        return (x - y).abs().mean()

    config = VaeLossConfig(l1_weight=1.0, perceptual_weight=7.0, perceptual_file="x", adversarial_weight=0.3)
    torch.manual_seed(0)
    model = AdversarialVae(VideoVAE(VAE), config, distance)
    losses = model(video(), torch.Generator().manual_seed(0), True)
    assert losses["perceptual"].item() == pytest.approx(7 * losses["l1"].item(), rel=1e-5)
    _, plain = reconstruction_losses(model.vae, video(), torch.Generator().manual_seed(0), config, distance)
    assert plain["perceptual"].item() == pytest.approx(losses["perceptual"].item(), rel=1e-5)


def test_weights_that_make_no_sense_are_named():
    with pytest.raises(ValueError, match="r1_weight=-1"):
        VaeLossConfig(r1_weight=-1)
    with pytest.raises(ValueError, match="l2_weight=0, l1_weight=0"):
        VaeLossConfig(l2_weight=0)
    with pytest.raises(ValueError, match="perceptual_weight=1.0: perceptual_file must name"):
        VaeLossConfig(perceptual_weight=1.0)
