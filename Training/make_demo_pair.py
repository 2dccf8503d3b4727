"""Make the demo pair that ships: two skull-stripped test subjects put on oblique, anisotropic grids, with labels.

    python -m Training.make_demo_pair --data DIR --fixed SUBJECT --moving SUBJECT --out LDRCore/bundled/demo

The skull is removed with the labels (label > 0), so no face ships. Each image is sampled once from the 2 mm original
onto a grid that is turned against the scanner axes, has unequal spacing and, for the moving one, a flipped axis. The
patient is moved as well (a rigid motion written into the header), as between two scanners.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from Training.data.subject_views import rotation

GRIDS = {
    "fixed": {"angles_deg": (9, -6, 12), "spacing_mm": (2.0, 2.0, 2.4), "flip": (1, 1, 1), "shift_mm": (0, 0, 0)},
    "moving": {"angles_deg": (-7, 11, -5), "spacing_mm": (2.2, 2.0, 2.0), "flip": (1, -1, 1), "shift_mm": (18, -9, 14)},
}


def make(image: sitk.Image, labels: sitk.Image, settings: dict) -> tuple[sitk.Image, sitk.Image]:
    """(image, labels) of one subject on its new grid."""
    brain = labels > 0
    stripped = sitk.Mask(sitk.Cast(image, sitk.sitkFloat32), brain)
    top = float(np.percentile(sitk.GetArrayViewFromImage(stripped)[sitk.GetArrayViewFromImage(brain) > 0], 99.9))
    direction = rotation(np.array(settings["angles_deg"], dtype=float)) @ np.diag(settings["flip"])
    spacing = np.array(settings["spacing_mm"])
    index = np.argwhere(sitk.GetArrayViewFromImage(brain) > 0)[:, ::-1]
    points = np.array([image.TransformIndexToPhysicalPoint(p.tolist()) for p in index[:: max(1, len(index) // 5000)]])
    local = points @ direction  # coordinates along the new axes
    low, high = local.min(0) - 4, local.max(0) + 4
    reference = sitk.Image([int(n) for n in np.ceil((high - low) / spacing)], sitk.sitkUInt8)
    reference.SetSpacing(spacing.tolist())
    reference.SetDirection(direction.ravel().tolist())
    reference.SetOrigin((direction @ low).tolist())
    new = sitk.Resample(stripped, reference, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32)
    new = sitk.Cast(sitk.Clamp(sitk.Round(new * (1000 / top)), lowerBound=0, upperBound=1200), sitk.sitkInt16)
    new_labels = sitk.Resample(labels, reference, sitk.Transform(), sitk.sitkNearestNeighbor, 0, sitk.sitkUInt8)
    for item in (new, new_labels):
        item.SetOrigin((np.array(item.GetOrigin()) + settings["shift_mm"]).tolist())
    return new, new_labels


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.csv")
    parser.add_argument("--fixed", required=True, help="subject of the test split")
    parser.add_argument("--moving", required=True, help="another subject of the test split")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    rows = {r["subject"]: r for r in csv.DictReader((a.data / "manifest.csv").open())}
    a.out.mkdir(parents=True, exist_ok=True)
    for role, subject in (("fixed", a.fixed), ("moving", a.moving)):
        if rows[subject]["split"] != "test":
            raise SystemExit(f"a demo subject must be of the test split, got {subject} of {rows[subject]['split']}")
        pair = (sitk.ReadImage(str(a.data / rows[subject][key])) for key in ("image", "labels"))
        for suffix, item in zip(("", "_labels"), make(*pair, GRIDS[role]), strict=True):
            sitk.WriteImage(item, str(a.out / f"{role}{suffix}.nii.gz"), useCompression=True)
