"""Where RedPajama's seven sources lie in a folder, as they are published: the whole set or its sample.

Whole (data.together.xyz, redpajama-data-1T/v1.0.0): the paths of its `urls.txt`, for instance `arxiv/arxiv_*.jsonl`,
`common_crawl/2019-30/*.jsonl.zst`. Sample (togethercomputer/RedPajama-Data-1T-Sample): `arxiv_sample.jsonl`,
`cc_2019-30_sample.jsonl`. Any file may be compressed with gzip or zstandard, or unpacked. Where `urls.txt` lies beside
the files, every file that it lists of the wanted sources must be there; delete lines to use a part.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from readme_jax.errors import DataError

URLS = "urls.txt"
ROOT = "redpajama-data-1T/v1.0.0/"  # what comes before a file's path in urls.txt
NAMED = 20  # missing files that an error names, at most


class Source(NamedTuple):
    """A source's files: in the whole set below its folder, how many are published, in the sample by a pattern."""

    published: int
    whole: str  # what to look for, in words of the publisher
    sample: str


SOURCES = {
    "arxiv": Source(100, "arxiv/arxiv_*.jsonl", "arxiv_sample.jsonl"),
    "book": Source(1, "book/book.jsonl", "book_sample.jsonl"),
    "c4": Source(1024, "c4/c4-train.*-of-01024.jsonl", "c4_sample.jsonl"),
    "common_crawl": Source(859, "common_crawl/*/*.jsonl.zst", "cc_*_sample.jsonl"),
    "github": Source(98, "github/*.jsonl", "github_sample.jsonl"),
    "stackexchange": Source(1, "stackexchange/stackexchange.jsonl", "stackexchange_sample.jsonl"),
    "wikipedia": Source(1, "wikipedia/wiki.jsonl", "wikipedia_sample.jsonl"),
}
_PACKED = ("", ".gz", ".zst")


def find_sources(folder: Path, wanted: tuple[str, ...] = ()) -> dict[str, list[Path]]:
    """The files of each wanted source (all seven by default), in order of their paths.

    Raises DataError, one line that names each missing file or source, or an unknown source.
    """
    if not folder.is_dir():
        raise DataError(f"no data folder {folder}: Data.folder must hold RedPajama's files (docs/data.md)")
    for name in wanted:
        if name not in SOURCES:
            raise DataError(f"RedPajama has no source {name!r}: it has {', '.join(SOURCES)}")
    if len(set(wanted)) < len(wanted):
        raise DataError(f"Data.domains names a source twice: {', '.join(wanted)}")
    names = wanted or tuple(SOURCES)
    listed = _listed(folder / URLS, names)
    found = {name: _from_list(folder, listed[name]) if listed.get(name) else _below(folder, name) for name in names}
    missing = [str(path) for files in found.values() for path in files if not path.is_file()]
    missing += [f"{SOURCES[name].whole} (or {SOURCES[name].sample})" for name, files in found.items() if not files]
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        names_ = ", ".join(m.removeprefix(f"{folder}/") for m in missing[:NAMED])
        raise DataError(f"RedPajama files missing in {folder}: {names_}{more}; download them (docs/data.md)")
    return found


def _listed(urls: Path, names: tuple[str, ...]) -> dict[str, list[str]]:
    """Paths by source that a urls.txt asks for; nothing where there is none."""
    if not urls.is_file():
        return {}
    paths = [line.strip().partition(ROOT)[2] for line in urls.read_text(encoding="utf-8").splitlines()]
    return {name: sorted(p for p in paths if p.startswith(f"{name}/")) for name in names}


def _from_list(folder: Path, paths: list[str]) -> list[Path]:
    """Each listed file as it is here: as published, packed or unpacked; a missing one under its published name."""
    out = []
    for path in paths:
        plain = path.removesuffix(".zst").removesuffix(".gz")
        here = [folder / (plain + suffix) for suffix in _PACKED]
        out.append(next((p for p in [folder / path, *here] if p.is_file()), folder / path))
    return out


def _below(folder: Path, name: str) -> list[Path]:
    """A source's files where nothing lists them: all JSON lines in its folder, else those of the sample."""
    whole = [p for suffix in _PACKED for p in (folder / name).rglob(f"*.jsonl{suffix}") if p.is_file()]
    sample = [p for suffix in _PACKED for p in folder.glob(SOURCES[name].sample + suffix) if p.is_file()]
    if whole and sample:
        raise DataError(f"{folder} has both {name}/ and {sample[0].name}: keep one of them")
    files = sorted(whole or sample)
    stems = [str(p).removesuffix(".gz").removesuffix(".zst") for p in files]
    twice = next((p for p, stem in zip(files, stems, strict=True) if stems.count(stem) > 1), None)
    if twice is not None:
        raise DataError(f"{twice} is there packed and unpacked: keep one of them")
    return files
