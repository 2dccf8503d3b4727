#!/usr/bin/env bash
# SimpleITK says nothing when the disk is full while it writes a NIfTI file, and nothing when it reads the rest of it.
#
# One would guess: sitk.WriteImage raises when not all voxels could be written; it does so for NRRD and MetaImage.
#                  sitk.ReadImage raises when a file ends too early; it does so for NRRD.
# What happens:    for .nii, .nii.gz and .hdr/.img WriteImage returns normally and leaves a file that is cut off. ReadImage
#                  returns normally too: the missing voxels are 0. Only a line on the error stream tells of either.
# Versions:        SimpleITK 2.5.5 (ITK 5.4).
# Meaning:         a registration that fills the disk (or a quota) ends with success, and the warped image, the
#                  displacement field or the label map is empty from some slice on. A field that is 0 there moves nothing,
#                  which looks like a good result. Check a written file's size, or read it back, before it is used.
# Source:          measured by the script below. ITK issue 1958 (https://github.com/InsightSoftwareConsortium/ITK/issues/1958)
#                  is about files that cannot be opened, which raise by now; a write that ends early still does not.
#
# How: a limit on the size of files stands for a full disk; writing beyond it fails in the same way, with an error of the
# system that the program can see.
#
# Exit status: 0 if this is still so, 1 if it has changed, another if the test could not run.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "SimpleITK==2.5.5" "numpy==2.2.6" || exit 2

cd "$folder"
"$folder/venv/bin/python" - 2>/dev/null <<'PYTHON'
import os
import resource
import sys

import numpy as np
import SimpleITK as sitk

print(f"SimpleITK {sitk.Version_VersionString()}, ITK {sitk.Version_ITKVersionString()}, numpy {np.__version__}")
values = np.random.default_rng(0).normal(0, 1, (64, 64, 64)).astype(np.float32)  # a megabyte that hardly compresses
image = sitk.GetImageFromArray(values)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # Python ignores the signal, so that writing fails


def attempt(action):
    """What came back, or None where an exception was raised."""
    try:
        return action() or "returned"
    except RuntimeError:
        return None


still_so = True
for name, silent in (("a.nii", True), ("a.nii.gz", True), ("a.hdr", True), ("a.nrrd", False), ("a.mha", False)):
    written = attempt(lambda: sitk.WriteImage(image, name)) is not None
    read = attempt(lambda: sitk.ReadImage(name))
    kept = float((sitk.GetArrayViewFromImage(read) == values).mean()) if read is not None else None
    size = sum(os.path.getsize(file) for file in os.listdir(".") if file.startswith(name.split(".")[0] + "."))
    print(
        f"{name:9} writing {'returns normally' if written else 'raises'}, reading "
        + (f"returns normally with {100 * kept:.0f} % of the voxels" if read is not None else "raises")
    )
    still_so &= written == silent and (read is not None) == silent and (kept is None or kept < 0.5)
    for file in os.listdir("."):
        if file.startswith("a."):
            os.remove(file)
sys.exit(0 if still_so else 1)
PYTHON
