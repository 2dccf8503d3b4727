"""Every format of transforms by hand: files made byte by byte, points and stored values worked out on paper.

Fixed voxel (i, j, k) lies at LPS (10 - 2 i, 20 + 3 j, 30 + 4 k); voxels of the moving image are its LPS mm. The dense
map takes that voxel to (11 - 1.9 i, 22 + 2.8 j, 33 + 4.3 k).
"""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore import RegistrationError
from LDRCore.io import transforms

SIZE = (6, 5, 4)
II, JJ, KK = np.meshgrid(*[np.arange(n) for n in SIZE], indexing="ij")
MAPPED = np.stack([11 - 1.9 * II, 22 + 2.8 * JJ, 33 + 4.3 * KK], -1)
MOVED = np.stack([1 + 0.1 * II, 2 - 0.2 * JJ, 3 + 0.3 * KK], -1)
RAS_ROWS = np.array([[2, 0, 0, -10], [0, -3, 0, -20], [0, 0, 4, 30]], float)
FLIP = np.array([-1, -1, 1])
FSL = np.stack([7 - MAPPED[..., 0], MAPPED[..., 1], MAPPED[..., 2]], -1)  # of the moving image, x from the other end
IN_VOXELS = MAPPED - np.stack([II, JJ, KK], -1)


def fixed() -> sitk.Image:
    image = sitk.Image(SIZE, sitk.sitkUInt8)
    image.SetOrigin((10, 20, 30))
    image.SetSpacing((2, 3, 4))
    image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
    return image


CONTEXT = transforms.Context(fixed(), sitk.Image((8, 8, 8), sitk.sitkUInt8))


def nifti(
    path: Path,
    values: np.ndarray,
    *,
    intent: int = 0,
    name: bytes = b"",
    parameters: tuple[float, ...] = (0, 0, 0),
    rows: np.ndarray = RAS_ROWS,
    spacing: tuple[float, ...] = (2, 3, 4),
    extension: bytes = b"",
) -> Path:
    """A NIfTI-1 file as the standard says, from an array indexed x, y, z ..."""
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, values.ndim, *values.shape, *[1] * (7 - values.ndim))
    struct.pack_into("<3f", header, 56, *parameters)
    struct.pack_into("<3h", header, 68, intent, 16, 32)
    struct.pack_into("<8f", header, 76, 1, *spacing, 1, 1, 1, 1)
    struct.pack_into("<3f", header, 108, 352 + len(extension), 1, 0)
    struct.pack_into("<2h", header, 252, 0, 1)
    struct.pack_into("<12f", header, 280, *rows.ravel())
    header[328 : 328 + len(name)] = name
    header[344:348] = b"n+1\0"
    header[348] = bool(extension)
    content = bytes(header) + extension + values.astype("<f4").tobytes(order="F")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def stored(path: Path) -> tuple[np.ndarray, dict]:
    """The array of a NIfTI-1 file, indexed x, y, z ..., and what its header says."""
    content = path.read_bytes()
    content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    count, *sizes = struct.unpack_from("<8h", content, 40)
    facts = {
        "intent": struct.unpack_from("<h", content, 68)[0],
        "name": content[328:344].rstrip(b"\0"),
        "rows": np.array(struct.unpack_from("<12f", content, 280)).reshape(3, 4),
        "parameters": struct.unpack_from("<3f", content, 56),
    }
    return np.frombuffer(content, "<f4", offset=352).reshape(sizes[:count], order="F"), facts


def vectors(values: np.ndarray) -> np.ndarray:
    """(x, y, z, 3) as (x, y, z, 1, 3)."""
    return values[:, :, :, None]


DENSE = {  # format: (suffix, stored array, keywords of `nifti`, whether the content tells)
    "itk": (".nii.gz", vectors(MOVED), {"intent": 1007}, True),
    "ants": (".nii.gz", vectors(MOVED), {"intent": 1007}, True),
    "greedy": (".nii.gz", vectors(MOVED), {"intent": 1007}, True),
    "slicer": (".nii.gz", vectors(MOVED * FLIP), {"intent": 1006}, True),
    "afni": (".nii.gz", vectors(MOVED), {"intent": 1007}, True),
    "spm": (".nii", vectors(MAPPED * FLIP), {"intent": 1007, "name": b"Mapping"}, True),
    "niftyreg": (".nii.gz", vectors(MAPPED * FLIP), {"intent": 1007, "name": b"NREG_TRANS"}, True),
    "fsl": (".nii.gz", FSL - np.stack([2 * II, 3 * JJ, 4 * KK], -1), {"intent": 2006}, True),
    "convexadam": (".nii.gz", IN_VOXELS * (2 / 3, 1 / 2, 1 / 2), {}, False),
    "voxelmorph": (".nii.gz", IN_VOXELS, {}, False),
}


