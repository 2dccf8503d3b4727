"""The memory that a registration is said to need, against what a process really took."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK as sitk

from LDRCore.cpu import memory
from LDRCore.models import weights
from LDRCore.pipeline import dense

ROOT = Path(__file__).parents[2]
PEAK = """
def peak():  # not ru_maxrss, which begins with what the process had that started this one
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""
MEASURE = (
    PEAK
    + """
import sys
import SimpleITK as sitk
import LDRCore
from LDRCore.cli import demo
from LDRCore.cpu import memory

n, cascades, inverse, jacobian = map(int, sys.argv[1:])
images = []
for name in ("fixed", "moving"):
    image = sitk.ReadImage(demo.find_pair()[name])
    spacing = [s * k / n for s, k in zip(image.GetSpacing(), image.GetSize())]
    images.append(sitk.Resample(image, [n] * 3, sitk.Transform(), sitk.sitkLinear, image.GetOrigin(), spacing,
                                image.GetDirection()))
LDRCore.load_model("brain-t1")
base = peak()
result = LDRCore.register(*images, model="brain-t1", cascades=cascades, inverse=bool(inverse))
if jacobian:
    result.jacobian_determinant
said = memory.needed_bytes(LDRCore.model_info("brain-t1"), images[0].GetSize(), images[0].GetSpacing(),
                           images[1].GetSize(), cascades=cascades, inverse=bool(inverse), jacobian=bool(jacobian))
print(said - memory.BASE, peak() - base)
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
@pytest.mark.parametrize(("n", "cascades", "inverse", "jacobian"), [(160, 1, 0, 0), (160, 3, 1, 1)])
def test_what_is_said_is_about_what_is_taken(n, cascades, inverse, jacobian):
    arguments = [str(a) for a in (n, cascades, inverse, jacobian)]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        capture_output=True,
        encoding="utf-8",
        check=True,
        cwd=ROOT,
        env={**os.environ, "LDR_NUMBA": "0"},
    )
    said, taken = map(float, done.stdout.split())
    assert 0.6 < said / taken < 2.5  # beside what torch itself takes, which depends on its build


CONVERT = (
    PEAK
    + """
import sys
import SimpleITK as sitk
from LDRCore.io import transforms

source, target, name = sys.argv[1:]
base = peak()
made = transforms.read_transform(source)
grid = transforms.Context(source).fixed
transforms.write(made, target, name, fixed=grid, moving=grid)
print(peak() - base)
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux reports it")
@pytest.mark.parametrize(("name", "suffix", "copies"), [("ants", ".nii", 3), ("fsl", ".nii", 3), ("itk", ".h5", 2)])
def test_converting_a_field_takes_three_copies_of_it(tmp_path, name, suffix, copies):
    """The field in double precision, which is two, and what is written; 0.6 for packages, grids and slices at work."""
    if suffix == ".h5":
        pytest.importorskip("h5py")
    field = sitk.Image([192, 192, 128], sitk.sitkVectorFloat32, 3)
    sitk.WriteImage(field, str(tmp_path / "field.nii"))
    arguments = [str(tmp_path / "field.nii"), str(tmp_path / f"out{suffix}"), name]
    done = subprocess.run(
        [sys.executable, "-c", CONVERT, *arguments], capture_output=True, encoding="utf-8", check=True, cwd=ROOT
    )
    assert float(done.stdout) / (12 * 192 * 192 * 128) < copies + 0.6


def test_more_asked_needs_more():
    card = weights.model_info("brain-t1")

    def needed(size=(200, 200, 200), **more) -> int:
        return memory.needed_bytes(card, size, (1.0, 1.0, 1.0), size, **{"cascades": 1, **more})

    plain = needed()
    for more in (
        {"cascades": 3},
        {"refine": True},
        {"inverse": True},
        {"jacobian": True},
        {"size": (300, 200, 200)},
    ):
        assert needed(**more) > plain
    assert memory.MAX_WORKING_VOXELS == dense.MAX_VOXELS


def test_freed_blocks_are_kept_where_glibc_is():
    code = "from LDRCore.cpu import memory; print(memory.keep_freed_blocks())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True, cwd=ROOT)
    assert done.stdout.strip() == str(sys.platform == "linux" and platform.libc_ver()[0] == "glibc")
