"""Lists of pairs, the plan of a run, the store of results, running moments: by hand."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from LDRCore import RegistrationError
from LDRCore.cohort import page, plan, statistics, store, table, thumbnail
from LDRCore.cohort.pairs import CohortPair, make_pairs, pairs_of_pattern, read_cohort
from LDRCore.cohort.settings import CohortSettings, check_settings


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_list_by_hand(tmp_path):
    path = write(
        tmp_path / "p.csv", "name,fixed,moving,initial\na/b,f.nii.gz,m.nii.gz,none\n,f.nii.gz,sub-2.nii.gz,t.h5\n"
    )
    folder = str(tmp_path)
    assert read_cohort(path) == [
        CohortPair("a/b", f"{folder}/f.nii.gz", f"{folder}/m.nii.gz", initial="none"),
        CohortPair("sub-2", f"{folder}/f.nii.gz", f"{folder}/sub-2.nii.gz", initial=f"{folder}/t.h5"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "fixed,moving\nf.nii,m 1.nii\n",
        "\ufefffixed,moving\nf.nii,m 1.nii\n",
        "fixed,moving\r\nf.nii,m 1.nii\r\n\r\n",
        'fixed, moving\n"f.nii", "m 1.nii"\n',
        "Fixed;Moving\nf.nii;m 1.nii\n",
        "moving\tfixed\tname\nm 1.nii\tf.nii\t\n",
        "# my list, first site\n\nfixed,moving,fixed_mask\n# one\nf.nii,m 1.nii\n",
        "fixed,moving,,\nf.nii,m 1.nii,,\n,,,\n",
    ],
    ids=["plain", "BOM", "Windows", "quotes after spaces", "semicolons", "tabs", "remarks", "empty cells"],
)
def test_lists_as_programs_and_people_write_them(tmp_path, text):
    (tmp_path / "p.csv").write_bytes(text.encode())
    assert read_cohort(tmp_path / "p.csv") == [CohortPair("m_1", f"{tmp_path}/f.nii", f"{tmp_path}/m 1.nii")]


def test_names_are_of_both_images_where_moving_ones_repeat():
    rows = [{"fixed": "x/a.nii", "moving": "m.nrrd"}, {"fixed": "x/b.nii", "moving": "m.nrrd"}]
    assert [pair.name for pair in make_pairs(rows)] == ["m--a", "m--b"]


def test_a_pattern(tmp_path):
    for name in ("s2.nii.gz", "s1.nii.gz", "other.txt"):
        write(tmp_path / name, "")
    pairs = pairs_of_pattern("atlas.nii", str(tmp_path / "s*.nii.gz"))
    assert [pair.name for pair in pairs] == ["s1", "s2"]
    assert {pair.fixed for pair in pairs} == {str(Path("atlas.nii").absolute())}
    with pytest.raises(RegistrationError, match="must match files, got none"):
        pairs_of_pattern("atlas.nii", str(tmp_path / "x*.nii.gz"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fixed,mov\na,b\n", "must have the columns fixed, moving and any of .*, got no moving in 'fixed,mov'"),
        ("fixed moving\na b\n", "got no fixed in 'fixed moving'"),
        (",fixed,moving\n0,a,b\n", "got one without a title"),
        ("fixed,moving,\na,b,c\n", "must have 2 cells in every line, got more in line 2"),
        ("# mine\n\nfixed,moving\na,b,c\n", "must have 2 cells in every line, got more in line 4"),
        ("fixed,moving\na,https://example.org/m.nii\n", "name files of this machine, got 'https://.* in row 1"),
        ("name,fixed,moving\nä,a,b\n", "must be a folder's .letters a to z, .*, got 'ä'"),
        ("fixed,moving,age\na,b,4\n", "got 'age'"),
        ("fixed,moving,moving\na,b,b\n", "got one of them twice"),
        ("fixed,moving\na,b,c\n", "must have 2 cells in every line, got more in line 2"),
        ("fixed,moving\na,\n", "must name a fixed and a moving image in every row, got row 1"),
        ("fixed,moving\n", "must hold a pair, got none"),
        ("name,fixed,moving\nx,a,b\ny,a,b\nx,a,c\n", "a name of its own, got 'x' in rows 1 and 3 of"),
        ("name,fixed,moving\nx,a,b\nX,a,c\n", "a name of its own, got 'X' in rows 1 and 2 of"),
        ("fixed,moving\na,b\na,b\n", "got 'b--a' in rows 1 and 2 of .*: remove one of them, or"),
        ("name,fixed,moving\n../x,a,b\n", "must be a folder's .*, got '../x'"),
        ("name,fixed,moving\n/x,a,b\n", "must be a folder's"),
        ("name,fixed,moving\nx.,a,b\n", "must be a folder's"),
        ("name,fixed,moving\ncon,a,b\n", "must be a folder's"),
        ("name,fixed,moving\nx/y,a,b\nx,a,b\n", "must not lie in another's, got 'x/y' and 'x'"),
        ("fixed,moving,fixed_labels\na,b,c\n", "labels must be given for both images or for none, got row 1"),
        ("fixed,moving,moving_landmarks\na,b,c\n", "landmarks must be given for both"),
    ],
)
def test_refused_lists(tmp_path, text, message):
    with pytest.raises(RegistrationError, match=message):
        read_cohort(write(tmp_path / "p.csv", text))


def test_moving_labels_alone_can_be_warped():
    assert make_pairs([{"fixed": "a", "moving": "b", "moving_labels": "c"}])[0].fixed_labels == ""


@pytest.mark.parametrize(
    ("options", "outputs", "message"),
    [
        ({"model": "liver"}, ("warped",), "model must be one of"),
        ({"cascades": 99}, ("warped",), "cascades must be 0 to"),
        ({"initial": "t.h5"}, ("warped",), "transforms go into the column initial"),
        ({"blur": 2}, ("warped",), "must be those of register, got .*blur"),
        ({}, ("warpd",), "an output must be one of"),
    ],
)
def test_refused_settings(options, outputs, message):
    with pytest.raises(RegistrationError, match=message):
        check_settings(options, outputs, "lps")


@pytest.fixture
def sealed(tmp_path) -> tuple[Path, CohortPair, CohortSettings]:
    """A stored result of a pair whose files exist."""
    for name in ("f.nii", "m.nii"):
        write(tmp_path / name, name)
    (pair,) = make_pairs([{"fixed": "f.nii", "moving": "m.nii", "name": "one"}], folder=tmp_path)
    settings = CohortSettings({"kind": "rigid"})
    out = tmp_path / "out"
    with store.staging(out) as folder:
        write(folder / "warped.nii.gz", "values")
        store.seal(folder, pair, settings, {"seconds": 1.5}, store.input_marks(pair))
        assert store.publish(folder, store.folder_of(out, pair))
    return out, pair, settings


def test_a_result_is_known_by_its_checksums(sealed):
    out, pair, settings = sealed
    assert store.finished_row(out, pair, settings) == {"seconds": 1.5}
    assert list((out / store.STAGING).iterdir()) == []
    Path(pair.moving).unlink()  # an input that is gone does not matter
    assert store.finished_row(out, pair, settings) == {"seconds": 1.5}


@pytest.mark.parametrize("harm", ["changed", "cut", "missing", "no checksums", "half of them", "input", "options"])
def test_a_harmed_result_does_not_count(sealed, harm):
    out, pair, settings = sealed
    folder = store.folder_of(out, pair)
    if harm == "changed":
        write(folder / "warped.nii.gz", "valueS")
    if harm == "cut":
        write(folder / "warped.nii.gz", "")
    if harm == "missing":
        (folder / "warped.nii.gz").unlink()
    if harm == "no checksums":
        (folder / store.CHECKSUMS).unlink()
    if harm == "half of them":
        write(folder / store.CHECKSUMS, (folder / store.CHECKSUMS).read_text(encoding="utf-8")[:50])
    if harm == "input":
        write(Path(pair.moving), "another")
    if harm == "options":
        settings = CohortSettings({"kind": "affine"})
    assert store.finished_row(out, pair, settings) is None


def test_one_run_at_a_time(tmp_path):
    with store.only_run(tmp_path / "o"):
        write(tmp_path / "o" / "x", "")
        with pytest.raises(RegistrationError, match="one run at a time may write"), store.only_run(tmp_path / "o"):
            pass
    with store.only_run(tmp_path / "o"):
        pass


def test_a_run_removes_what_a_killed_one_left(tmp_path):
    left = tmp_path / store.STAGING / "half" / "pair"
    left.mkdir(parents=True)
    with store.only_run(tmp_path):
        assert not left.exists()


def header(path: Path, size: list[int], kind: int) -> str:
    image = sitk.Image(size, kind)
    image.SetSpacing((2.0, 2.0, 2.0))
    sitk.WriteImage(image, str(path))
    return str(path)


def test_bytes_by_hand(tmp_path):
    fixed = header(tmp_path / "f.nii", [10, 10, 10], sitk.sitkFloat32)
    moving = header(tmp_path / "m.nii", [20, 20, 20], sitk.sitkInt16)
    pairs = make_pairs([{"fixed": fixed, "moving": moving}])
    settings = check_settings({"model": "none"}, ("warped", "transform", "jacobian"), "lps")
    # 1000 voxels; the field has (10 + 8 + 12)^3 voxels of 2 mm with its margins of 8 mm and of 6 voxels
    expected = 40_000 + 1.2 * 1000 + (29 * 30**3 + 20_000) + 3.8 * 1000
    assert plan.estimate(pairs, settings)[0] == round(expected)


@pytest.mark.parametrize(
    ("options", "side"), [({"model": "brain-t1-small"}, 21), ({"model": "brain-t1-small", "refine": "fast"}, 30)]
)
def test_networks_of_half_resolution_store_less(tmp_path, options, side):
    """(20 + 16) mm are 9 voxels of 4 mm or 18 of 2 mm, and 12 more."""
    path = header(tmp_path / "f.nii", [10, 10, 10], sitk.sitkInt16)
    settings = check_settings(options, ("transform",), "lps")
    pairs = make_pairs([{"fixed": path, "moving": path}])
    assert plan.estimate(pairs, settings)[0] == 40_000 + 29 * side**3 + 20_000


def test_content_counts_not_air(tmp_path):
    values = np.zeros((60, 40, 50), np.int16)
    values[10:40, :, 20:30] = 7  # a half, all and a fifth
    sitk.WriteImage(sitk.GetImageFromArray(values), str(tmp_path / "f.nii"))
    assert plan._content_share(str(tmp_path / "f.nii")) == pytest.approx([0.2, 1.0, 0.5], abs=0.05)
    assert plan._content_share(str(tmp_path / "none.nii")) == [1.0, 1.0, 1.0]


def test_a_flat_image_does_not_end_the_estimate(tmp_path):
    """It is refused where it is registered, as one row; here it only counts for less."""
    fixed, flat = header(tmp_path / "f.nii", [10] * 3, sitk.sitkInt16), tmp_path / "m.nii"
    sitk.WriteImage(sitk.Image([10, 10], sitk.sitkInt16), str(flat))
    settings = check_settings({"model": "none"}, ("warped",), "lps")
    for pair in ({"fixed": fixed, "moving": str(flat)}, {"fixed": str(flat), "moving": fixed}):
        assert plan.estimate(make_pairs([pair]), settings)[0] > 40_000


def test_a_disk_that_is_too_small(tmp_path, monkeypatch):
    planned = plan.Plan(1, 1, False, pair_bytes=2_000_000, worker_bytes=0)
    monkeypatch.setattr(plan, "free_bytes", lambda folder: 9_000_000)
    assert plan.check_disk(tmp_path, 4, planned) == 8_000_000
    with pytest.raises(RegistrationError, match=r"must hold about 10 MB for 5 pairs, got 9 MB free"):
        plan.check_disk(tmp_path, 5, planned)


@pytest.mark.parametrize(
    ("cores", "free", "asked", "expected"),
    [
        (4, 1 << 40, (None, None), (4, 1)),
        (4, 1 << 40, (None, 2), (2, 2)),
        (4, 1 << 40, (3, None), (3, 1)),
        (4, 1 << 40, (1, None), (1, 4)),
        (4, 0, (None, None), (1, 1)),
        (64, 1 << 40, (None, None), (5, 1)),  # no more workers than pairs
    ],
)
def test_workers_and_threads(tmp_path, monkeypatch, cores, free, asked, expected):
    fixed = header(tmp_path / "f.nii", [10, 10, 10], sitk.sitkInt16)
    pairs = make_pairs([{"fixed": fixed, "moving": fixed, "name": str(n)} for n in range(5)])
    monkeypatch.setattr(plan, "available_cores", lambda: cores)
    monkeypatch.setattr(plan, "available_memory", lambda: free)
    made = plan.make_plan(pairs, check_settings({"device": "cpu"}, ("warped",), "lps"), *asked)
    assert (made.workers, made.threads) == expected


def test_what_starts_workers_does_not_wait_for_torch(tmp_path):
    """Each worker imports torch; the process that starts them need not do so first."""
    torch = pytest.importorskip("torch")
    if torch.version.cuda or torch.version.hip:
        pytest.skip("a torch for GPUs is asked whether there is one")
    path = header(tmp_path / "f.nii", [10, 10, 10], sitk.sitkInt16)
    code = f"""
