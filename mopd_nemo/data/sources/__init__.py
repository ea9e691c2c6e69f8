"""The paper's benchmarks and GSM8K by name. Each file names a source and turns its rows into problems."""

from __future__ import annotations

from mopd_nemo.config import UserError
from mopd_nemo.data.prepare import Source
from mopd_nemo.data.sources import livecodebench, maths, sciknoweval, toolalpaca

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        *sciknoweval.SOURCES,
        toolalpaca.SOURCE,
        *livecodebench.SOURCES,
        *maths.SOURCES,
    )
}


def find_source(name: str) -> Source:
    """A source by name.

    Raises:
        UserError: there is none.
    """
    if name not in SOURCES:
        raise UserError(f"{name}: no such data source; known: {', '.join(SOURCES)}")
    return SOURCES[name]
