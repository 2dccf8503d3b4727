"""Outputs are whole or not there: full disks, kills, stale files, inputs as outputs, two processes at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import LDRCore
from LDRCore import RegistrationError, cli
from LDRCore.cli.output import progress_lines
from LDRCore.io import files, writing
from LDRCore.result import RegistrationResult

RNG = np.random.default_rng(0)


def ldr(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def make_result(value: float, *, inverse: bool = False) -> RegistrationResult:
    """A result whose warped image, transform and report tell one from another."""
    warped = sitk.GetImageFromArray(RNG.normal(value, 0.1, (12, 13, 14)).astype(np.float32))
    transform = sitk.CompositeTransform([sitk.TranslationTransform(3, (value, 0, 0))])
    back = sitk.TranslationTransform(3, (-value, 0, 0)) if inverse else None
    return RegistrationResult(warped, transform, transform, back, {"value": value})


def value_of(folder: Path) -> float:
    """Read the value of a result; every file of it must be there and agree."""
    value = json.loads((folder / "report.json").read_text(encoding="utf-8"))["value"]
    assert sitk.ReadTransform(str(folder / "transform.h5")).TransformPoint((0, 0, 0)) == (value, 0, 0)
    assert abs(sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "warped.nii.gz"))).mean() - value) < 0.1
    field = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "displacement_field.nii.gz")))
    assert np.allclose(field, [value, 0, 0])
    assert np.allclose(sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "jacobian_determinant.nii.gz"))), 1)
    return value


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def run_python(code: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, encoding="utf-8", cwd=cwd, check=False
    )


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np, SimpleITK as sitk
from LDRCore.errors import RegistrationError
from LDRCore.io import writing
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
values = np.random.default_rng(0).normal(size=(30, 31, 32, 3))
image = sitk.GetImageFromArray(values[..., 0].astype(np.float32))
transform = sitk.DisplacementFieldTransform(sitk.GetImageFromArray(values, isVector=True))
path = Path(sys.argv[1])
write = writing.write_transform if path.suffix in (".h5", ".tfm") else writing.write_image
what = transform if write is writing.write_transform else image
try:
    writing.write_file(path, lambda part: write(what, part))
except RegistrationError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit of a file's size")
@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mha", "a.nrrd", "a.vtk", "a.gipl", "t.h5", "t.tfm"])
def test_a_file_that_does_not_fit_is_an_error_and_the_older_one_stays(tmp_path, name):
    """A limit of a file's size stands for a full disk: ITK's writer of NIfTI returns normally in both cases."""
    (tmp_path / name).write_text("older")
    done = run_python(FULL_DISK, name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the output must be writable")
    assert done.stdout.count("\n") == 1
    assert names(tmp_path) == {name}
    assert (tmp_path / name).read_text(encoding="utf-8") == "older"


def test_a_result_that_does_not_fit_leaves_the_older_one(tmp_path, monkeypatch):
    make_result(1).save(tmp_path / "out")

    def cut_off(image: sitk.Image, path: str, *_: object, **__: object) -> None:
        write(image, path, True)
        os.truncate(path, os.path.getsize(path) - 100)

    write = sitk.WriteImage
    monkeypatch.setattr(sitk, "WriteImage", cut_off)
    with pytest.raises(RegistrationError, match=r"must be writable.*not written whole"):
        make_result(2).save(tmp_path / "out", overwrite=True)
    with pytest.raises(RegistrationError, match="not written whole"):
        make_result(2).save(tmp_path / "new")
    monkeypatch.undo()
    assert value_of(tmp_path / "out") == 1
    assert names(tmp_path) == {"out"}


def test_nothing_of_an_older_result_stays_and_everything_else_does(tmp_path):
    out = tmp_path / "out"
    make_result(1, inverse=True).save(out, extra=lambda folder: (folder / "overview.png").write_text("1"))
    (out / "notes.txt").write_text("mine")
    (out / "masks").mkdir()
    (out / "masks" / "m.txt").write_text("mine too")
    out.chmod(0o750)
    assert names(out) >= {"inverse_transform.h5", "overview.png"}
    make_result(2).save(out, overwrite=True)
    assert value_of(out) == 2
    expected = {"warped.nii.gz", "transform.h5", "displacement_field.nii.gz", "jacobian_determinant.nii.gz"}
    assert names(out) == expected | {"report.json", "notes.txt", "masks"}
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert (out / "masks" / "m.txt").read_text(encoding="utf-8") == "mine too"
    if sys.platform != "win32":
        assert out.stat().st_mode & 0o777 == 0o750
    assert names(tmp_path) == {"out"}


KILLED = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_fault_output import files, make_result
count = 0
def killed(action):
    def act(*arguments, **options):
        global count
        count += 1
        if count == int(sys.argv[2]):
            os._exit(9)
        return action(*arguments, **options)
    return act
for name in ("rename", "replace", "mkdir", "link", "unlink", "rmdir"):
    setattr(os, name, killed(getattr(os, name)))
files._exchange = killed(files._exchange)
make_result(2).save("out", overwrite=True)
"""


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="folders cannot be exchanged in one step")
def test_a_killed_process_leaves_the_old_or_the_new_result(tmp_path):
    """The process ends before the n-th change of a name or folder."""
    seen = set()
    for point in (1, 2, 4, 5, 6, 7, 9):
        base = tmp_path / str(point)
        make_result(1).save(base / "out")
        (base / "out" / "notes.txt").write_text("mine")
        run_python(KILLED, Path(__file__).parent, point, cwd=base)
        seen.add(value_of(base / "out"))
        assert (base / "out" / "notes.txt").exists()
        make_result(3).save(base / "out", overwrite=True)
        assert value_of(base / "out") == 3
        assert names(base) == {"out"}, "the next run removes what the killed one left"
    assert seen == {1, 2}


