"""`moetrain report`: one HTML file of a run that needs nothing else, no network and no server.

read: the run's files, at a size that does not grow with the run. routing: what sources and layers have to do with each other. charts: pieces of
HTML. page: the page, with page.css and page.js inside.
"""

from __future__ import annotations

from pathlib import Path

from moetrain.files import check_own
from moetrain.report.page import page
from moetrain.report.read import read_run


def write(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run, to RUN/report.html by default; returns its path. ValueError if the folder is no run's."""
    run = read_run(run_dir)
    path = Path(output) if output is not None else run.folder / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    check_own(path.parent, (path.name,))
    fresh = path.with_name(path.name + ".tmp")
    # A name that is no Unicode text (a lone surrogate) shows a question mark.
    fresh.write_bytes(page(run).encode("utf-8", "replace"))
    fresh.replace(path)
    return path
