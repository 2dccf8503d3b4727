"""Transforms and points: composed, flattened or refused in one sentence, alike by every command."""

from __future__ import annotations

import json
import os
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import LDRCore
from LDRCore import RegistrationError, cli
from LDRCore.evaluation import pairs, process
from LDRCore.io import points as point_files
from LDRCore.io import trial
from LDRCore.io.transforms import read_transform

h5py = pytest.importorskip("h5py")

SHIFT = "Transform: TranslationTransform_double_3_3\nParameters: 1 2 3\nFixedParameters:\n"
FURTHER = "Transform: TranslationTransform_double_3_3\nParameters: 10 20 30\nFixedParameters:\n"


def ldr(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def text_file(folder: Path, *transforms: str, name: str = "t.tfm") -> Path:
    lines = "".join(f"#Transform {number}\n{text}" for number, text in enumerate(transforms))
    (folder / name).write_text(f"#Insight Transform File V1.0\n{lines}")
    return folder / name


def affine(parameters: str, fixed: str = "0 0 0") -> str:
    return f"Transform: AffineTransform_double_3_3\nParameters: {parameters}\nFixedParameters: {fixed}\n"


def hdf5(folder: Path, change) -> Path:
    path = folder / "t.h5"
    sitk.WriteTransform(sitk.AffineTransform(3), str(path))
    with h5py.File(path, "r+") as file:
        change(file["TransformGroup"])
    return path


def set_nan(group) -> None:
    group["0/TransformParameters"][4] = np.nan


def field_file(
    folder: Path, name: str, *, intent: int = 1007, intent_name: bytes = b"", parameter: float = 0, key: str = ""
) -> Path:
    values = np.full((6, 7, 8, 3), 2.0)
    field = sitk.GetImageFromArray(values.astype(np.float32), isVector=True)
    if key:
        field.SetMetaData(*key.split("="))
    sitk.WriteImage(field, str(folder / name))
    if name.endswith(".nii"):
        header = bytearray((folder / name).read_bytes())
        header[68:70] = np.array([intent], "<i2").tobytes()
        header[56:60] = np.array([parameter], "<f4").tobytes()
        header[328:344] = intent_name.ljust(16, b"\0")
        (folder / name).write_bytes(header)
    return folder / name


def bad_field(folder: Path) -> sitk.Transform:
    values = np.zeros((6, 7, 8, 3))
    values[1, 1, 1, 0] = np.nan
    return sitk.DisplacementFieldTransform(sitk.GetImageFromArray(values, isVector=True))


def field_in_the_air(folder: Path, name: str) -> Path:
    """A field whose origin is not a number."""
    path = field_file(folder, name)
    path.write_bytes(
        path.read_bytes().replace(b"Offset = 0 0 0", b"Offset = nan 0 0").replace(b"(0,0,0)", b"(nan,nan,nan)")
    )
    return path


def field_at_nan() -> sitk.Transform:
    field = sitk.DisplacementFieldTransform(sitk.Image([4, 4, 4], sitk.sitkVectorFloat64, 3))
    parameters = list(field.GetFixedParameters())
    parameters[3] = np.nan
    field.SetFixedParameters(parameters)
    return field


BAD = {
    "several": (lambda f: text_file(f, SHIFT, FURTHER), "must be one transform or a composite of several"),
    "two dimensions": (lambda f: two_dimensional(f, "t.tfm"), "must be 3D, got 2D"),
    "two dimensions, h5": (lambda f: two_dimensional(f, "t.h5"), "must be 3D, got 2D"),
    "nan": (lambda f: text_file(f, affine("1 0 0 0 1 0 0 0 nan 0 0 0")), "must be a file that SimpleITK can read"),
    "nan, h5": (lambda f: hdf5(f, set_nan), "must hold only finite values, got 1 others in .*t.h5"),
    "no parameters": (lambda f: text_file(f, "Transform: AffineTransform_double_3_3\n"), "must have 12 Parameters in"),
    "few parameters": (lambda f: text_file(f, affine("1 0 0 0 1 0 0 0 1 0 0")), "SimpleITK can read"),
    "singular": (
        lambda f: text_file(f, affine("1 0 0 0 1 0 0 0 0 0 0 0")),
        "must be invertible, got a singular matrix",
    ),
    "nearly singular": (lambda f: text_file(f, affine("1 0 0 0 1 0 0 0 1e-7 0 0 0")), "must be invertible"),
    "empty": (lambda f: text_file(f), "SimpleITK can read"),
    "NiftyReg": (
        lambda f: field_file(f, "y.nii", intent_name=b"NREG_TRANS", parameter=5),
        "got a stationary velocity spline in .*y.nii: write its field by reg_transform -def",
    ),
    "FSL": (lambda f: field_file(f, "y.nii", intent=2006), "grid of the (fixed|moving) image|must have the size of"),
    "modeling": (
        lambda f: field_file(f, "y.nrrd", key="displacement field type=modeling"),
        "must be fixed -> moving, got a modeling transform",
    ),
    "placed at nan, mha": (
        lambda f: field_in_the_air(f, "y.mha"),
        "must have a finite origin, .* got .*nan.* in .*y.mha",
    ),
    "placed at nan, nrrd": (
        lambda f: field_in_the_air(f, "y.nrrd"),
        "must have a finite origin, .* got .*nan.* in .*y.nrrd",
    ),
    "an image": (lambda f: write_image(f), "must be 3D with 3 components a voxel"),
    "text": (lambda f: text_file(f, "hello", name="t.nii.gz"), "must be a file that SimpleITK can read"),
}


def two_dimensional(folder: Path, name: str) -> Path:
    sitk.WriteTransform(sitk.AffineTransform(2), str(folder / name))
    return folder / name


def write_image(folder: Path) -> Path:
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((6, 7, 8), np.int16)), str(folder / "i.nii.gz"))
    return folder / "i.nii.gz"