import sys
from LDRCore.cohort import plan, pool, runner
from LDRCore.cohort.pairs import make_pairs
pairs = make_pairs([{{"fixed": {path!r}, "moving": {path!r}}}])
plan.make_plan(pairs, runner.check_settings({{}}, ("warped",), "lps"), None, None)
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_readable_pair_is_refused_before_the_first(tmp_path):
    pairs = make_pairs([{"fixed": "none.nii", "moving": "nothing.nii"}], folder=tmp_path)
    with pytest.raises(RegistrationError, match="fixed image must be an existing file"):
        plan.make_plan(pairs, check_settings({}, ("warped",), "lps"), None, None)


def test_statistics_against_numpy(tmp_path):
    rng = np.random.default_rng(0)
    warped, determinants = rng.normal(5, 2, (4, 5, 6, 7)), rng.uniform(-0.5, 3, (4, 5, 6, 7))
    for number in range(4):
        folder = tmp_path / store.PAIRS / f"p{number}"
        folder.mkdir(parents=True)
        for name, values in (("warped", warped), ("jacobian_determinant", determinants)):
            image = sitk.GetImageFromArray(values[number].astype(np.float32))
            image.SetOrigin((3, 4, 5))
            sitk.WriteImage(image, str(folder / f"{name}.nii.gz"))
    statistics.write_statistics(tmp_path, [f"p{n}" for n in range(4)])
    logs = np.log(np.maximum(determinants, 0.01))
    for title, values in (("warped", warped), ("log_jacobian", logs)):
        for kind, expected in (("mean", values.mean(0)), ("std", values.std(0, ddof=1))):
            image = sitk.ReadImage(str(tmp_path / "statistics" / f"{title}_{kind}.nii.gz"))
            assert image.GetOrigin() == pytest.approx((3, 4, 5))
            np.testing.assert_allclose(sitk.GetArrayFromImage(image), expected, atol=1e-5)
    assert json.loads((tmp_path / "statistics" / "pairs.json").read_text(encoding="utf-8"))["n"] == 4


