"""Guidance: predictions made more like what was asked for."""

from __future__ import annotations

from torch import Tensor


def classifier_free(conditional: Tensor, unconditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): away from the unconditional prediction.

    `scale`, broadcast against the predictions: 1 is the conditional prediction itself, 0 the unconditional one.
    """
    return unconditional + scale * (conditional - unconditional)