@pytest.fixture
def data(tmp_path, blob, monkeypatch) -> Path:
    sitk.WriteImage(blob, str(tmp_path / "a.nii.gz"))
    (tmp_path / "p.csv").write_text("40,40,40\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", BAD)
def test_every_command_refuses_what_is_no_transform(data, capfd, kind):
    make, message = BAD[kind]
    path = make(data)
    before = {p.name for p in data.iterdir()}
    for command in (
        "warp a.nii.gz --transform T --reference a.nii.gz --out o.nii.gz",
        "points p.csv --transform T --out o.csv",
        "invert T --reference a.nii.gz --out o.h5",
        "jacobian T --reference a.nii.gz --out o.nii.gz",
        "evaluate a.nii.gz a.nii.gz --transform T --out o.csv",
        "register a.nii.gz a.nii.gz --initial T --out o",
    ):
        assert ldr(*command.replace(" T", f" {path}").split()) == 2
        printed = capfd.readouterr()
        with pytest.raises(RegistrationError, match=message):
            raise RegistrationError(printed.err)
        assert printed.err.count("\n") == 1
    assert {p.name for p in data.iterdir()} == before


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "must be a path or a SimpleITK transform, got NoneType"),
        (np.eye(4), "must be a path or a SimpleITK transform, got ndarray"),
        ([], "must be a path or a SimpleITK transform, got list"),
        ("", "must be an existing file"),
        (sitk.AffineTransform(2), "must be 3D, got 2D in memory"),
        (sitk.ScaleTransform(3, (1, 0, 1)), "must be invertible"),
        (bad_field(Path()), "must hold only finite values, got 1 others in memory"),
        (field_at_nan(), "must hold only finite values, got 1 others in memory"),
    ],
)
def test_the_library_refuses_the_same(blob, source, message):
    with pytest.raises(RegistrationError, match=message):
        LDRCore.warp_image(blob, source, blob)
    with pytest.raises(RegistrationError, match=message):
        LDRCore.transform_points([[1, 2, 3]], source)


