"""The app of starting.py: one task, which notes when its body began."""

import os
import time
from pathlib import Path

from ekiden import Ekiden

app = Ekiden("starting", broker=os.environ["BENCH_EKIDEN_URL"])


@app.task(ignore_result=True)
def note() -> None:
    directory = Path(os.environ["BENCH_DIRECTORY"])
    (directory / "writing").write_text(str(time.monotonic()))
    (directory / "writing").rename(directory / "began")
