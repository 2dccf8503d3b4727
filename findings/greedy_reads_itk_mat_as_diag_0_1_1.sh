#!/usr/bin/env bash
# greedy reads ITK's binary affine files (.mat, .h5) as the matrix diag(0, 1, 1), without an error.
#
# One would guess: greedy, which is built on ITK and reads ITK's .tfm, applies ANTs' 0GenericAffine.mat as well, or says
#                  that it cannot.
# What happens:    `greedy -r t.mat` and `-r t.h5` return normally and write an image that is sampled at x = 0 throughout, y
#                  and z as they are: the shift in the file is lost too. The same transform as .tfm, or as greedy's own
#                  text, is applied rightly.
# Versions:        picsl_greedy 1.4.0.3, SimpleITK 2.5.5 (ITK 5.4).
# Meaning:         whoever hands an ANTs or SimpleITK affine to greedy gets a warped image or label map with one column of
#                  voxels smeared over the whole width, and labels, volumes or a further registration come of it. Write
#                  linear transforms for greedy as .tfm or as four lines of text in RAS mm.
# Source:          measured by the script below, which makes its own image and transform.
#
# Exit status: 0 if this is still so, 1 if it has changed, another if the test could not run.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    "picsl_greedy==1.4.0.3" "SimpleITK==2.5.5" "numpy==2.2.6" || exit 2

cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

import numpy as np
import SimpleITK as sitk
from picsl_greedy import Greedy3D

print(f"picsl_greedy {version('picsl_greedy')}, SimpleITK {sitk.Version_VersionString()}, "
      f"ITK {sitk.Version_ITKVersionString()}, numpy {np.__version__}")
k, j, i = np.meshgrid(*[np.arange(20.0)] * 3, indexing="ij")
image = sitk.GetImageFromArray((i + 40 * j).astype(np.float32))  # the value tells the voxel
sitk.WriteImage(image, "image.nii.gz")
transform = sitk.AffineTransform(3)
transform.SetTranslation((2.0, 1.0, 0.0))
right = sitk.GetArrayFromImage(sitk.Resample(image, image, transform))[5:15, 5:15, 5:15]
still_so = True
for name, wrong in (("t.mat", True), ("t.h5", True), ("t.tfm", False)):
    sitk.WriteTransform(transform, name)
    try:
        Greedy3D().execute(f"-d 3 -threads 1 -rf image.nii.gz -rm image.nii.gz warped.nii.gz -r {name}")
    except Exception as error:
        print(f"{name:6} raises {str(error)[:80]}")
        still_so &= False
        continue
    warped = sitk.GetArrayFromImage(sitk.ReadImage("warped.nii.gz"))[5:15, 5:15, 5:15]
    at_zero = bool((warped == 40 * j[5:15, 5:15, 5:15]).all())  # x = 0, y and z as they are
    print(f"{name:6} along x: {warped[0, 0, :4].tolist()}, right is {right[0, 0, :4].tolist()}")
    still_so &= at_zero if wrong else bool(np.abs(warped - right).max() < 1e-3)
print("as described" if still_so else "CHANGED: no longer as described")
sys.exit(0 if still_so else 1)
PYTHON