def test_an_error_at_any_rename_leaves_the_older_result(tmp_path, monkeypatch):
    make_result(1).save(tmp_path / "out")

    def refuse(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "_exchange", refuse)
    with pytest.raises(KeyboardInterrupt):
        make_result(2).save(tmp_path / "out", overwrite=True)
    assert value_of(tmp_path / "out") == 1
    assert names(tmp_path) == {"out"}


def test_folders_are_exchanged_where_the_system_cannot_do_it_in_one_step(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "other")
    for name in ("a", "b"):
        (tmp_path / "x.part" if name == "a" else tmp_path).mkdir(exist_ok=True)
    first, second = tmp_path / "x.part" / "out", tmp_path / "out"
    for folder, text in ((first, "new"), (second, "old")):
        folder.mkdir()
        (folder / "f").write_text(text)
    files._exchange(first, second)
    assert [(folder / "f").read_text(encoding="utf-8") for folder in (first, second)] == ["old", "new"]
    assert names(tmp_path) == {"x.part", "out"}


def test_a_second_process_that_writes_the_same_is_refused(tmp_path):
    with (
        files.staging_folder(tmp_path / "out"),
        pytest.raises(RegistrationError, match="one process at a time may write"),
        files.staging_folder(tmp_path / "out"),
    ):
        pass
    with files.staging_folder(tmp_path / "out"), files.staging_folder(tmp_path / "out.b"):
        pass
    assert names(tmp_path) == set()


