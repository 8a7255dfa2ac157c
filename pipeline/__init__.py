"""Kinoray's Ray side and its data contracts: videos -> curate -> encode -> train -> generate / serve -> evaluate."""

__version__ = "0.1.0"
