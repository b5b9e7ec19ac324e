"""gin at the edge: files and bindings to a validated `config.Run`. No other module of the package imports gin."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gin

from readme_jax import config
from readme_jax.errors import ConfigError
from readme_jax.files import write_text

# Field of Run -> the class it holds. A binding names the class: `ExpertStage.lr = 2e-4`.
SECTIONS: dict[str, type] = {
    "model": config.Model,
    "data": config.Data,
    "slice": config.Slice,
    "router": config.Router,
    "router_stage": config.RouterStage,
    "expert_stage": config.ExpertStage,
    "tuning": config.Tuning,
    "mesh": config.Mesh,
    "cluster": config.Cluster,
}
_BOUND: dict[type, Any] = {c: gin.external_configurable(c, module="readme_jax") for c in SECTIONS.values()}
_RUN = gin.external_configurable(config.Run, module="readme_jax", denylist=list(SECTIONS))
_SERVING = gin.external_configurable(config.Serving, module="readme_jax", denylist=["mesh"])
_GIN_ERRORS = (ValueError, SyntaxError, ImportError, AttributeError, NameError, TypeError)
_INCLUDE = re.compile(r"""\s*include\s+(['"])(.+)\1\s*(#.*)?$""")
_LOCK = threading.Lock()  # gin's bindings are global


class LoadedRun(NamedTuple):
    """A run's settings and the two gin texts that document them."""

    run: config.Run
    parsed: str  # the bindings that were given
    operative: str  # every binding in force, defaults too


def load(gin_files: Sequence[str | Path] = (), gin_params: Sequence[str] = ()) -> LoadedRun:
    """Parse gin files, then bindings, which win. Files compose with `include 'models/x.gin'`: a path is looked up from
    the current folder, from the including file's folder and from the folder above that.

    Raises ConfigError, one line with the file and line, for a missing file, bad syntax, a misspelt name, and a value
    of the wrong type or out of range.
    """
    with _parsed(gin_files, gin_params):
        sections = {name: _plain(_BOUND[c]()) for name, c in SECTIONS.items()}
        run = _plain(_RUN(**sections))
        return LoadedRun(run, gin.config_str(), gin.operative_config_str())


def load_serving(gin_files: Sequence[str | Path] = (), gin_params: Sequence[str] = ()) -> config.Serving:
    """The serving engine's settings of gin files and bindings (`Serving.rows = 8`, `Mesh.tensor = 2`). Raises as `load`
    does."""
    with _parsed(gin_files, gin_params):
        return _plain(_SERVING(mesh=_plain(_BOUND[config.Mesh]())))


@contextmanager
def _parsed(gin_files: Sequence[str | Path], gin_params: Sequence[str]) -> Iterator[None]:
    """gin's bindings, in force inside the block; what is wrong with their values is told with its place."""
    with _LOCK:
        gin.clear_config()
        try:
            files = _parse([str(f) for f in gin_files], list(gin_params))
            try:
                yield
            except ConfigError as e:
                raise ConfigError(_locate(str(e), files, gin_params)) from None
            except (ValueError, TypeError, RecursionError) as e:  # macros and references that lead nowhere
                raise ConfigError(f"{_condense(e)}: settings are plain values") from None
        finally:
            gin.clear_config()


def load_run(gin_files: Sequence[str | Path] = (), gin_params: Sequence[str] = ()) -> config.Run:
    """The run of gin files and bindings: see `load`."""
    return load(gin_files, gin_params).run


def save_settings(loaded: LoadedRun, folder: str | Path) -> None:
    """Write `config.gin` (as given), `operative_config.gin` (with defaults) and `config.json` (resolved)."""
    folder = Path(folder)
    write_text(folder / "config.gin", loaded.parsed)
    write_text(folder / "operative_config.gin", loaded.operative)
    write_text(folder / "config.json", resolved(loaded.run))


def resolved(run: config.Run) -> str:
    """The resolved config as JSON text: what golden tests compare."""
    return json.dumps(config.to_dict(run), indent=2) + "\n"


def from_json(text: str) -> config.Run:
    """The inverse of `resolved`. Raises ConfigError on text that is no JSON, an unknown field or a bad value."""
    try:
        return from_dict(json.loads(text))
    except ValueError as e:
        raise ConfigError(f"not the resolved config of a run: {e}") from None


def from_dict(values: dict[str, Any]) -> config.Run:
    """The inverse of `config.to_dict`. Raises ConfigError on an unknown field or a bad value."""
    values = {"cluster": {}} | values  # runs saved before there were several processes have none
    rest = {name: value for name, value in values.items() if name not in SECTIONS}
    try:
        return config.Run(**rest, **{name: c(**values[name]) for name, c in SECTIONS.items()})
    except (TypeError, KeyError) as e:
        raise ConfigError(f"not the resolved config of a run: {e}") from None


def _plain(value: Any) -> Any:
    """A dataclass made through gin as its own class."""
    base = getattr(config, type(value).__name__)
    return base(**{f.name: getattr(value, f.name) for f in dataclasses.fields(value)})


def _parse(gin_files: list[str], gin_params: list[str]) -> list[str]:
    """Parse everything; the paths of all files read, included ones too, each before those that override it."""
    read: list[str] = []
    for name in gin_files:
        _parse_file(name, [], read)
    for param in gin_params:
        try:
            gin.parse_config(param)
        except _GIN_ERRORS as e:
            raise ConfigError(f"{_condense(e, param=True)} (--gin_param {param!r})") from None
    scoped = re.search(r"^\w+/\S+", gin.config_str(), re.MULTILINE)
    if scoped:
        raise ConfigError(f"{scoped[0]}: a scope has no effect here: drop the part before the slash")
    return read


def _parse_file(name: str, including: list[str], read: list[str]) -> None:
    """Parse one file, its includes where they stand. (gin's own `include` would search Python packages too.)"""
    if not Path(name).is_file():
        raise ConfigError(f"no gin file {name}")
    if name in including:
        raise ConfigError(f"{name} includes itself, through {including[-1]}")
    try:
        lines = Path(name).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as e:
        raise ConfigError(f"{name}: not a gin file, which is text in UTF-8") from e
    start = 0
    for number, line in enumerate(lines):
        include = _INCLUDE.match(line)
        if include:
            _parse_lines(name, lines, start, number)
            start = number + 1
            _parse_file(_included(include[2], name, start), [*including, name], read)
    _parse_lines(name, lines, start, len(lines))
    read.append(name)


def _parse_lines(name: str, lines: list[str], start: int, stop: int) -> None:
    text = io.StringIO("\n" * start + "\n".join(lines[start:stop]) + "\n")  # blank lines keep the numbering
    text.name = name
    try:
        gin.parse_config(text)
    except _GIN_ERRORS as e:
        raise ConfigError(_condense(e)) from None


def _included(target: str, name: str, number: int) -> str:
    folders = [Path(), *Path(name).resolve().parents[:2]]
    found = next((folder / target for folder in folders if (folder / target).is_file()), None)
    if found is None:
        raise ConfigError(f"{name}:{number}: no gin file {target} here, beside this file or in the folder above it")
    return os.path.relpath(found)


def _condense(error: Exception, param: bool = False) -> str:
    """gin's message, several lines with a place at the end, as `file:line: message`."""
    place: str | None = None
    if isinstance(error, SyntaxError):
        message = error.msg
        place = f"{error.filename}:{error.lineno}"
    else:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        message = lines[0].strip().removesuffix(".")
        found = re.search(r'In file "([^"]*)", line (\d+)', str(error))
        place = f"{found[1]}:{found[2]}" if found else None
    return message if param or place is None else f"{place}: {message}"


def _locate(message: str, files: list[str], params: Sequence[str]) -> str:
    """A validation message `Slice.width = 2: must be ...` with the place of that binding, if one set it."""
    message = message.splitlines()[0]
    name = re.match(r"\w+\.\w+", message)
    if name is None:
        return message
    binding = re.compile(rf"\s*(\S*/)?(\w+\.)*{re.escape(name[0])}\s*=")
    for param in reversed(params):
        if binding.match(param):
            return f"{message} (--gin_param {param!r})"
    for file in reversed(files):
        lines = Path(file).read_text(encoding="utf-8").splitlines()
        for number in range(len(lines), 0, -1):
            if binding.match(lines[number - 1]):
                return f"{file}:{number}: {message}"
    return message
