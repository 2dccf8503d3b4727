"""What a cohort's run does with every pair, checked before the first one, and what tells one run from another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from LDRCore import __version__
from LDRCore.cohort.pairs import CohortPair
from LDRCore.errors import RegistrationError

FILES = {  # outputs by name
    "warped": "warped.nii.gz",
    "transform": "transform.h5",
    "inverse": "inverse_transform.h5",
    "jacobian": "jacobian_determinant.nii.gz",
    "displacement": "displacement_field.nii.gz",
    "labels": "warped_labels.nii.gz",
    "picture": "overview.png",
}
DEFAULT_OUTPUTS = ("warped", "transform")
REPORT, THUMBNAIL, CHECKSUMS = "report.json", "thumbnail.jpg", "checksums.json"  # of every pair


@dataclasses.dataclass(frozen=True)
class CohortSettings:
    """What is done with every pair.

    Attributes:
        options: keywords of `register`, of values that JSON knows.
        outputs: names in `FILES`.
        frame: of landmark files, see `evaluation.scoring.landmarks_lps`.
        weights: sha256 of the model's weights, "" without a network.
        version: of this package.
    """

    options: dict[str, Any]
    outputs: tuple[str, ...] = DEFAULT_OUTPUTS
    frame: str = "lps"
    weights: str = ""
    version: str = __version__

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return dataclasses.asdict(self) | {"outputs": list(self.outputs)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CohortSettings:
        """Make it of what `as_dict` returned."""
        return cls(**(values | {"outputs": tuple(values["outputs"])}))


def check_settings(options: dict[str, Any], outputs: Sequence[str], frame: str) -> CohortSettings:
    """Check the options of a cohort without reading an image.

    Raises:
        RegistrationError: an option that `register` refuses, an output that is none, an option that belongs to a pair.
    """
    from LDRCore.evaluation.scoring import FRAMES, check_choice
    from LDRCore.models.weights import DEFAULT, model_info
    from LDRCore.pipeline.options import Options, every_cascade

    for name in outputs:
        check_choice("an output", name, list(FILES))
    check_choice("the frame of landmarks", frame, FRAMES)
    chosen: dict[str, Any] = {
        "model": DEFAULT,
        "kind": "deformable",
        "affine": True,
        "initial": "center",
        "device": "auto",
    } | options
    if chosen.get("cascades") is None:
        chosen["cascades"] = every_cascade(chosen["model"], chosen["kind"])
    chosen["model"] = str(chosen["model"])
    chosen["inverse"] = "inverse" in outputs
    if chosen["initial"] not in ("center", "none"):
        raise RegistrationError(
            f'initial must be "center" or "none" for a cohort (transforms go into the column initial), '
            f"got {chosen['initial']!r}"
        )
    try:
        Options(**chosen)
    except TypeError as error:
        raise RegistrationError(f"the options of a cohort must be those of register, got {error}") from None
    weights = str(model_info(chosen["model"]).get("sha256", ""))
    return CohortSettings(chosen, tuple(name for name in FILES if name in outputs), frame, weights)


def key_of(pair: CohortPair, settings: CohortSettings) -> str:
    """Return what tells whether a stored result is of this pair under these settings."""
    text = json.dumps([settings.as_dict(), dataclasses.asdict(pair)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