@pytest.mark.parametrize("points", [None, "a", [["x", 1, 2]], [[1, 2]], [[1, 2, np.nan]], [1, 2, 3], object()])
def test_points_that_are_none(points):
    with pytest.raises(RegistrationError, match="points must"):
        LDRCore.transform_points(points, sitk.Transform(3, sitk.sitkIdentity))


def test_images_that_are_none(blob):
    identity = sitk.Transform(3, sitk.sitkIdentity)
    with pytest.raises(RegistrationError, match="image must be a path"):
        LDRCore.warp_image(None, identity, blob)
    with pytest.raises(RegistrationError, match="reference must be a path"):
        LDRCore.warp_image(blob, identity, None)


def test_composites_in_composites_are_flattened(tmp_path):
    turn = sitk.Euler3DTransform((0, 0, 0), 0, 0, 0.5, (1, 2, 3))
    scale = sitk.ScaleTransform(3, (2, 1, 1))
    inner = sitk.CompositeTransform([turn, scale])
    nested = sitk.CompositeTransform([inner, sitk.TranslationTransform(3, (4, 5, 6))])
    flat = sitk.CompositeTransform(read_transform(nested))
    assert [flat.GetNthTransform(k).GetName() for k in range(3)] == [
        *("Euler3DTransform", "ScaleTransform", "TranslationTransform")
    ]
    assert flat.TransformPoint((7, 8, 9)) == pytest.approx(nested.TransformPoint((7, 8, 9)))
    sitk.WriteTransform(flat, str(tmp_path / "flat.h5"))


@pytest.mark.parametrize("suffix", [".tfm", ".txt", ".h5", ".mat"])
def test_every_class_of_transform_is_read_as_written(tmp_path, suffix):
    grid = sitk.Image(9, 9, 9, sitk.sitkUInt8)
    grid.SetSpacing((10, 10, 10))
    spline = sitk.BSplineTransformInitializer(grid, [3, 3, 3])
    spline.SetParameters(np.random.default_rng(0).normal(size=spline.GetNumberOfParameters()).tolist())
    field = sitk.GetImageFromArray(np.random.default_rng(0).normal(size=(5, 6, 7, 3)), isVector=True)
    for transform in (
        sitk.Transform(3, sitk.sitkIdentity),
        sitk.TranslationTransform(3, (1, 2, 3)),
        sitk.Euler3DTransform((1, 2, 3), 0.1, 0.2, 0.3, (4, 5, 6)),
        sitk.VersorRigid3DTransform((0, 0, 0.6, 0.8), (1, 2, 3), (4, 5, 6)),
        sitk.Similarity3DTransform(1.5, (0, 0, 0.6, 0.8), (1, 2, 3), (4, 5, 6)),
        sitk.AffineTransform((1, 0.1, 0, 0, 1.2, 0, 0, 0, 1), (1, 2, 3), (4, 5, 6)),
        spline,
        sitk.DisplacementFieldTransform(field),
    ):
        path = tmp_path / f"t{suffix}"
        try:
            sitk.WriteTransform(transform, str(path))
        except RuntimeError:  # .mat has no room for images
            continue
        again = read_transform(path)
        for point in ((1, 2, 3), (4.5, 3.5, 2.5), (31, 42, 53)):
            assert again.TransformPoint(point) == pytest.approx(transform.TransformPoint(point))


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_matrix_that_is_larger_than_its_file_is_refused_before_memory_is_taken(tmp_path, order):
    path = tmp_path / "t.mat"
    sitk.WriteTransform(sitk.AffineTransform(3), str(path))
    read_transform(path)
    data = path.read_bytes()
    kind = 0 if order == "<" else 1000
    path.write_bytes(struct.pack(f"{order}5i", kind, 30_000_000, 1, 0, 27) + data[20:])
    with pytest.raises(RegistrationError, match=r"whole MATLAB file .* its 30000000 x 1 numbers"):
        read_transform(path)


