#!/usr/bin/env bash
# SimpleITK reads NaN and infinite voxels of a NIfTI file as 0, without a word.
#
# One would guess: sitk.ReadImage gives the stored values, or complains. It does so for NRRD and MetaImage.
# What happens:    NaN, +inf and -inf of float32 and float64 NIfTI files (.nii and .nii.gz, scaled or not, scalars and
#                  vectors, also when cast or read by region) become 0 (times the slope, plus the intercept). nibabel
#                  shows that they are in the file: the writer keeps them, only the reader does not.
#                  Second: of a scaled (scl_slope) file of 3-vectors only the first third of the values is scaled.
# Versions:        SimpleITK 2.5.5 (ITK 5.4).
# Meaning:         0 is a valid intensity, so "outside the mask" (NaN in many statistical maps) turns into data, and a
#                  check such as numpy.isfinite(image).all() passes on a broken scan or displacement field. A scaled
#                  displacement field moves points by wrong distances, silently.
# Source:          nifti_read_buffer() in nifti1_io.c overwrites what is not finite (ITK pull request 6683, which makes
#                  ITK 6 keep it: https://github.com/InsightSoftwareConsortium/ITK/pull/6683; issue 6575, B48 and B52);
#                  NiftiImageIO::Read() scales as many numbers as there are voxels.
#
# Exit status: 0 if this is still so, 1 if it has changed, another if the test could not run.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    "SimpleITK==2.5.5" "numpy==2.2.6" "nibabel==5.3.2" || exit 2

cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import nibabel
import numpy as np
import SimpleITK as sitk

print(f"SimpleITK {sitk.Version_VersionString()}, ITK {sitk.Version_ITKVersionString()}, numpy {np.__version__}, "
      f"nibabel {nibabel.__version__}")
stored = np.arange(1, 61, dtype=np.float32).reshape(3, 4, 5)  # z, y, x: no zero
stored[0, 0, :3] = np.nan, np.inf, -np.inf
still_so = True

for kind in (np.float32, np.float64):
    for suffix in (".nii", ".nii.gz", ".nrrd", ".mha"):
        name = f"scan{suffix}"
        sitk.WriteImage(sitk.GetImageFromArray(stored.astype(kind)), name)
        values = sitk.GetArrayFromImage(sitk.ReadImage(name))
        line = f"{np.dtype(kind).name} {suffix:7}: stored {stored[0, 0].tolist()}, SimpleITK reads {values[0, 0].tolist()}"
        if suffix.startswith(".nii"):
            line += f", nibabel {nibabel.load(name).get_fdata()[:, 0, 0].tolist()}"
            still_so &= values[0, 0].tolist() == [0, 0, 0, 4, 5]
            still_so &= not np.isfinite(nibabel.load(name).get_fdata()[:3, 0, 0]).any()
        else:
            still_so &= not np.isfinite(values[0, 0, :3]).any()
        print(line)

field = nibabel.Nifti1Image(np.ones((4, 4, 4, 1, 3), np.float32), np.eye(4))
field.header.set_intent("vector")
nibabel.save(field, "field.nii")
content = bytearray(open("field.nii", "rb").read())
content[112:120] = np.array([2, 0], np.float32).tobytes()  # scl_slope, scl_inter: every value is 2 x 1
open("field.nii", "wb").write(content)
values = sitk.GetArrayFromImage(sitk.ReadImage("field.nii"))
doubled = int((values == 2).sum())
print(f"field of {values.size} ones with scl_slope 2: SimpleITK reads {doubled} twos and {int((values == 1).sum())} "
      f"ones, nibabel {int((nibabel.load('field.nii').get_fdata() == 2).sum())} twos")
still_so &= doubled == values.size // 3

print("as described" if still_so else "CHANGED: no longer as described")
sys.exit(0 if still_so else 1)
PYTHON