def assert_maps_densely(transform: sitk.Transform) -> None:
    for i, j, k in ((1, 1, 1), (4, 3, 2), (2, 1, 2), (5, 4, 3), (0, 0, 0)):
        mapped = transform.TransformPoint((10 - 2 * i, 20 + 3 * j, 30 + 4 * k))
        assert mapped == pytest.approx((11 - 1.9 * i, 22 + 2.8 * j, 33 + 4.3 * k), abs=1e-4)


def dense() -> sitk.Transform:
    field = sitk.GetImageFromArray(np.ascontiguousarray(MOVED.transpose(2, 1, 0, 3)), isVector=True)
    field.CopyInformation(fixed())
    return sitk.DisplacementFieldTransform(field)


@pytest.mark.parametrize("name", DENSE)
def test_dense_fields(tmp_path, name):
    suffix, values, keywords, told = DENSE[name]
    path = nifti(tmp_path / f"field{suffix}", values, **keywords)
    assert_maps_densely(transforms.read_transform(path, format_name=name, context=CONTEXT))
    if told:
        assert_maps_densely(transforms.read_transform(path, context=CONTEXT))
    else:
        with pytest.raises(RegistrationError, match=r"must say its format .* name one of .*convexadam, voxelmorph"):
            transforms.read_transform(path, context=CONTEXT)
    transforms.write(dense(), tmp_path / f"ours{suffix}", name, fixed=fixed(), moving=CONTEXT.moving)
    array, facts = stored(tmp_path / f"ours{suffix}")
    assert array.shape == values.shape
    assert np.abs(array - values).max() < 1e-5
    assert facts["intent"] == keywords.get("intent", 0)
    assert facts["name"] == keywords.get("name", b"")
    assert np.abs(facts["rows"] - RAS_ROWS).max() < 1e-6


@pytest.mark.parametrize(
    ("values", "keywords"),
    [
        (vectors(MOVED * FLIP), {"intent": 1007, "name": b"NREG_TRANS", "parameters": (1, 0, 0)}),
        (FSL, {"intent": 2006}),
        (vectors(MOVED), {"extension": struct.pack("<2i", 32, 4) + b"<AFNI_attributes />".ljust(24)}),
        (np.stack([0 * MOVED, MOVED * FLIP], -1), {"rows": np.linalg.inv([*RAS_ROWS, [0, 0, 0, 1]])[:3]}),
    ],
    ids=["NiftyReg's displacements", "FSL's coordinates", "AFNI's extension", "DIPY"],
)
def test_dense_fields_that_are_only_read(tmp_path, values, keywords):
    path = nifti(tmp_path / "field.nii", values, **keywords)
    assert_maps_densely(transforms.read_transform(path, context=CONTEXT))


@pytest.mark.parametrize("name", ["itk", "slicer", "spm", "niftyreg", "fsl"])
def test_the_content_of_a_field_counts_and_not_its_name(tmp_path, name):
    _, values, keywords, _ = DENSE[name]
    path = nifti(tmp_path / "field.nrrd", values, **keywords)
    assert_maps_densely(transforms.read_transform(path, context=CONTEXT))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RegistrationError, match=r"got \S*field\.nrrd \(cut off or damaged\)"):
        transforms.read_transform(path, context=CONTEXT)


@pytest.mark.filterwarnings("error")
def test_a_field_of_convexadam_with_a_value_that_is_no_number_is_one_sentence(tmp_path):
    values = IN_VOXELS.astype("<f4")
    path = nifti(tmp_path / "field.nii", values)
    content = bytearray(path.read_bytes())
    content[352:356] = struct.pack("<I", 0x7F800001)  # signals when it is computed with
    path.write_bytes(content)
    with pytest.raises(RegistrationError, match="must hold only finite values"):
        transforms.read_transform(path, format_name="convexadam", context=CONTEXT)


