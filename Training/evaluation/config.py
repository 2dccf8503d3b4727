"""Reads the configuration of an evaluation, one TOML file. An unknown key or a wrong type is an error that names it.

Placeholders in strings: {data} (the --data folder) everywhere, {model} (--model) and {domain} (the data set's `domain`)
in a system's `model`. Relative paths of pair lists, of `systems` and of `datasets` are relative to the TOML file.
"""

from __future__ import annotations

import dataclasses
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from LDRCore.errors import RegistrationError
from LDRCore.evaluation.scoring import FRAMES, MEASURES, PROTOCOLS
from Training.evaluation.peers import METHODS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATASET_KINDS = ("ixi", "csv", "learn2reg", "rcn")
SYSTEM_KINDS = ("nothing", "affine", "model", "peer", "command")


@dataclass(frozen=True)
class DataSet:
    """One `[[dataset]]`.

    Attributes:
        name: what tables call it.
        kind: "ixi" (folder with manifest.csv), "csv" (list of files), "learn2reg" (dataset.json), "rcn" (JSON + HDF5).
        root: folder, or the JSON file of kinds "learn2reg" and "rcn".
        pairs: CSV of pairs (kinds "ixi" and "csv"), the scheme or subset (kind "rcn"), the key of the list of pairs
            (kind "learn2reg").
        domain: which weights fit (`{domain}` in a system's `model`).
        stripped: remove what lies outside the labels (kind "ixi").
        intra_subject: neighbours in the list belong together (kind "rcn"; LSPIG).
        landmarks: frame of landmark files: "lps", "ras" (mm) or "voxel" (index x, y, z).
        protocol: how labels are warped, see `LDRCore.evaluation.scoring.overlaps`.
        note: printed beside the numbers.
        optional: missing files are no error; the report names them.
    """

    name: str
    kind: str
    root: str
    pairs: str = ""
    domain: str = ""
    stripped: bool = False
    intra_subject: bool = False
    landmarks: str = "lps"
    protocol: str = "nearest"
    note: str = ""
    optional: bool = False


@dataclass(frozen=True)
class System:
    """One `[[system]]`.

    Attributes:
        name: what tables call it.
        kind: "nothing" (contents centred), "affine" (a model's alignment alone), "model", "peer" (see `peers.METHODS`),
            "command" (any command line).
        model: name or path of a model (kinds "affine" and "model").
        cascades: how many (kind "model"); 0 for the affine alignment alone.
        refine: instance optimisation, as in `LDRCore.register` (kind "model")
        method: of kind "peer".
        command: of kind "command": words with {fixed}, {moving}, {out} and perhaps {threads}; it reads two NIfTI files
            and writes a transform (.h5, .tfm, .mat) or a displacement field (.nii.gz, mm LPS) fixed -> moving.
        writes: suffix of {out}.
        timeout_s: a run that takes longer has failed.
    """

    name: str
    kind: str
    model: str = ""
    cascades: int = -1
    refine: str = "none"
    method: str = ""
    command: str = ""
    writes: str = ".nii.gz"
    timeout_s: float = 1800.0


@dataclass(frozen=True)
class Config:
    """A whole evaluation.

    Attributes:
        datasets, systems: in the order of the tables.
        measures: some of `LDRCore.evaluation.scoring.MEASURES`.
        reference: name of the system that the others are compared with (paired Wilcoxon test), or "".
    """

    datasets: list[DataSet]
    systems: list[System]
    measures: list[str] = field(default_factory=lambda: list(MEASURES))
    reference: str = ""


def build(cls: Any, table: dict[str, Any], where: str) -> Any:
    """Make a dataclass of a TOML table.

    Raises:
        RegistrationError: an unknown key, a missing one, or a value of another type.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(table) - set(fields))
    if unknown:
        raise RegistrationError(f"{where} knows the keys {sorted(fields)}, got {unknown[0]!r}")
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if name not in table:
            if required:
                raise RegistrationError(f"{where} must have the key {name!r}, got {sorted(table)}")
            continue
        kind = hints[name]
        wanted = typing.get_origin(kind) or kind
        value = table[name]
        fits = isinstance(value, wanted) and not (isinstance(value, bool) and wanted is not bool)
        if not (fits or (wanted is float and isinstance(value, int) and not isinstance(value, bool))):
            raise RegistrationError(f"{name} of {where} must be of type {wanted.__name__}, got {value!r}")
    return cls(**table)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file as a dict.

    Raises:
        RegistrationError: missing or not TOML.
    """
    try:
        with path.open("rb") as stream:
            return tomllib.load(stream)
    except OSError:
        raise RegistrationError(f"the configuration must be an existing TOML file, got {path} (not found)") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RegistrationError(f"the configuration must be TOML, got {path} ({error})") from None


