"""Kinoray's model library: video diffusion transformers and causal video VAEs in plain PyTorch."""
