"""What all jobs share: `[RECIPE] --storage URL --source URL --dotted.override value`, and how they end."""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import tyro

from jobs.recipes import RECIPES
from pipeline import cluster, store
from pipeline.chain import Chain, Recipe
from pipeline.errors import KinorayError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of a job.

    Attributes:
        recipe: every field of every part can be set by its dotted name.
        storage: folder or URL that all results go to.
        source: folder, bucket or manifest of videos; without it, the toy world is made.
        model: folder of a training run or of a model, to use instead of training one.
        latents: what encode_clips printed, to use instead of encoding the source; several are data sets of a mixture.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    storage: str = "runs"
    source: str | None = None
    model: str | None = None
    latents: tuple[str, ...] = ()


def run(job: Callable[[Chain], store.Manifest], description: str | None, next_step: str) -> None:
    """Parse the command line, connect to Ray and run the job; exit 1 on an error.

    Args:
        job: what to do.
        description: for --help.
        next_step: what to do next, printed before the last line; {uri} stands for the result.
    """
    options = parse(sys.argv[1:], description)
    with errors_in_one_line():
        cluster.connect()
        storage = cluster.resolve_storage(options.storage)
        chain = Chain(options.recipe, options.source, storage, options.model, options.latents)
        manifest = job(chain)
    print(f"next: {next_step.format(uri=manifest.uri)}")
    print(f"result: {manifest.uri}")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What a user can act on ends the program with its message alone; KINORAY_TRACEBACK=1 shows where it came from."""
    try:
        yield
    except (KinorayError, ValueError, FileNotFoundError) as error:
        if os.environ.get("KINORAY_TRACEBACK"):
            raise
        sys.exit(f"error: {error}\n(KINORAY_TRACEBACK=1 shows where)")


def parse(arguments: list[str], description: str | None) -> Options:
    """The options of a command line; its first word, if it is no flag, names a recipe."""
    name, rest = recipe_name(arguments)
    recipe = RECIPES[name]()
    about = f"{description}\n\nRecipe {name} (of {', '.join(RECIPES)}): {RECIPES[name].__doc__}"
    return tyro.cli(Options, default=Options(recipe=recipe), args=rest, description=about)


def recipe_name(arguments: list[str]) -> tuple[str, list[str]]:
    """The recipe that a command line begins with, or the default one, and the rest of it."""
    name, rest = ("toy_cpu", arguments)
    if arguments and not arguments[0].startswith("-"):
        name, rest = arguments[0], arguments[1:]
    if name not in RECIPES:
        sys.exit(f"error: unknown recipe {name!r}; known: {', '.join(RECIPES)}")
    return name, rest
