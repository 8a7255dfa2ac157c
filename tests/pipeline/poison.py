"""Work that takes its worker process down. In a module of its own: workers import it."""

import os
import signal
from pathlib import Path

from pipeline import store
from pipeline.errors import ClipRejected


class Work:
    """Writes the sum of its table; dies over one value, leaves a mark for each call."""

    def __init__(self, folder, poison=None):
        self.folder, self.poison = Path(folder), poison

    def __call__(self, table, attempt):
        values, quarantined = table["value"].to_pylist(), []
        with (self.folder / "calls").open("a") as calls:
            calls.write(f"{values[0]}\n")
        for value in values:
            try:
                with attempt.working_on(str(value)):
                    if value == self.poison:
                        os.kill(os.getpid(), signal.SIGKILL)
            except ClipRejected as verdict:
                quarantined.append([value, str(verdict.reason)])
        store.write_json(f"{self.folder}/sum-{values[0]}.json", sum(values))
        files = {"sums": f"sum-{values[0]}.json"}
        return {"files": files, "num_rows": len(values), "num_rejects": len(quarantined), "quarantined": quarantined}
