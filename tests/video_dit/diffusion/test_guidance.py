"""Guidance against its closed forms."""

import torch

from video_dit.diffusion.guidance import classifier_free


def test_guidance_one_is_conditional_and_zero_unconditional():
    conditional, unconditional = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.allclose(classifier_free(conditional, unconditional, torch.tensor(1.0)), conditional)
    assert torch.equal(classifier_free(conditional, unconditional, torch.tensor(0.0)), unconditional)
    twice = classifier_free(conditional, unconditional, torch.tensor(2.0))
    assert torch.allclose(twice - conditional, conditional - unconditional, atol=1e-6)