def test_a_composite_file_is_read_whole(tmp_path):
    path = text_file(tmp_path, "Transform: CompositeTransform_double_3_3\n", SHIFT, FURTHER)
    assert read_transform(path).TransformPoint((0, 0, 0)) == (11, 22, 33)


def test_several_transforms_apply_in_the_order_of_ants(data, capsys):
    """A point goes through the list in order: doubled, then shifted, 2 * 40 + 10; the other way round 2 (40 + 10)."""
    sitk.WriteTransform(sitk.ScaleTransform(3, (2, 2, 2)), "double.tfm")
    sitk.WriteTransform(sitk.TranslationTransform(3, (10, 0, 0)), "shift.tfm")
    for names, x in ((("double.tfm", "shift.tfm"), 90), (("shift.tfm", "double.tfm"), 100)):
        options = [word for name in names for word in ("--transform", name)]
        assert ldr("points", "p.csv", *options, "--out", "q.csv", "--overwrite") == 0
        assert np.loadtxt("q.csv", delimiter=",", skiprows=1).tolist() == [x, 80, 80]
        assert LDRCore.transform_points([[40, 40, 40]], names).tolist() == [[x, 80, 80]]
        warped = LDRCore.warp_image("a.nii.gz", names, "a.nii.gz")
        moved = sitk.ReadImage("a.nii.gz").TransformPhysicalPointToIndex((30, 24, 24))
        assert ldr("warp", "a.nii.gz", *options, "--reference", "a.nii.gz", "--out", "w.nii.gz", "--overwrite") == 0
        assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage("w.nii.gz")), sitk.GetArrayFromImage(warped))
        source = (2 * 30 + 10, 48, 48) if names[0] == "double.tfm" else (2 * (30 + 10), 48, 48)
        image = sitk.ReadImage("a.nii.gz")
        inside = image.EvaluateAtPhysicalPoint(source) if image.TransformPhysicalPointToIndex(source) else 0
        assert warped[moved] == round(inside)


FCSV_COLUMNS = "id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"
FCSV = """# Markups fiducial file version = 4.11
# CoordinateSystem = {}
# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID
1,40,41,42,0,0,0,1,1,1,0,F-1,"a, b",
"""


def markups(system: str, **changes) -> str:
    control = {"id": "1", "label": "nose", "position": [40, 41, 42], **changes}
    return json.dumps({"markups": [{"type": "Fiducial", "coordinateSystem": system, "controlPoints": [control]}]})