def test_a_mapping_of_dipy(tmp_path):
    """Its affine is the inverse of the static image's; [..., 1] pulls, and [..., 0] takes mapped points back."""
    transforms.write(dense(), tmp_path / "m.nii.gz", "dipy", fixed=fixed())
    array, facts = stored(tmp_path / "m.nii.gz")
    assert np.abs(array[..., 1] - MOVED * FLIP).max() < 1e-5
    assert np.abs(facts["rows"] - np.linalg.inv([*RAS_ROWS, [0, 0, 0, 1]])[:3]).max() < 1e-6
    back = sitk.GetImageFromArray(np.ascontiguousarray(array[..., 0].transpose(2, 1, 0, 3)).astype(float) * FLIP, True)
    back.CopyInformation(fixed())
    point = sitk.DisplacementFieldTransform(back).TransformPoint(dense().TransformPoint((6, 26, 34)))
    assert point == pytest.approx((6, 26, 34), abs=0.01)


def test_arrays_of_voxelmorph_have_their_vectors_first(tmp_path):
    np.save(tmp_path / "field.npy", np.moveaxis(IN_VOXELS, -1, 0)[None])
    assert_maps_densely(transforms.read_transform(tmp_path / "field.npy", format_name="voxelmorph", context=CONTEXT))
    transforms.write(dense(), tmp_path / "ours.npy", "voxelmorph", fixed=fixed(), moving=CONTEXT.moving)
    assert np.abs(np.load(tmp_path / "ours.npy") - np.moveaxis(IN_VOXELS, -1, 0)).max() < 1e-5


RAS_TEXT = "2 0.5 0 4\n0 1 0 5\n0 0 1 6\n0 0 0 1\n"  # LPS (1, 1, 1) is RAS (-1, -1, 1), goes to (1.5, 4, 7)


@pytest.mark.parametrize(
    ("name", "file", "text", "point", "mapped"),
    [
        ("greedy", "a.mat", RAS_TEXT, (1, 1, 1), (-1.5, -4, 7)),
        ("niftyreg", "a.txt", RAS_TEXT, (1, 1, 1), (-1.5, -4, 7)),
        ("afni", "a.aff12.1D", "# 3dvolreg matrices\n2 .5 0 4 0 1 0 5 0 0 1 6\n", (1, 1, 1), (6.5, 6, 7)),
        # voxel (1, 1, 1): FSL's (2, 3, 4); moved by (1, 2, 3) it is LPS (9, 25, 37), the moving image's (7 - 9, 25, 37)
        ("fsl", "a.mat", "1 0 0 4\n0 1 0 -22\n0 0 1 -33\n0 0 0 1\n", (8, 23, 34), (9, 25, 37)),
    ],
)
def test_matrices(tmp_path, name, file, text, point, mapped):
    (tmp_path / file).write_text(text)
    made = transforms.read_transform(tmp_path / file, format_name=name, context=CONTEXT)
    assert made.TransformPoint(point) == pytest.approx(mapped, abs=1e-9)
    transforms.write(made, tmp_path / f"ours-{file}".lower(), name, fixed=fixed(), moving=CONTEXT.moving)
    lines = [line for line in (tmp_path / f"ours-{file}".lower()).read_text().splitlines() if line[0] != "#"]
    numbers = [float(word) for line in text.splitlines() if line[0] != "#" for word in line.split()]
    assert [float(word) for line in lines for word in line.split()] == pytest.approx(numbers, abs=1e-9)
    if name != "afni":
        with pytest.raises(RegistrationError, match=r"a 4x4 matrix in .*: name one of greedy, niftyreg, fsl"):
            transforms.read_transform(tmp_path / file, context=CONTEXT)


VOLUMES = """src volume info
valid = 1  # volume info valid
filename = none
volume = 8 8 8
voxelsize = 1 1 1
xras   = -1 0 0
yras   = 0 -1 0
zras   = 0 0 1
cras   = -4 -4 4
dst volume info
valid = 1
filename = none
volume = 6 5 4
voxelsize = 2 3 4
xras   = 1 0 0
yras   = 0 -1 0
zras   = 0 0 1
cras   = -4 -27.5 38
"""
LTA = "type      = {}\nnxforms   = 1\nmean      = 0 0 0\nsigma     = 1\n1 4 4\n{}\n" + VOLUMES


