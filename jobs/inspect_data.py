"""What a result holds, as a page: counts, reject reasons, histograms, thumbnails of kept and refused clips, lineage.

python jobs/inspect_data.py runs/curate/videos-1a2b3c4d5e6f
"""

import dataclasses
import webbrowser
from typing import Annotated

import tyro

from jobs import cli
from pipeline import console, report, report_page, store


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of the job.

    Attributes:
        folder: of a result that a job printed.
        output: where the page goes; None is `report.html` in the folder.
        thumbnails: most clips of each kind to show.
        open: show the page in a browser.
    """

    folder: Annotated[str, tyro.conf.Positional]
    output: str | None = None
    thumbnails: int = 24
    open: bool = False


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)
    with cli.errors_in_one_line():
        manifest = store.Manifest.load(options.folder)
        url = report_page.write_page(manifest, options.thumbnails, options.output and store.absolute(options.output))
        console.reject_table(manifest, report.make_report(manifest).reasons)
    if options.open:
        webbrowser.open(url)
    print(f"page: {url}")