@pytest.mark.parametrize(
    ("name", "text", "points", "frame", "columns"),
    [
        ("p.csv", "40,41,42\n", [40, 41, 42], "", "x,y,z"),
        ("p.csv", "x,y,z\n40,41,42\n", [40, 41, 42], "", "x,y,z"),
        ("p.csv", "label,Z,X,Y,note\nnose,42,40,41,hm\n", [40, 41, 42], "", "label,Z,X,Y,note"),
        ("p.csv", "\ufeffx,y,z,t\n40,41,42,0\n", [40, 41, 42], "", "x,y,z,t"),
        ("p.csv", "# mine\n\nx,y,z\n40,41,42\n", [40, 41, 42], "", "x,y,z"),
        ("p.csv", "r,a,s\n40,41,42\n", [40, 41, 42], "ras", "r,a,s"),
        (
            "p.fcsv",
            FCSV.format("RAS"),
            [40, 41, 42],
            "ras",
            FCSV_COLUMNS,
        ),
        (
            "p.fcsv",
            FCSV.format("0"),
            [40, 41, 42],
            "ras",
            FCSV_COLUMNS,
        ),
        (
            "p.fcsv",
            FCSV.format("LPS"),
            [40, 41, 42],
            "lps",
            FCSV_COLUMNS,
        ),
        ("p.mrk.json", markups("LPS"), [40, 41, 42], "lps", "id,label,x,y,z"),
        ("p.mrk.json", markups("RAS"), [40, 41, 42], "ras", "id,label,x,y,z"),
    ],
)
def test_points_are_read_by_the_names_of_their_columns(data, name, text, points, frame, columns):
    (data / name).write_text(text, encoding="utf-8")
    table = point_files.read_point_table(data / name)
    assert (table.points.tolist(), table.frame, ",".join(table.columns)) == ([points], frame, columns)
    lps = [-40, -41, 42] if frame == "ras" else points
    assert point_files.read_points(data / name, "lps").tolist() == [lps]
    sitk.WriteTransform(sitk.TranslationTransform(3, (1, 2, 3)), "t.tfm")
    assert ldr("points", name, "--transform", "t.tfm", "--out", "q.csv") == 0
    again = point_files.read_point_table(data / "q.csv")
    sign = -1 if frame == "ras" else 1
    assert again.points.tolist() == [[40 + sign, 41 + 2 * sign, 45]]
    assert (again.frame, again.columns) == (frame, table.columns)
    others = [k for k in range(len(table.columns)) if k not in table.axes]
    assert [again.rows[0][k] for k in others] == [table.rows[0][k] for k in others]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"1,2,3,4\n", "must have 3 cells a line"),
        ("p.csv", b"x,y,z\n1,2,3,4\n", "must have 3 cells a line"),
        ("p.csv", b"x,y,w\n1,2,3\n", r"columns named x, y and z, got \['x', 'y', 'w'\]"),
        ("p.csv", b"x,x,y,z\n1,1,2,3\n", "columns named x, y and z"),
        ("p.csv", b"x,y,z\n1,2,nan\n", "three numbers a line"),
        ("p.csv", b"x,y,z\n1,2,inf\n", "three numbers a line"),
        ("p.csv", b"x,y,z\n1;2;3\n", "three numbers a line"),
        ("p.csv", b"x,y,z\n", "at least one line"),
        ("p.csv", b"", "at least one line"),
        ("p.csv", b"\x89PNG\r\n\x1a\n\x00\x00\x00\xff\xfe", r"must be a CSV file in UTF-8, got .*p.csv \(binary"),
        ("p.csv", b"a\x00b", "must be a CSV file in UTF-8"),
        ("p.csv", "label,x,y,z\nn\xe4se,1,2,3\n".encode("latin-1"), "must be a CSV file in UTF-8"),
        ("p.fcsv", FCSV.format("IJK").encode(), "coordinate system of points must be LPS or RAS, got 'IJK'"),
        ("p.mrk.json", b"{", "one list of control points"),
        ("p.mrk.json", b"[]", "one list of control points"),
        ("p.mrk.json", b'{"markups": [{"controlPoints": [{"label": "a"}]}]}', "one list of control points"),
        ("p.mrk.json", markups("LPS", position=[1, 2]).encode(), "must have three finite numbers each"),
        ("p.mrk.json", markups("LPS", position=[1, 2, None]).encode(), "must"),
        ("none.csv", None, "must be an existing CSV file"),
    ],
)
def test_points_that_cannot_be_read(data, capsys, name, content, message):
    if content is not None:
        (data / name).write_bytes(content)
    text_file(data, SHIFT)
    assert ldr("points", name, "--transform", "t.tfm", "--out", "q.csv") == 2
    printed = capsys.readouterr().err
    with pytest.raises(RegistrationError, match=message):
        raise RegistrationError(printed)
    assert printed.count("\n") == 1
    assert printed.isprintable() or printed.rstrip("\n").isprintable()
    assert not (data / "q.csv").exists()