@pytest.mark.parametrize(
    ("kind", "matrix"),
    [
        (1, "1 0 0 1\n0 1 0 2\n0 0 1 -3\n0 0 0 1"),
        # moving voxel (X, Y, Z) to fixed voxel ((11 - X) / 2, (Y - 22) / 3, (Z - 33) / 4)
        (0, "-.5 0 0 5.5\n0 0.33333333333333 0 -7.3333333333333\n0 0 .25 -8.25\n0 0 0 1"),
    ],
)
def test_matrices_of_freesurfer_go_from_moving_to_fixed(tmp_path, kind, matrix):
    (tmp_path / "a.lta").write_text("# transform file\n" + LTA.format(kind, matrix))
    made = transforms.read_transform(tmp_path / "a.lta")
    assert made.TransformPoint((4, 26, 34)) == pytest.approx((5, 28, 37), abs=1e-9)
    transforms.write(made, tmp_path / "b.lta", fixed=fixed(), moving=CONTEXT.moving)
    written = (tmp_path / "b.lta").read_text()
    assert np.array([row.split() for row in written.splitlines()[5:9]], float)[:3, 3].tolist() == pytest.approx(
        [1, 2, -3]
    )
    centres = [line.split()[2:] for line in written.splitlines() if line.startswith("cras")]
    assert np.array(centres, float).tolist() == [[-4, -4, 4], [-4, -27.5, 38]]


TAG = struct.pack(">IQ7s", 41, 7, b"UNKNOWN")  # to pass over


@pytest.mark.parametrize(
    ("kind", "values"),
    [(0, MAPPED), (1, IN_VOXELS), (2, MAPPED * FLIP), (3, MOVED * FLIP)],
    ids=["voxels", "shifts in voxels", "RAS", "shifts in RAS"],
)
def test_warps_of_freesurfer(tmp_path, kind, values):
    place = struct.pack(">15f", 2, 3, 4, 1, 0, 0, 0, -1, 0, 0, 0, 1, -4, -27.5, 38)
    moving = struct.pack(">15f", 1, 1, 1, -1, 0, 0, 0, -1, 0, 0, 0, 1, -4, -4, 4)
    content = struct.pack(">7I", 3 << 8 | 1, 6, 5, 4, 3, 3, 1) + (b"\0\1" + place).ljust(256, b"\0")
    content += values.astype(">f4").tobytes(order="F") + bytes(20)
    content += TAG
    content += struct.pack(">I", 10)
    content += (
        struct.pack(">I3i", 1, 8, 8, 8) + moving + bytes(512) + struct.pack(">I3i", 1, 6, 5, 4) + place + bytes(512)
    )
    content += struct.pack(">IQ2if", 13, 12, kind, 1, 0)
    (tmp_path / "warp.mgz").write_bytes(gzip.compress(content))
    assert_maps_densely(transforms.read_transform(tmp_path / "warp.mgz"))
    if kind == 3:
        transforms.write(dense(), tmp_path / "ours.mgz", fixed=fixed(), moving=CONTEXT.moving)
        ours = gzip.decompress((tmp_path / "ours.mgz").read_bytes())
        assert ours[:284] == content[:284]
        array = np.frombuffer(ours[284 : 284 + 4 * values.size], ">f4").reshape(values.shape, order="F")
        assert np.abs(array - values).max() < 1e-5
        assert ours[284 + 4 * values.size :] == content[284 + 4 * values.size :].replace(TAG, b"")
    (tmp_path / "cut.mgz").write_bytes(content[:900])
    with pytest.raises(RegistrationError, match=r"must be a whole file, got .*cut.mgz"):
        transforms.read_transform(tmp_path / "cut.mgz")


X5 = {"linear": ("affine", "matrix"), "nonlinear": ("densefield", "displacements")}


def x5(path: Path, *nodes: dict) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        file.attrs["Format"] = "X5"
        for number, node in enumerate(nodes):
            group = file.create_group(f"TransformGroup/{number}")
            for key, value in node.items():
                if key in ("Transform", "Domain/Mapping"):
                    group.create_dataset(key, data=value)
                else:
                    group.attrs[key] = value
    return path


def linear_node(matrix: np.ndarray) -> dict:
    return {"Type": "linear", "SubType": "affine", "Representation": "matrix", "Transform": matrix}


