"""Mutates files at random and reads them: each is read as it was, read as another whole file, or refused in a sentence.

    python Testing/faults/fuzz.py --count 10000 --geometries 10000 --seed 1

Prints a table. "wrong": values that differ though a checksum tells; "traceback": any error but RegistrationError. Only
these two, and messages that cannot be printed, are faults. "hang": a file that takes more than `HANG_S` seconds of
work. Then warps images by random maps on random grids, see `geometries`.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

from LDRCore import geometry, sampling
from LDRCore.errors import RegistrationError
from LDRCore.geometry import Grid
from LDRCore.io import images, points, transforms
from LDRCore.models import weights
from LDRCore.transforms import resample
from LDRCore.transforms.field import DenseField, fade_out
from LDRCore.transforms.volume import Volume

VALUES = (np.arange(9 * 10 * 11).reshape(9, 10, 11) * 37 % 199).astype(np.float32)
IMAGES = ("a.nii", "a.nii.gz", "a.img", "a.mha", "c.mha", "a.nrrd", "c.nrrd", "a.vtk", "a.gipl", "a.mhd", "a.nhdr")
HANG_S = 100.0
TOLERANCE = 1.0  # of intensities up to 1000 that are sampled in single precision
PROGRAMS = (  # and one of their suffixes
    *(("spm", ".nii"), ("niftyreg", ".nii.gz"), ("fsl", ".nii"), ("fsl", ".mat"), ("dipy", ".nii.gz"), ("afni", ".1d")),
    *(("freesurfer", ".mgh"), ("freesurfer", ".lta"), ("elastix", ".txt"), ("voxelmorph", ".npy")),
)
CHECKED = ".nii.gz"  # header and values compressed: a checksum tells of every damage


def make_files(folder: Path) -> dict[Path, Callable[[Path], object]]:
    """Write one file of every kind, and say how each is read."""
    made: dict[Path, Callable[[Path], object]] = {}
    for kind in (np.float32, np.int16):
        image = sitk.GetImageFromArray(VALUES.astype(kind))
        image.SetSpacing((1.0, 1.5, 2.0))
        for name in IMAGES:
            path = folder / f"{np.dtype(kind).name}-{name}"
            sitk.WriteImage(image, str(path), name in ("a.nii.gz", "c.mha", "c.nrrd", "a.nhdr"))
            made[path] = lambda p: sitk.GetArrayFromImage(images.load(p, "image"))
    field = sitk.GetImageFromArray(np.stack([VALUES / 100] * 3, -1), isVector=True)
    for name in ("f.nii", "f.nii.gz", "f.mha", "f.nrrd"):
        sitk.WriteImage(field, str(folder / name))
        made[folder / name] = lambda p: transforms.read_transform(p).TransformPoint((3.0, 4.0, 5.0))
    double = sitk.DisplacementFieldTransform(sitk.Cast(field, sitk.sitkVectorFloat64))
    composite = sitk.CompositeTransform([sitk.Euler3DTransform((1, 2, 3), 0.1, 0.2, 0.3), double])
    for name in ("t.h5", "t.tfm", "t.mat"):
        sitk.WriteTransform(composite if name == "t.h5" else sitk.AffineTransform(3), str(folder / name))
        made[folder / name] = lambda p: transforms.read_transform(p).TransformPoint((3.0, 4.0, 5.0))
    grid = sitk.Image((6, 7, 5), sitk.sitkUInt8)
    context = transforms.Context(grid, grid)
    for kind, suffix in PROGRAMS:
        path = folder / f"{kind}{suffix}"
        moved = sitk.AffineTransform(3) if suffix in (".mat", ".lta", ".1d") else double
        transforms.write(moved, path, kind, fixed=grid, moving=grid)
        made[path] = functools.partial(read_of, kind, context)
    (folder / "p.csv").write_text("label,x,y,z\nnose,1,2,3\near,4,5,6\n")
    control = {"id": "1", "label": "nose", "position": [1, 2, 3]}
    markup = {"markups": [{"coordinateSystem": "RAS", "controlPoints": [control]}]}
    (folder / "p.mrk.json").write_text(json.dumps(markup))
    for name in ("p.csv", "p.mrk.json"):
        made[folder / name] = lambda p: points.read_points(p, "lps")
    (folder / "card.json").write_bytes((weights.BUNDLED / "brain-t1-small.json").read_bytes())
    (folder / "card.pt").write_bytes((weights.BUNDLED / "brain-t1-small.pt").read_bytes())
    made[folder / "card.json"] = lambda p: weights.model_info(p)["name"]
    return made


def read_of(kind: str, context: transforms.Context, path: Path) -> object:
    """Map a point through another program's file."""
    return transforms.read_transform(path, format_name=kind, context=context).TransformPoint((3.0, 4.0, 2.0))


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Change a file as disks, networks and people do."""
    kind, n = rng.integers(9), len(data)
    changed = bytearray(data)
    at, span = int(rng.integers(n)), int(rng.integers(1, 9))
    if kind == 0:
        return data[: int(rng.integers(n))]
    if kind == 1:
        changed[at] ^= 1 << int(rng.integers(8))
    if kind == 2:
        changed[at : at + span] = rng.bytes(span)
    if kind == 3:
        del changed[at : at + span]
    if kind == 4:
        changed[at:at] = rng.bytes(span)
    if kind == 5:  # in the header
        changed[at % min(n, 400)] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
    if kind == 6:
        changed[at : at + 512] = bytes(len(changed[at : at + 512]))
    if kind == 7:
        changed += rng.bytes(span * 20)
    if kind == 8:
        begin = at % min(n, 400)
        changed[begin : begin + 4] = rng.choice(np.array([np.nan, np.inf, -1, 1e30, 1e-30], "<f4")).tobytes()
    return bytes(changed)


def run(count: int, seed: int, show: Callable[[str], object] = print) -> dict[str, collections.Counter]:
    """Mutate and read files `count` times; return how each kind of file ended."""
    rng = np.random.default_rng(seed)
    outcomes: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = make_files(folder)
        expected = {path: np.asarray(read(path)) for path, read in made.items()}
        stored = {path: path.read_bytes() for path in folder.iterdir() if path.suffix != ".pt"}
        headers = {".hdr": ".img", ".raw": ".mhd", ".gz": ".nhdr"}  # of values in a file of their own
        readers = {path: path if path in made else find_header(path, headers[path.suffix]) for path in stored}
        for number in range(count):
            target = list(stored)[number % len(stored)]
            reader = readers[target]
            data = stored[target]
            target.write_bytes(mutate(data, rng))
            began_s = time.process_time()
            try:
                outcome = compare(np.asarray(made[reader](reader)), expected[reader], reader)
            except RegistrationError as error:
                readable = str(error).isprintable() and len(str(error)) < 900
                outcome = "refused" if readable else "unreadable message"
                if not readable:
                    show(repr(str(error)))
            except Exception:
                outcome = "traceback"
                show(f"{target.name} (seed {seed}, number {number}):\n{traceback.format_exc(limit=-4)}")
            if time.process_time() - began_s > HANG_S:
                outcome = "hang"
            if outcome in ("wrong", "unreadable message", "hang"):
                show(f"{target.name} (seed {seed}, number {number}): {outcome}")
            outcomes[target.name][outcome] += 1
            target.write_bytes(stored[target])
    return outcomes


def geometries(count: int, seed: int, show: Callable[[str], object] = print) -> collections.Counter:
    """Warp random images by random maps on random grids, and compare every voxel with SimpleITK.

    Sizes, spacings, oblique and flipped directions and origins differ; every second map deforms; numba and torch take
    turns. "edge": no more than two voxels differ, at the end of the moving image's field of view, where single and
    double precision may decide differently; "wrong": anything more.
    """
    outcomes: collections.Counter = collections.Counter()
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        fixed, moving = (_random_image(rng) for _ in range(2))
        affine = np.eye(4)
        affine[:3, :3] = _rotation(rng, 60) @ np.diag(rng.uniform(0.8, 1.2, 3))
        affine[:3, 3] = rng.uniform(-6, 6, 3)
        grid = Grid.centred(rng.uniform(-4, 4, 3).tolist(), float(rng.uniform(1.5, 4)), (8, 9, 10))
        u = torch.zeros(1, 3, *grid.shape)
        if number % 2:
            u = torch.from_numpy(rng.normal(0, 0.4, u.shape).astype(np.float32))
        field = DenseField(fade_out(u, 3), grid.padded(3), affine, 3)
        volume = Volume(torch.from_numpy(sitk.GetArrayFromImage(moving))[None, None], geometry.index_to_lps(moving))
        with sampling.forced("numba" if number % 4 < 2 else "torch"):
            warped = resample.warp(volume, fixed.GetSize()[::-1], geometry.index_to_lps(fixed), field)
        expected = sitk.Resample(moving, fixed, field.transform(), sitk.sitkLinear, volume.minimum)
        off = int((np.abs(warped - sitk.GetArrayViewFromImage(expected)) > TOLERANCE).sum())
        outcome = "clean" if off == 0 else "edge" if off <= 2 else "wrong"
        if outcome == "wrong":
            show(f"geometry (seed {seed}, number {number}): {off} voxels differ")
        outcomes[outcome] += 1
    return outcomes


def _rotation(rng: np.random.Generator, degrees: float) -> np.ndarray:
    turn = sitk.Euler3DTransform()
    turn.SetRotation(*np.deg2rad(rng.uniform(-degrees, degrees, 3)).tolist())
    return np.array(turn.GetMatrix()).reshape(3, 3)


def _random_image(rng: np.random.Generator) -> sitk.Image:
    shape = rng.integers(4, 20, 3)
    image = sitk.GetImageFromArray(rng.uniform(100, 1000, shape).astype(np.float32))
    spacing = np.exp(rng.uniform(-0.7, 1.4, 3))
    direction = _rotation(rng, 180)[:, rng.permutation(3)] * rng.choice([-1, 1], 3)
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    middle = direction @ (spacing * (shape[::-1] - 1) / 2)
    image.SetOrigin((rng.uniform(-5, 5, 3) - middle).tolist())
    return image


def find_header(path: Path, suffix: str) -> Path:
    """Return the file beside that of its values by which both are read."""
    return path.with_name(path.name.split(".")[0] + suffix)


def compare(values: np.ndarray, expected: np.ndarray, path: Path) -> str:
    """Say whether a file that could be read was read as it was, or as another."""
    if values.shape == expected.shape and np.array_equal(values, expected):
        return "clean"
    return "wrong" if path.name.endswith(CHECKED) and values.shape == expected.shape else "other values"


def main() -> int:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--geometries", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = run(options.count, options.seed)
    total: collections.Counter = sum(outcomes.values(), collections.Counter())
    kinds = sorted(total)
    print(f"{'file':<18}" + "".join(f"{kind:>20}" for kind in kinds))
    for name, counts in [*sorted(outcomes.items()), ("all", total)]:
        print(f"{name:<18}" + "".join(f"{counts[kind]:>20}" for kind in kinds))
    compared = geometries(options.geometries, options.seed)
    print(f"geometries: {dict(compared)}")
    faults = ("traceback", "wrong", "unreadable message", "hang")
    return int(compared["wrong"] > 0 or any(total[kind] for kind in faults))


if __name__ == "__main__":
    sys.exit(main())
