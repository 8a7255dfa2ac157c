"""Models by the folder of their run, or by their own."""

from __future__ import annotations

import dataclasses

from pipeline import store


def model_folder(run: store.Manifest) -> str:
    """The model folder that a finished run ends with."""
    return store.join(run.uri, "models", f"step-{run.counts['step']}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model to sample from.

    Attributes:
        uri: its folder.
        run: the training run it came from; None for a folder from elsewhere.
    """

    uri: str
    run: store.Manifest | None

    @property
    def name(self) -> str:
        """The run's folder, or the model's own."""
        return (self.run.uri if self.run else self.uri).rsplit("/", 1)[-1]

    @property
    def parents(self) -> list[store.Manifest]:
        """For the lineage of what is made with it."""
        return [self.run] if self.run else []

    @property
    def as_parents(self) -> list[store.Manifest]:
        """The same; a model from elsewhere is its own ancestor."""
        return self.parents or [store.Manifest.of_folder(self.uri)]


def open_model(url: str) -> Model:
    """A model by the folder of its run, or by its own folder.

    Raises:
        ManifestError: neither is there.
    """
    uri = store.absolute(url).rstrip("/")
    if not store.exists(store.join(uri, "model_index.json")):
        run = store.Manifest.load(uri)
        return Model(uri=model_folder(run), run=run)
    folder = uri.rsplit("/", 2)[0]  # <run>/models/step-N
    return Model(uri=uri, run=store.Manifest.load(folder) if store.exists(f"{folder}/{store.MANIFEST}") else None)