def dense_node(values: np.ndarray, representation: str) -> dict:
    mapping = np.array([*RAS_ROWS, [0, 0, 0, 1]])
    kinds = {"Type": "nonlinear", "SubType": "densefield", "Representation": representation}
    return {**kinds, "Transform": values, "Domain/Mapping": mapping}


def test_x5(tmp_path):
    for values, representation in ((MOVED * FLIP, "displacements"), (MAPPED * FLIP, "deformations")):
        path = x5(tmp_path / "t.x5", dense_node(values, representation))
        assert_maps_densely(transforms.read_transform(path))
    shift = np.eye(4)
    shift[:3, 3] = (-100, -200, 300)
    chain = transforms.read_transform(
        x5(tmp_path / "c.x5", dense_node(MOVED * FLIP, "displacements"), linear_node(shift))
    )
    assert chain.TransformPoint((8, 23, 34)) == pytest.approx((9.1 + 100, 24.8 + 200, 37.3 + 300), abs=1e-4)
    transforms.write(dense(), tmp_path / "ours.x5", fixed=fixed())
    assert_maps_densely(transforms.read_transform(tmp_path / "ours.x5"))
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "ours.x5") as file:
        node = file["TransformGroup/0"]
        assert np.abs(np.asarray(node["Transform"]) - MOVED * FLIP).max() < 1e-5
        assert np.asarray(node["Domain/Mapping"])[:3].tolist() == RAS_ROWS.tolist()


HEADER = '(FixedImageDimension 3)\n(MovingImageDimension 3)\n(HowToCombineTransforms "Compose")\n'
AFFINE = HEADER + (
    '(Transform "AffineTransform")\n(CenterOfRotationPoint 10 0 0)\n'
    '(TransformParameters 2 0 0 0 3 0 0 0 1 5 6 7)\n(InitialTransformParametersFileName "{}")\n'
)


def test_chains_of_elastix(tmp_path):
    """The initial transform applies first, and is looked for beside the file that names it."""
    turn = HEADER + '(Transform "EulerTransform")\n(CenterOfRotationPoint 0 0 0)\n(ComputeZYX "false")\n'
    (tmp_path / "zero.txt").write_text(
        turn
        + f'(TransformParameters 0 0 {np.pi / 2} 1 2 3)\n(InitialTransformParameterFileName "NoInitialTransform")\n'
    )
    (tmp_path / "one.txt").write_text(AFFINE.format("/elsewhere/zero.txt"))
    made = transforms.read_transform(tmp_path / "one.txt")  # (1, 0, 0) -> (1, 3, 3) -> 10 + 2 (1 - 10) + 5, 9 + 6, 10
    assert made.TransformPoint((1, 0, 0)) == pytest.approx((-3, 15, 10))
    (tmp_path / "alike.txt").write_text(
        HEADER + '(Transform "SimilarityTransform")\n(CenterOfRotationPoint 0 0 0)\n'
        f"(TransformParameters 0 0 {np.sqrt(0.5)} 1 2 3 2)\n"
    )
    assert transforms.read_transform(tmp_path / "alike.txt").TransformPoint((1, 0, 0)) == pytest.approx((1, 4, 3))


SPLINE = HEADER + (
    '(Transform "BSplineTransform")\n(GridSize 6 6 6)\n(GridIndex 0 0 0)\n(GridSpacing 2 3 4)\n(GridOrigin 1 2 3)\n'
    '(GridDirection 0 1 0 -1 0 0 0 0 1)\n(BSplineTransformSplineOrder 3)\n(UseCyclicTransform "false")\n'
    "(TransformParameters {})\n"
)


def test_a_spline_of_elastix(tmp_path):
    """One coefficient of 27 mm moves its own place by 27 (4/6)^3 = 8; directions are stored by columns."""
    coefficients = np.zeros((3, 6, 6, 6))
    coefficients[1, 2, 3, 2] = 27
    (tmp_path / "t.txt").write_text(SPLINE.format(" ".join(f"{v:g}" for v in coefficients.ravel())))
    made = transforms.read_transform(tmp_path / "t.txt")
    x, y, z = 1 - 3 * 3, 2 + 2 * 2, 3 + 2 * 4  # the grid's first axis along y, its second against x
    assert made.TransformPoint((x, y, z)) == pytest.approx((x, y + 8, z))
    transforms.write(dense(), tmp_path / "ours.txt", "elastix", fixed=fixed())
    assert_maps_densely(transforms.read_transform(tmp_path / "ours.txt"))