def test_the_frame_of_the_file_and_of_the_command_must_agree(data, capsys):
    (data / "p.fcsv").write_text(FCSV.format("LPS"))
    text_file(data, SHIFT)
    assert ldr("points", "p.fcsv", "--ras", "--transform", "t.tfm", "--out", "q.csv") == 2
    assert "--ras is for files in RAS, got p.fcsv, which says LPS" in capsys.readouterr().err
    assert ldr("points", "p.csv", "--transform", "t.tfm", "--out", "q.fcsv") == 2
    assert "points are written as .csv, got q.fcsv" in capsys.readouterr().err
    with pytest.raises(RegistrationError, match="must be voxel indices"):
        point_files.read_points(data / "p.fcsv", "voxel")


def test_evaluate_checks_the_model_also_where_transforms_are_given(data, capsys):
    text_file(data, SHIFT)
    arguments = ("evaluate", "a.nii.gz", "a.nii.gz", "--transform", "t.tfm", "--cascades", "99")
    assert ldr(*arguments) == 2
    assert "cascades must be 0 to" in capsys.readouterr().err


def test_an_interruption_keeps_the_rows_that_are_finished(data, capsys, monkeypatch):
    text_file(data, SHIFT)
    (data / "pairs.csv").write_text("fixed,moving,transform\n" + "a.nii.gz,a.nii.gz,t.tfm\n" * 3)
    evaluate_pair, count = process.PairProcess.__call__, iter(range(9))

    def interrupted(*arguments):
        if next(count) == 2:
            raise KeyboardInterrupt
        return evaluate_pair(*arguments)

    monkeypatch.setattr(process.PairProcess, "__call__", interrupted)
    assert ldr("evaluate", "--pairs", "pairs.csv", "--out", "rows.csv") == 130
    assert len((data / "rows.csv").read_text(encoding="utf-8").splitlines()) == 1 + 2


class Poisoned(str):
    """A path at which the process that receives it ends, as at a crash."""

    def __reduce__(self) -> tuple:
        return os._exit, (9,)


def test_a_process_that_dies_costs_one_row(data):
    text_file(data, SHIFT)
    good = pairs.PairFiles("a.nii.gz", "a.nii.gz", transform="t.tfm")
    poisoned = pairs.PairFiles("a.nii.gz", Poisoned("a.nii.gz"), transform="t.tfm")
    with process.PairProcess() as evaluate:
        found = pairs.evaluate_pairs([good, poisoned, good], pairs.EvaluationOptions({}), evaluate=evaluate)
    assert ["after" in row for row in found["pairs"]] == [True, False, True]
    assert "the process that evaluated the pair ended (exit code 9)" in found["pairs"][1]["error"]
    assert len(found["problems"]) == 1


def test_lists_of_pairs_that_cannot_be_read(data, capsys):
    (data / "pairs.csv").write_bytes("fixed,moving\nb\xe4r.nii,a.nii.gz\n".encode("latin-1"))
    assert ldr("evaluate", "--pairs", "pairs.csv") == 2
    assert "must be a CSV file in UTF-8" in capsys.readouterr().err


def test_what_crashes_or_never_returns_is_tried_in_a_process_of_its_own():
    """On some damaged files HDF5 ends the process, or works for ever."""

    def spin() -> None:
        while True:
            pass

    assert trial.works(lambda: 1)
    assert not trial.works(lambda: 1 / 0)
    assert not trial.works(lambda: os.kill(os.getpid(), signal.SIGSEGV))
    assert not trial.works(spin, limit_s=1)


def test_a_transform_on_which_hdf5_crashes_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "t.h5"
    sitk.WriteTransform(sitk.TranslationTransform(3, (1.0, 2.0, 3.0)), str(path))
    parent = os.getpid()

    def crash(_: str) -> None:
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGSEGV)

    monkeypatch.setattr("LDRCore.io.transforms.itk.sitk.ReadTransform", crash)
    with pytest.raises(RegistrationError, match=r"must be a file that SimpleITK can read, got .*t\.h5"):
        read_transform(path)