def test_statistics_refuse_another_grid(tmp_path):
    for number in range(2):
        folder = tmp_path / store.PAIRS / f"p{number}"
        folder.mkdir(parents=True)
        image = sitk.Image([5, 5, 5], sitk.sitkFloat32)
        image.SetOrigin((number, 0, 0))
        sitk.WriteImage(image, str(folder / "warped.nii.gz"))
    with pytest.raises(RegistrationError, match="on one grid, got another of p1"):
        statistics.write_statistics(tmp_path, ["p0", "p1"])


def test_a_thumbnail_shows_both_images_upright(tmp_path):
    values = np.zeros((40, 40, 40), np.float32)
    values[25:, 10:30, 10:30] = 100  # high in the head
    image = sitk.GetImageFromArray(values)
    thumbnail.write_thumbnail(tmp_path / "t.jpg", image, sitk.Image(image) * 0 + image)
    flipped = sitk.Flip(image, (False, False, True))  # stored from head to feet: the same patient
    thumbnail.write_thumbnail(tmp_path / "f.jpg", flipped, flipped)
    picture, other = (sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"{n}.jpg"))) for n in "tf")
    assert picture.shape == (112, 3 * 112, 3)
    coronal = picture[:, 112:224].astype(int)
    assert coronal[:40, 40:72].min() > 200  # grey where they agree, at the top
    assert coronal[60:].max() < 60
    assert np.abs(picture.astype(int) - other).mean() < 3
    nothing = sitk.Image(image.GetSize(), sitk.sitkFloat32)
    thumbnail.write_thumbnail(tmp_path / "n.jpg", image, nothing)
    red, green, blue = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "n.jpg")))[20, 112 + 56].tolist()
    assert min(red, blue) > 200 > 60 > green