def test_coefficients_of_fnirt(tmp_path):
    """Knot 3, 2, 2 is voxel 2, 1, 1, FSL's (4, 3, 4); 8 mm there; the matrix, moving -> fixed, halves before."""
    knots = np.zeros((*SIZE, 3))
    knots[3, 2, 2, 0] = 27
    rows = np.array([[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]], float)
    path = nifti(tmp_path / "c.nii.gz", knots, intent=2007, parameters=(2, 3, 4), rows=rows, spacing=(1, 1, 1))
    made = transforms.read_transform(path, context=CONTEXT)
    assert made.TransformPoint((6, 23, 34)) == pytest.approx((7 - (4 / 2 + 8), 3, 4), abs=1e-5)


def test_a_spline_of_niftyreg(tmp_path):
    """Control points hold coordinates in RAS; one moved by 27 mm moves its own place by 8."""
    own = np.stack([-10.0 + 2 * II, -20.0 - 3 * JJ, 30.0 + 4 * KK], -1)
    own[3, 2, 1, 0] += 27
    keywords = {"intent": 1007, "name": b"NREG_TRANS", "parameters": (2, 0, 0)}
    made = transforms.read_transform(nifti(tmp_path / "cpp.nii", vectors(own), **keywords))
    assert made.TransformPoint((4, 26, 34)) == pytest.approx((4 - 8, 26, 34), abs=1e-4)


def test_fields_of_slicer_that_go_from_moving_to_fixed(tmp_path):
    field = sitk.DisplacementFieldTransform(dense()).GetDisplacementField()
    field.SetMetaData("displacement field type", "modeling")
    sitk.WriteImage(field, str(tmp_path / "t.nrrd"))
    assert transforms.holds_modeling_field(tmp_path / "t.nrrd")
    with pytest.raises(RegistrationError, match=r"got a modeling transform, its inverse, in .*t.nrrd: add ,inverse"):
        transforms.read_transform(tmp_path / "t.nrrd")
    made = transforms.read_transform(tmp_path / "t.nrrd", context=transforms.Context(modeling=True))
    assert_maps_densely(made)


BAD = {
    "no fixed image": (lambda f: nifti(f / "w.nii", FSL, intent=2006), transforms.Context(), "grid of the fixed image"),
    "no moving image": (
        lambda f: nifti(f / "w.nii", FSL, intent=2006),
        transforms.Context(fixed()),
        "must come with the grid of the moving image, got none",
    ),
    "another grid": (
        lambda f: nifti(f / "w.nii", FSL[:5], intent=2006),
        CONTEXT,
        r"must have the size of the fixed image, \(6, 5, 4\), got \(5, 5, 4\)",
    ),
    "DCT coefficients": (
        lambda f: nifti(f / "w.nii", FSL, intent=2008),
        CONTEXT,
        "cubic or quadratic coefficients of FNIRT, got NIfTI's intent 2008",
    ),
    "a velocity field": (
        lambda f: nifti(f / "w.nii", vectors(MOVED), intent=1007, name=b"NREG_TRANS", parameters=(5, 0, 0)),
        CONTEXT,
        "got a stationary velocity spline",
    ),
    "a chain with a missing member": (
        lambda f: text(f, "one.txt", AFFINE.format("zero.txt")),
        CONTEXT,
        "must come with its initial transform, got .*one.txt without zero.txt",
    ),
    "a chain in a circle": (
        lambda f: text(f, "one.txt", AFFINE.format("one.txt")),
        CONTEXT,
        "must be a chain of at most 32 files",
    ),
    "too few coefficients": (
        lambda f: text(f, "t.txt", SPLINE.format("1 2 3")),
        CONTEXT,
        "must have 648 numbers TransformParameters in .*t.txt, got 3 words",
    ),
    "another transform of elastix": (
        lambda f: text(f, "t.txt", HEADER + '(Transform "SplineKernelTransform")\n'),
        CONTEXT,
        "got 'SplineKernelTransform' in .*t.txt: write its field by transformix -def all",
    ),
    "an oblique image of AFNI": (
        lambda f: text(f, "a.1D", "1 0 0 0 0 1 0 0 0 0 1 0\n"),
        transforms.Context("oblique"),
        "got an oblique one",
    ),
    "a .m3z": (lambda f: text(f, "a.m3z", "x"), CONTEXT, "convert it by mri_warp_convert"),
    "an .lta without volumes": (
        lambda f: text(f, "a.lta", LTA.format(0, "1 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1").partition("src")[0]),
        CONTEXT,
        "must name its two volumes, got .*a.lta without dst's volume|without src's volume",
    ),
    "an array": (lambda f: text(f, "a.npy", "x"), CONTEXT, "an array in .*: name one of voxelmorph, convexadam"),
    "a mapping of another shape": (
        lambda f: nifti(f / "y.nii", MOVED[..., :2], intent=1007, name=b"Mapping"),
        CONTEXT,
        "must be 3D with 3 values a voxel",
    ),
}