def test_temporary_names_cannot_be_prepared(tmp_path):
    """A link at the name of an unfinished file would have another file written to."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".part-a.nii").symlink_to(victim)
    (tmp_path / ".a.nii.abc.part").symlink_to(victim)
    staged = []
    for _ in range(2):
        with files.complete_file(tmp_path / "a.nii") as part:
            part.write_text("x")
            staged.append(part)
    assert staged[0] != staged[1]
    assert victim.read_text(encoding="utf-8") == "mine"
    assert (tmp_path / "a.nii").read_text(encoding="utf-8") == "x"


@pytest.fixture
def inputs(tmp_path, blob, monkeypatch) -> Path:
    """A folder with an image, points, a transform and a list of pairs, which is the current one."""
    sitk.WriteImage(blob, str(tmp_path / "a.nii.gz"))
    sitk.WriteTransform(sitk.TranslationTransform(3, (1, 2, 3)), str(tmp_path / "t.tfm"))
    (tmp_path / "p.csv").write_text("1,2,3\n")
    (tmp_path / "pairs.csv").write_text("fixed,moving,transform\na.nii.gz,a.nii.gz,t.tfm\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        "warp a.nii.gz --transform t.tfm --reference a.nii.gz --out a.nii.gz",
        "warp a.nii.gz --transform t.tfm --reference a.nii.gz --out ./x/../a.nii.gz",
        "points p.csv --transform t.tfm --out p.csv",
        "points p.csv --transform t.tfm --out t.tfm",
        "invert t.tfm --reference a.nii.gz --out t.tfm",
        "jacobian t.tfm --reference a.nii.gz --out a.nii.gz",
        "evaluate --pairs pairs.csv --out pairs.csv",
        "evaluate --pairs pairs.csv --out a.nii.gz",
    ],
)
def test_an_input_is_never_replaced(inputs, capsys, command):
    (inputs / "x").mkdir()
    before = {path.name: path.read_bytes() for path in inputs.iterdir() if path.is_file()}
    assert ldr(*command.split(), "--overwrite") == 2
    assert "must not replace an input" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in inputs.iterdir() if path.is_file()} == before


def test_an_input_in_the_result_folder_is_never_replaced(inputs, capsys):
    out = inputs / "out"
    out.mkdir()
    os.replace(inputs / "a.nii.gz", out / "warped.nii.gz")
    before = (out / "warped.nii.gz").read_bytes()
    assert ldr("register", "out/warped.nii.gz", "out/warped.nii.gz", "--out", "out", "--overwrite") == 2
    assert "must not replace an input" in capsys.readouterr().err
    assert (out / "warped.nii.gz").read_bytes() == before


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "it must be a name, got an empty one"),
        (".", "must be a folder of its own, got the current folder"),
        ("result.nii.gz", "must be a folder, got result.nii.gz, the name of a file"),
    ],
)
def test_what_is_no_result_folder(inputs, capsys, out, message):
    before = names(inputs)
    try:
        code = ldr("register", "a.nii.gz", "a.nii.gz", "--out", out)
    except SystemExit as left:
        code = left.code
    assert code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert names(inputs) == before


def test_a_folder_with_the_name_of_a_result_file_is_kept(tmp_path):
    (tmp_path / "out" / "report.json").mkdir(parents=True)
    with pytest.raises(RegistrationError, match="must not take the place of a folder"):
        make_result(1).save(tmp_path / "out", overwrite=True)
    assert names(tmp_path / "out") == {"report.json"}
    with pytest.raises(RegistrationError, match="must be a path, got NoneType"):
        make_result(1).save(None)


def test_headers_without_their_values_are_not_written(inputs, capsys):
    arguments = ("a.nii.gz", "--transform", "t.tfm", "--reference", "a.nii.gz", "--out", "b.mhd")
    before = names(inputs)
    assert ldr("warp", *arguments) == 2
    assert "must be a single file" in capsys.readouterr().err
    assert names(inputs) == before


def test_the_seconds_count_what_is_written_and_drawn(tmp_path, monkeypatch):
    result, clock = make_result(1), [100.0]
    result.facts["times_s"] = {"warp": 1.0, "total": 3.0}
    monkeypatch.setattr("LDRCore.result.time.perf_counter", lambda: clock[0])

    def draw(_: Path) -> None:
        clock[0] += 20

    for _ in range(2):  # a second time does not add to the first
        result.save(tmp_path / "out", overwrite=True, extra=draw)
        stored = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
        assert stored["times_s"] == {"warp": 1.0, "write": 20.0, "total": 23.0}
        assert result.report["times_s"] == stored["times_s"]


def test_a_failing_picture_does_not_cost_the_result(inputs, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise ValueError("no ink")

    monkeypatch.setattr("LDRCore.overview.write_overview", fail)
    assert ldr("register", "a.nii.gz", "a.nii.gz", "--out", "out", "--cascades", "0", "--json") == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert "overview.png could not be drawn (ValueError: no ink)" in report["warnings"]
    assert "overview.png" not in names(inputs / "out")
    stored = json.loads((inputs / "out" / "report.json").read_text(encoding="utf-8"))
    assert stored["warnings"] == report["warnings"]


def test_a_picture_of_large_voxels_is_small(tmp_path, monkeypatch):
    """46 x 63 x 46 voxels of 24 mm were sampled every 4 mm: 29 million points."""
    from LDRCore import overview

    values = RNG.normal(100, 1, (46, 63, 46)).astype(np.float32)
    values[10:30, 10:40, 10:30] += 300
    image = sitk.GetImageFromArray(values)
    image.SetSpacing((24.0,) * 3)
    sizes = []
    make = overview._empty
    monkeypatch.setattr(overview, "_empty", lambda size, *rest: sizes.append(np.prod(size)) or make(size, *rest))
    overview.write_overview(tmp_path / "o.png", image, image, sitk.Transform(3, sitk.sitkIdentity))
    assert max(sizes) < 1_000_000


def test_usage_errors_are_json_with_json(capsys):
    with pytest.raises(SystemExit) as left:
        ldr("register", "f", "m", "--out", "o", "--cascades", "x", "--json")
    assert left.value.code == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"error": "argument --cascades: invalid int value: 'x' (see ldr register --help)"}
    assert printed.err.count("\n") == 1


def test_progress_is_a_line_now_and_then_where_no_terminal_is(capsys):
    """After 6 of an estimated 24 seconds 18 are left."""
    times = iter([0.0, 2.0, 6.0, 7.0, 12.0])
    show = progress_lines(lambda: next(times))
    for fraction in (0.1, 0.25, 0.3, 0.5):
        show(fraction, "warping")
    assert capsys.readouterr().err == " 25 % warping, about 18 s left\n 50 % warping, about 12 s left\n"


def test_a_package_that_does_not_load_is_one_sentence(inputs, capsys, monkeypatch):
    def load(*_: object, **__: object) -> None:
        raise ImportError("libtorch_cpu.so: failed to map segment")

    monkeypatch.setattr(LDRCore.registration, "register", load)
    assert ldr("register", "a.nii.gz", "a.nii.gz", "--out", "out", "--no-overview") == 2
    assert "a package must load, got libtorch_cpu.so" in capsys.readouterr().err


def test_too_little_memory_is_one_sentence(inputs, capsys, monkeypatch):
    def allocate(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    monkeypatch.setattr(LDRCore.registration, "register", allocate)
    assert ldr("register", "a.nii.gz", "a.nii.gz", "--out", "out", "--no-overview") == 2
    assert "must fit into memory" in capsys.readouterr().err
    assert "out" not in names(inputs)


TERMINATED = """
import sys
from pathlib import Path
from LDRCore import cli
from LDRCore.cli import warp
from LDRCore.io import writing
def wait(image, path):
    path.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()