def test_the_table_by_hand(tmp_path):
    pairs = [CohortPair(name, "f", "m") for name in "abc"]
    rows = [{"similarity_after": 0.98765432, "verdict": "trust"}, {"error": "no, not this"}, None]
    table.write_table(tmp_path, pairs, rows)
    with (tmp_path / table.TABLE).open(encoding="utf-8", newline="") as stream:
        read = list(csv.DictReader(stream))
    assert [row["status"] for row in read] == ["done", "failed", "waiting"]
    assert [row["folder"] for row in read] == ["pairs/a", "", ""]
    assert read[0]["similarity_after"] == "0.987654"
    assert read[1]["error"] == "no, not this"


def test_the_worst_come_first():
    rows = [
        {"name": "good", "status": "done", "verdict": "trust", "similarity_after": 0.1},
        {"name": "waits", "status": "waiting"},
        {"name": "doubtful", "status": "done", "verdict": "look", "similarity_after": 0.9},
        {"name": "worse", "status": "done", "verdict": "look", "similarity_after": 0.5},
        {"name": "bad", "status": "done", "verdict": "failed", "similarity_after": 0.7},
        {"name": "none", "status": "failed"},
    ]
    assert [r["name"] for r in sorted(rows, key=page.badness)] == ["none", "bad", "worse", "doubtful", "good", "waits"]


def test_a_page_holds_no_more_than_its_limits(tmp_path, monkeypatch):
    rows = []
    for number in range(5):
        folder = tmp_path / store.PAIRS / str(number)
        folder.mkdir(parents=True)
        (folder / "thumbnail.jpg").write_bytes(bytes(300))  # 400 characters in base64
        rows.append(
            {"name": str(number), "status": "done", "folder": f"pairs/{number}", "similarity_after": number / 5}
        )
    monkeypatch.setattr(page, "PICTURE_BYTES", 900)
    monkeypatch.setattr(page, "MOST_ROWS", 4)
    text = page.make_page(tmp_path, rows)
    assert text.count('type="text/plain"') == 2
    assert "The 4 worst of 5 pairs" in text
    assert "2 pairs have no picture here" in text
    assert math.isclose(json.loads(text.partition('id="data">')[2].partition("</script>")[0])["rows"][0][5], 0.0)


def test_a_page_holds_text_as_text(tmp_path):
    row = {"name": "x", "status": "failed", "error": "</script><script>alert(1)</script>", "folder": ""}
    assert page.make_page(tmp_path, [row]).count("</script>") == 2