def text(folder: Path, name: str, content: str) -> Path:
    (folder / name).write_text(content)
    return folder / name


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_read(tmp_path, kind):
    make, context, message = BAD[kind]
    if context.fixed_source == "oblique":
        oblique = fixed()
        oblique.SetDirection((0.6, 0.8, 0, -0.8, 0.6, 0, 0, 0, 1))
        context = transforms.Context(oblique)
    path = make(tmp_path)
    with pytest.raises(RegistrationError, match=message) as caught:
        transforms.read_transform(path, context=context)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("file", "name", "message"),
    [
        ("t.nii", "spm", "a deformation of SPM must come with the grid of the fixed image"),
        ("t.h5", "spm", r"SPM has \.nii \.nii\.gz, got the name t\.h5"),
        ("t.lta", "freesurfer", "a matrix file of FreeSurfer must hold a linear transform, got a deformable one"),
        ("t.mat", "greedy", "a matrix file of greedy must hold a linear transform"),
        ("t.nii.gz", "auto", "the format to write must be named where the file's name does not tell"),
        ("t.nii.gz", "sas", "the format of a transform must be one of afni, .* got 'sas'"),
    ],
)
def test_what_cannot_be_written(tmp_path, file, name, message):
    grids = {} if name == "spm" else {"fixed": fixed(), "moving": CONTEXT.moving}
    with pytest.raises(RegistrationError, match=message):
        transforms.write(dense(), tmp_path / file, name, **grids)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("composed", [False, True])
def test_hdf5_files_are_those_of_simpleitk(tmp_path, composed):
    """With h5py the fields' values are not written by SimpleITK."""
    pytest.importorskip("h5py")
    affine = sitk.AffineTransform([1.1, 0.1, 0, 0, 0.9, 0, 0, 0, 1], [1, 2, 3])
    transform = sitk.CompositeTransform([affine, dense(), affine, dense()]) if composed else dense()
    transforms.write(transform, tmp_path / "ours.h5", "itk")
    sitk.WriteTransform(transform, str(tmp_path / "theirs.h5"))
    ours, theirs = (sitk.ReadTransform(str(tmp_path / name)) for name in ("ours.h5", "theirs.h5"))
    assert ours.GetName() == theirs.GetName() == transform.GetName()
    assert ours.GetFixedParameters() == theirs.GetFixedParameters()
    assert ours.GetParameters() == theirs.GetParameters()
    assert ours.TransformPoint((9, 21, 33)) == theirs.TransformPoint((9, 21, 33)) != (9, 21, 33)


@pytest.mark.parametrize("suffix", [".h5", ".tfm", ".mat", ".xfm"])
@pytest.mark.parametrize("name", ["affine", "affine.nii.gz", "affine.mat", "affine.h5"])
def test_the_content_decides_on_a_transform_file(tmp_path, suffix, name):
    """Tools that write ITK's text as .mat are common; the name of the file comes back in messages."""
    affine = sitk.AffineTransform([1.1, 0.1, 0, 0, 0.9, 0, 0, 0, 1], [1, 2, 3])
    sitk.WriteTransform(affine, str(tmp_path / f"a{suffix}"))
    path = (tmp_path / f"a{suffix}").rename(tmp_path / name)
    assert transforms.read_transform(path).TransformPoint((9, 21, 33)) == pytest.approx((13, 20.9, 36))
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(RegistrationError, match=name):
        transforms.read_transform(path)
