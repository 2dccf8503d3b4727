#!/usr/bin/env bash
# SimpleITK's DisplacementFieldJacobianDeterminant is wrong on every grid whose axes are not those of the patient.
#
# One would guess: the filter gives det(I + du/dx) in physical space, whatever way the voxels lie: the field's vectors are
#                  in mm along the patient's axes, and the image says how its own axes are directed.
# What happens:    derivatives are taken along the image's axes and never turned by its direction. With direction
#                  diag(-1, -1, 1), which is what NIfTI files of RAS voxels have in ITK, a map that stretches x by 1.2 and
#                  y by .9 (determinant 1.08) gives .88: what stretches is told to shrink, and a stretch of more than twofold
#                  to fold. With an identity direction the result is right.
# Versions:        SimpleITK 2.5.5 (ITK 5.4); 2.5.7 does the same.
# Meaning:         maps of volume change, counts of folding voxels and scores of regularity that were made with this filter
#                  are wrong for most scans, without a warning, and look plausible. Ask a DisplacementFieldTransform point by
#                  point, or multiply the index-space derivatives by the inverse of the direction matrix.
# Source:          ITK issue 5358 (https://github.com/InsightSoftwareConsortium/ITK/issues/5358), mended after ITK 5.4 by
#                  pull request 5390; measured by the script below.
#
# Exit status: 0 if this is still so, 1 if it has changed, another if the test could not run.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "SimpleITK==2.5.5" "numpy==2.2.6" || exit 2

"$folder/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import SimpleITK as sitk

print(f"SimpleITK {sitk.Version_VersionString()}, ITK {sitk.Version_ITKVersionString()}, numpy {np.__version__}")
matrix = np.array([[1.2, 0.3, 0.0], [0.0, 0.9, 0.0], [0.0, 0.0, 1.0]])  # of a linear map, so that every voxel has one answer
true = np.linalg.det(matrix)
c, s = np.cos(0.5), np.sin(0.5)
directions = {
    "identity": np.eye(3),
    "RAS voxels, diag(-1, -1, 1)": np.diag([-1.0, -1.0, 1.0]),
    "turned by 29 degrees about z": np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]),
}
found = {}
for name, direction in directions.items():
    grid = sitk.Image([16, 16, 16], sitk.sitkUInt8)
    grid.SetSpacing([2.0, 2.0, 2.0])
    grid.SetDirection(direction.ravel().tolist())
    linear = sitk.AffineTransform(3)
    linear.SetMatrix(matrix.ravel().tolist())
    field = sitk.TransformToDisplacementField(
        linear, sitk.sitkVectorFloat64, grid.GetSize(), grid.GetOrigin(), grid.GetSpacing(), grid.GetDirection()
    )
    found[name] = sitk.GetArrayFromImage(sitk.DisplacementFieldJacobianDeterminant(field))[8, 8, 8]
    # the same derivatives along the image's axes, turned to the patient's
    values = sitk.GetArrayFromImage(field)
    along = np.stack([np.gradient(values, 2.0, axis=2 - axis)[8, 8, 8] for axis in range(3)], axis=1)  # d u_i / d index j
    turned = np.linalg.det(np.eye(3) + along @ direction.T)
    print(f"{name:30} true {true:.3f}, turned by hand {turned:.3f}, the filter {found[name]:.3f}")
    if abs(turned - true) > 1e-6:
        sys.exit(2)

right = {name: abs(value - true) < 1e-6 for name, value in found.items()}
still_so = list(right.values()) == [True, False, False]
print("as found" if still_so else "it has changed")
sys.exit(0 if still_so else 1)
PYTHON
