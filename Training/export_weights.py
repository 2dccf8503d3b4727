r"""Put a trained stem and trained cascades together into a model that `register` can load.

    python -m Training.export_weights --data DIR --stem runs/stem.pt --first runs/one.pt --dense runs/three.pt \
        --out runs/export

Writes NAME.pt (half precision) and NAME.json (the model card) into the folder. Results are added by
`Training.evaluate --write-card`. Copy both files into LDRCore/bundled only when they beat what ships.
"""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch

import LDRCore
from LDRCore import weights
from Training.data import ixi

WORKING_GRID = {
    "spacing_mm": 2.0,
    "margin_mm": 8.0,
    "stem_spacing_mm": 4.0,
    "stem_shape": [64, 64, 64],
    "stem_passes": 3,
}


def export(data: Path, stem_path: Path, first_path: Path, dense_path: Path, out: Path, name: str) -> Path:
    """Write the model's two files and return the card's path."""
    stem, first, dense = (torch.load(p, weights_only=True) for p in (stem_path, first_path, dense_path))
    cascades = 1 + max(int(k.split(".")[1]) for k in dense["model"])
    state = {f"stem.{k}": v for k, v in stem["model"].items()} | dense["model"]
    card = {
        "name": name,
        "version": LDRCore.__version__,
        "summary": "T1-weighted MRI of the adult head, whole or skull-stripped, any scanner grid",
        "made_for": "T1-weighted MRI of the head",
        "expects_nonnegative": True,
        "architecture": {
            "stem": "affine-ldr",
            "network": {"name": "ldr", "head": "half"},
            "cascades": cascades,
            "multiplier": 1.0,
        },
        "working_grid": WORKING_GRID,
        "data": {
            "name": "IXI (Hammersmith site), 129 training subjects, T1, 2 mm",
            "source": "brain-development.org",
            "labels": "DLMUSE automatic labels (NiChart), used as supervision on the training subjects",
            "split_sha256": ixi.split_hash(data),
        },
        "licence": "CC BY-SA 3.0 (as the IXI images); see THIRD-PARTY.md",
        "recipe": {
            "stem": {
                "script": "Training/train_stem.py",
                "loss": "distance of label centroids, two passes",
                "steps": stem["step"],
                "batch": 4,
                "hours": round(stem["seconds"] / 3600, 2),
            },
            "cascades": {
                "script": "Training/train_student.py",
                "loss": "local NCC + soft Dice of labels + smoothness + folding, at half resolution, every cascade",
                "teacher": None,
                "steps": f"{first['step']} with one cascade, then {dense['step']} with all, each started from that one",
                "batch": 1,
                "hours": round((first["seconds"] + dense["seconds"]) / 3600, 2),
            },
            "augmentation": "pose up to 18 degrees, 24 mm, 10 % scale after centring; shorter fields of view; "
            "skull on or off, also different in the two images; gamma, gain, bias field, noise",
            "hardware": "2 CPU cores",
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    return weights.save_model(out, card, state)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with manifest.csv (for the split's hash)")
    parser.add_argument("--stem", type=Path, required=True)
    parser.add_argument("--first", type=Path, required=True, help="checkpoint that the cascades started from")
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="brain-t1")
    a = parser.parse_args()
    print(export(a.data, a.stem, a.first, a.dense, a.out, a.name))