def load(path: Path, places: dict[str, str]) -> Config:
    """Read and check a configuration.

    Args:
        path: the TOML. Its keys `systems` and `datasets` may name another TOML, whose systems or data sets come before
            its own.
        places: values of the placeholders {data} and {model}; one that is used but not given is an error.
    """
    return from_table(read_toml(path), path, places)


def from_table(table: dict[str, Any], path: Path, places: dict[str, str]) -> Config:
    """Check the content of a configuration, see `load`.

    Args:
        table: the content.
        path: the file that it stands in: messages name it, and relative paths are relative to it.
        places: see `load`.
    """
    table = dict(table)
    datasets, systems = (_entries(table, name, path) for name in ("dataset", "system"))
    config = build(
        Config,
        {
            **table,
            "datasets": [_dataset(entry, source, places) for entry, source in datasets],
            "systems": [_system(entry, source, places) for entry, source in systems],
        },
        path.name,
    )
    _check(config, path)
    return config


def _entries(table: dict[str, Any], name: str, path: Path) -> list[tuple[dict[str, Any], Path]]:
    """Take the entries `[[name]]` out of a table, each with its file; first those of the TOML that `names` gives.

    Raises:
        RegistrationError: that key is no text, or its file missing or not TOML.
    """
    own = [(entry, path) for entry in table.pop(name, [])]
    other = table.pop(f"{name}s", None)
    if other is None:
        return own
    if not isinstance(other, str):
        raise RegistrationError(f"{name}s of {path.name} must name a TOML file, got {other!r}")
    source = path.parent / other
    return [(entry, source) for entry in read_toml(source).get(name, [])] + own


def _filled(text: str, places: dict[str, str], where: str) -> str:
    for name, value in places.items():
        text = text.replace(f"{{{name}}}", value)
    for name in ("data", "model"):
        if f"{{{name}}}" in text:
            raise RegistrationError(f"{where} needs --{name}, which is not given")
    return text


def _dataset(table: dict[str, Any], path: Path, places: dict[str, str]) -> DataSet:
    data = build(DataSet, table, f"[[dataset]] {table.get('name', '')!r} of {path.name}")
    where = f"data set {data.name}"
    if data.kind not in DATASET_KINDS:
        raise RegistrationError(f"kind of {where} must be one of {list(DATASET_KINDS)}, got {data.kind!r}")
    if data.protocol not in PROTOCOLS:
        raise RegistrationError(f"protocol of {where} must be one of {list(PROTOCOLS)}, got {data.protocol!r}")
    if data.landmarks not in FRAMES:
        raise RegistrationError(f"landmarks of {where} must be one of {list(FRAMES)}, got {data.landmarks!r}")
    pairs = _filled(data.pairs, places, where)
    if data.kind in ("ixi", "csv") and not Path(pairs).is_absolute():
        pairs = str(path.parent / pairs)
    return dataclasses.replace(data, root=_filled(data.root, places, where), pairs=pairs)


def _system(table: dict[str, Any], path: Path, places: dict[str, str]) -> System:
    system = build(System, table, f"[[system]] {table.get('name', '')!r} of {path.name}")
    if system.kind not in SYSTEM_KINDS:
        raise RegistrationError(f"kind of {system.name} must be one of {list(SYSTEM_KINDS)}, got {system.kind!r}")
    needed = {"affine": ("model",), "model": ("model", "cascades"), "peer": ("method",), "command": ("command",)}
    for key in needed.get(system.kind, ()):
        if getattr(system, key) in ("", -1):
            raise RegistrationError(f"system {system.name} of kind {system.kind} must have the key {key!r}")
    if system.kind == "peer" and system.method not in METHODS:
        raise RegistrationError(f"method of {system.name} must be one of {sorted(METHODS)}, got {system.method!r}")
    return dataclasses.replace(system, model=_filled(system.model, places, f"system {system.name}"))


def _check(config: Config, path: Path) -> None:
    for kind in ("nothing", "affine"):
        if sum(s.kind == kind for s in config.systems) != 1:
            raise RegistrationError(f"{path.name} must have exactly one system of kind {kind!r}: the baseline")
    for what, names in (
        ("system", [s.name for s in config.systems]),
        ("data set", [d.name for d in config.datasets]),
    ):
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise RegistrationError(f"every {what} of {path.name} must have its own name, got {twice[0]!r} twice")
    if not config.datasets:
        raise RegistrationError(f"{path.name} must have at least one [[dataset]], got none")
    if config.reference and config.reference not in [s.name for s in config.systems]:
        raise RegistrationError(f"reference must be the name of a system, got {config.reference!r}")
    unknown = sorted(set(config.measures) - set(MEASURES))
    if unknown:
        raise RegistrationError(f"measures must be some of {list(MEASURES)}, got {unknown[0]!r}")
