"""Noise schedules, training targets, samplers and guidance as pure functions. sigma in [0, 1]: 1 = noise, 0 = data."""