writing.write_image = warp.write_image = wait
sys.argv[1:] = ["warp", "a.nii.gz", "--transform", "t.tfm", "--reference", "a.nii.gz", "--out", "b.nii.gz"]
sys.exit(cli.script())
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_removes_what_is_half_written(inputs, number):
    before = names(inputs)
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINATED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # a shell's background jobs ignore Ctrl-C
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"writing\n"
    process.send_signal(number)
    _, printed = process.communicate()
    assert process.returncode == 130
    assert printed == b"interrupted; no output was left incomplete\n"
    assert names(inputs) == before


def test_whole_numbers_of_numpy_are_whole(blob, tmp_path):
    result = LDRCore.register(blob, blob, cascades=np.int64(1))
    result.save(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["cascades"] == 1
    with pytest.raises(RegistrationError, match="cascades must be 0 to"):
        LDRCore.register(blob, blob, cascades=np.float64(1))


def test_transforms_that_are_written_come_back(tmp_path):
    field = sitk.GetImageFromArray(RNG.normal(size=(5, 6, 7, 3)), isVector=True)
    transform = sitk.CompositeTransform([sitk.AffineTransform(3), sitk.DisplacementFieldTransform(field)])
    for name in ("t.h5", "t.tfm", "t.txt"):
        writing.write_file(tmp_path / name, lambda path: writing.write_transform(transform, path))
        again = sitk.ReadTransform(str(tmp_path / name))
        assert again.TransformPoint((2.5, 3, 1)) == pytest.approx(transform.TransformPoint((2.5, 3, 1)))
