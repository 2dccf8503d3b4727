"""The pages in a real headless Chromium: no network, a thousand pairs, ratings; a result in NiiVue, pixels compared."""

from __future__ import annotations

import csv
import http.client
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

import LDRCore
from LDRCore import RegistrationError, cli, geometry
from LDRCore.cohort import page as cohort_page
from LDRCore.cohort import thumbnail
from LDRCore.viewer import page, server, volumes
from Testing.browser import Watched, open_browser

FIRST_PAINT_MS = 2000  # of the best of some tries: .2 s on an idle machine, .6 s on one with eight times its work


@pytest.fixture
def thousand(tmp_path, blob) -> Path:
    """A cohort's page of 1,000 pairs with pictures; p0007 failed, p0500 is the least similar."""
    picture = tmp_path / "picture.jpg"
    noise = np.random.default_rng(0).integers(0, 300, blob.GetSize()[::-1]).astype(np.int16)
    noisy = sitk.GetImageFromArray(sitk.GetArrayFromImage(blob) + noise)
    noisy.CopyInformation(blob)
    thumbnail.write_thumbnail(picture, blob, noisy)
    rows = []
    for number in range(1000):
        name = f"p{number:04}"
        folder = tmp_path / "pairs" / name
        folder.mkdir(parents=True)
        (folder / "thumbnail.jpg").write_bytes(picture.read_bytes())
        row = {"name": name, "status": "done", "folder": f"pairs/{name}", "verdict": "trust", "reasons": ""}
        row |= {"similarity_after": 0.9 - number * 1e-4, "folding_fraction": 0.0, "jacobian_min": 0.5}
        rows.append(row | {"jacobian_max": 2.0})
    rows[7] |= {
        "status": "failed",
        "error": "moving image must be <b>whole</b>",
        "folder": "",
        "similarity_after": None,
    }
    rows[500] |= {"verdict": "look", "reasons": "they correlate little", "similarity_after": 0.2}
    cohort_page.write_page(tmp_path, rows)
    return tmp_path / "index.html"


def paints_ms(shown):
    """Times to the first paint, until one is short enough or it was tried five times."""
    for _ in range(5):
        script = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? Infinity"
        shown.wait_for_timeout(100)
        time = shown.evaluate(script)
        yield time
        if time < FIRST_PAINT_MS:
            return
        shown.reload()


def test_a_page_of_a_thousand_pairs(thousand, tmp_path):
    assert thousand.stat().st_size < 50e6
    with open_browser() as browser:
        watched = Watched(browser, accept_downloads=True)
        shown = watched.open(thousand)
        rows = shown.locator("tbody tr")
        assert rows.first.get_attribute("data-name") == "p0007"  # the worst first
        assert rows.first.locator(".failed").inner_text() == "no result"
        assert "moving image must be <b>whole</b>" in rows.first.inner_text()
        assert rows.nth(1).get_attribute("data-name") == "p0500"
        assert "1000 of 1000 shown, 0 rated" in shown.locator("#shown").inner_text()
        shown.wait_for_function("[...document.images].some(image => image.naturalWidth === 336)")
        assert shown.evaluate("[...document.images].filter(image => image.src).length") < 100  # the others wait
        assert min(paints_ms(shown)) < FIRST_PAINT_MS

        shown.get_by_role("button", name="similarity").click()
        assert rows.first.get_attribute("data-name") == "p0500"
        shown.get_by_role("button", name="similarity").click()
        assert rows.first.get_attribute("data-name") == "p0000"
        shown.locator("#search").fill("correlate")
        assert rows.count() == 1
        shown.locator("#search").fill("")
        shown.locator("#verdict").select_option("no result")
        assert rows.count() == 1
        shown.locator("#verdict").select_option("")

        shown.locator("#rater").fill('Dr "A"')
        shown.locator('tr[data-name="p0000"]').get_by_role("button", name="accept").click()
        shown.locator('tr[data-name="p0001"]').press("R")
        assert shown.evaluate("document.activeElement.dataset.name") == "p0002"  # the next one
        shown.locator("#rated").select_option("reject")
        assert [rows.count(), rows.first.get_attribute("data-name")] == [1, "p0001"]
        with shown.expect_download() as download:
            shown.get_by_role("button", name="Export").click()
        download.value.save_as(tmp_path / "ratings.csv")
        with (tmp_path / "ratings.csv").open(encoding="utf-8", newline="") as stream:
            read = {row["name"]: row for row in csv.DictReader(stream)}
        assert {name: row["rating"] for name, row in read.items()} == {"p0000": "accept", "p0001": "reject"}
        assert read["p0000"]["rater"] == 'Dr "A"'
        shown.reload()
        assert "2 rated" in shown.locator("#shown").inner_text()  # kept by this browser
        assert {url.partition(":")[0] for url in watched.requests} <= {"file", "data", "blob"}
        assert watched.errors == []


def test_a_pair_is_judged_without_a_mouse(thousand):
    """Arrows, ratings, the enlarged picture; nothing that a rater needs is cut off at 1200 pixels."""
    with open_browser() as browser:
        shown = Watched(browser).open(thousand)

        def current() -> str:
            return shown.evaluate("document.activeElement.dataset.name")

        assert current() == "p0007"
        shown.keyboard.press("ArrowDown")
        assert current() == "p0500"
        shown.keyboard.press("e")
        large = shown.locator("#large")
        assert large.locator("span").inner_text() == "p0500"
        shown.wait_for_function("document.querySelector('#large img').naturalWidth === 336")
        for _ in range(8):  # the row stays in sight above its picture
            shown.keyboard.press("a")
            row = shown.locator(f'tr[data-name="{current()}"]').bounding_box()
            assert row["y"] + row["height"] <= large.bounding_box()["y"]
        assert "8 rated" in shown.locator("#shown").inner_text()
        shown.keyboard.press("Escape")
        assert large.is_hidden()
        shown.locator("#search").press("r")  # a letter of a filter is no rating
        assert "8 rated" in shown.locator("#shown").inner_text()
        assert shown.evaluate(
            "document.querySelector('main').scrollWidth <= document.querySelector('main').clientWidth"
        )
        shown.get_by_role("button", name="folding").click()
        assert shown.evaluate("document.querySelector('main').scrollTop") == 0  # the first of the new order


def test_long_reasons_do_not_hide_the_pictures(tmp_path):
    row = {"name": "x", "status": "done", "verdict": "look", "reasons": "the images agree badly; " * 40, "folder": "x"}
    cohort_page.write_page(
        tmp_path, [row | {"similarity_after": 0.5, "jacobian_min": 0.0003, "folding_fraction": 1e-7}]
    )
    with open_browser() as browser:
        shown = Watched(browser).open(tmp_path / "index.html")
        height = shown.locator("tbody tr").bounding_box()["height"]
        assert height < 150
        shown.locator(".reasons").click()
        assert shown.locator("tbody tr").bounding_box()["height"] > height
        text = shown.locator("tbody tr").inner_text()
        assert "0.0003" in text  # is not 0, which would fold
        assert "< 0.001 %" in text


def test_a_rating_of_an_earlier_result_does_not_count(tmp_path):
    row = {"name": "x", "status": "done", "verdict": "trust", "reasons": "", "similarity_after": 0.5, "folder": "x"}
    cohort_page.write_page(tmp_path, [row])
    with open_browser() as browser:
        shown = Watched(browser).open(tmp_path / "index.html")
        shown.keyboard.press("a")
        shown.reload()
        assert "1 rated" in shown.locator("#shown").inner_text()
        cohort_page.write_page(tmp_path, [row | {"similarity_after": 0.6}])
        shown.reload()
        assert "0 rated" in shown.locator("#shown").inner_text()


@pytest.fixture
def result(tmp_path, blob) -> Path:
    """A result folder as the command line writes it: the moving image is the fixed one, 12 mm to the left."""
    moving = sitk.Image(blob)
    moving.SetOrigin((12.0, 0.0, 0.0))
    for name, image in (("fixed", blob), ("moving", moving)):
        sitk.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
    folder = tmp_path / "result"
    shift = sitk.TranslationTransform(3, (12.0, 0.0, 0.0))
    facts = {"inputs": {name: str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving")}}
    facts |= {"similarity": {"before": 0.25, "after": 1.0}, "warnings": ["look <b>twice</b>"]}
    LDRCore.RegistrationResult(blob, shift, shift, None, facts).save(folder)
    return folder


def decoded(data: bytes, path: Path) -> sitk.Image:
    path.write_bytes(data)
    return sitk.ReadImage(str(path))


def test_volumes_are_whole_nifti_files_on_the_fixed_grid(result, tmp_path, blob):
    viewed = volumes.read_result(result, None, None)
    assert viewed.title == "moving.nii.gz onto fixed.nii.gz"
    assert viewed.facts[0] == "correlation 0.250 before, 1.000 after"
    images = {name: decoded(data, tmp_path / f"{name}.nii.gz") for name, data in viewed.volumes.items()}
    for name, image in images.items():
        assert image.GetSize() == blob.GetSize(), name
        np.testing.assert_allclose(geometry.corners_lps(image), geometry.corners_lps(blob), atol=1e-4)
    low, high = np.percentile(sitk.GetArrayFromImage(blob), (1, 99.7))
    fixed = np.clip(sitk.GetArrayFromImage(blob), low, high)
    for name in ("fixed", "warped"):
        off = np.abs(sitk.GetArrayFromImage(images[name]) - fixed)
        assert off.max() <= (high - low) / 255
    moving = sitk.GetArrayFromImage(images["moving"])
    assert np.abs(moving[:, :, 4:] - fixed[:, :, :-4]).max() <= (high - low) / 255  # 12 mm are 4 voxels
    np.testing.assert_allclose(sitk.GetArrayFromImage(images["jacobian"]), 1, atol=1 / 255)
    # without deformation, lines are straight planes of the fixed grid: of 3 mm voxels those within 1.5 mm of 10 n mm
    near = [min((3 * n) % 10, -(3 * n) % 10) < 1.5 for n in range(max(blob.GetSize()))]
    grid = sitk.GetArrayFromImage(images["grid"])
    k, j, i = np.meshgrid(*[np.array(near, int)[:n] for n in grid.shape], indexing="ij")
    assert (np.rint(grid / 128) == np.minimum(k + j + i, 2)).mean() > 0.99


def test_an_oblique_grid_keeps_its_place(tmp_path, blob):
    blob.SetDirection((0.8, 0.6, 0, -0.6, 0.8, 0, 0, 0, -1))
    image = decoded(volumes._encode(sitk.GetArrayFromImage(blob), blob, (0, 1020)), tmp_path / "x.nii.gz")
    np.testing.assert_allclose(geometry.corners_lps(image), geometry.corners_lps(blob), atol=1e-3)
    np.testing.assert_allclose(sitk.GetArrayFromImage(image), sitk.GetArrayFromImage(blob), atol=2.01)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("report", "a result must be a folder with report.json"),
        ("inputs", "the report must name its images, got none in .*: give --fixed"),
        ("moving", "moving image must be an existing file"),
    ],
)
def test_results_that_cannot_be_shown(result, tmp_path, harm, message):
    report = json.loads((result / "report.json").read_text(encoding="utf-8"))
    if harm == "report":
        (result / "report.json").unlink()
    if harm == "inputs":
        del report["inputs"]
        (result / "report.json").write_text(json.dumps(report), encoding="utf-8")
    if harm == "moving":
        (tmp_path / "moving.nii.gz").unlink()
    with pytest.raises(RegistrationError, match=message):
        volumes.read_result(result, None, None)


def test_a_missing_viewer_is_one_sentence_before_any_work(result, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["view", str(result), "--save", str(tmp_path / "p.html")]) == 2
    assert "pip install 'LDRCore[view]'" in capsys.readouterr().err
    images = [str(tmp_path / f"{name}.nii.gz") for name in ("fixed", "moving")]
    assert cli.main(["register", *images, "--out", str(tmp_path / "o"), "--open", "--no-overview"]) == 2
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("file", ["moving.nii.gz", "result/report.json", "result/transform.h5"])
def test_a_saved_page_replaces_nothing_that_it_shows(result, tmp_path, monkeypatch, capsys, file):
    monkeypatch.setattr(page, "niivue_script", lambda: "")
    before = (tmp_path / file).read_bytes()
    assert cli.main(["view", str(result), "--save", str(tmp_path / file), "--overwrite"]) == 2
    assert "must not replace an input" in capsys.readouterr().err
    assert (tmp_path / file).read_bytes() == before


def test_the_server_answers_only_who_knows_its_name():
    with server.PageServer("<p>hello</p>") as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        try:
            assert one.server_address[0] == "127.0.0.1"

            def ask(path: str, **headers: str) -> tuple[int, bytes]:
                connection = http.client.HTTPConnection("127.0.0.1", one.server_port, timeout=60)
                connection.request("GET", path, headers=headers)
                answer = connection.getresponse()
                body = answer.read()
                connection.close()
                return answer.status, body

            assert ask(one.path) == (200, b"<p>hello</p>")
            assert len(one.path) > 30
            for path, headers in (("/", {}), (one.path + "x", {}), (one.path, {"Host": "evil.example"})):
                status, body = ask(path, **headers)
                assert status == 404
                assert b"hello" not in body
        finally:
            one.shutdown()


def pixels(shown, path: Path) -> np.ndarray:
    """What the canvas shows, (rows, columns) in grey."""
    shown.locator("canvas").screenshot(path=str(path))
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[..., :3].astype(float)


@pytest.mark.parametrize("served", [False, True], ids=["file", "server"])
def test_a_result_in_the_browser(result, tmp_path, served):
    pytest.importorskip("ipyniivue", reason="needs the extra view (make test installs it)")
    saved = tmp_path / "page.html"
    assert cli.main(["view", str(result), "--save", str(saved)]) == 0
    one = server.PageServer(saved.read_text(encoding="utf-8"))
    threading.Thread(target=one.serve_forever, daemon=True).start()
    try:
        with open_browser() as browser:
            watched = Watched(browser)
            shown = watched.open(one.url if served else saved)
            shown.wait_for_selector("body[data-ready]", state="attached", timeout=300_000)
            assert shown.locator("#problem").inner_text() == ""
            assert "look <b>twice</b>" in shown.locator("footer").inner_text()
            assert "mm" in shown.locator("#location").inner_text()

            def view(**controls: str | bool) -> np.ndarray:
                for name, value in controls.items():
                    if isinstance(value, bool):
                        shown.locator(f"#{name}").set_checked(value)
                    else:
                        shown.locator(f"#{name}").fill(value)
                shown.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
                return pixels(shown, tmp_path / "view.png")

            after = view(time="1", side="1")
            fixed = view(side="0")
            before = view(time="0", side="1")
            assert fixed.max() > 150
            assert np.abs(after - fixed).mean() < 2  # the shift was undone
            assert np.abs(before - fixed).mean() > 5  # and is seen before
            assert shown.locator("#shown").inner_text() == "shown: moving as scanned"
            plain = view(time="1", jacobian=True)
            assert shown.locator("#legend").is_visible()
            assert np.abs(plain - after).mean() < 2  # volume is kept: no colour
            shown.keyboard.press("j")
            assert shown.locator("#legend").is_hidden()
            lines = view(jacobian=False, grid=True)
            assert np.abs(lines - after).mean() > 2
            place = shown.locator("#location").inner_text()
            shown.locator("canvas").click(position={"x": 220, "y": 300})
            shown.wait_for_function("text => document.getElementById('location').textContent !== text", arg=place)
            outside = [url for url in watched.requests if url.partition(":")[0] not in ("file", "data", "blob")]
            assert outside == ([one.url] if served else [])
            assert watched.errors == []
    finally:
        one.shutdown()
        one.server_close()


def test_sides_millimetres_and_colours_of_the_viewer(tmp_path, blob):
    """A marker on the patient's left is on the right of the picture, at its own millimetres; a scaling is coloured."""
    pytest.importorskip("ipyniivue", reason="needs the extra view (make test installs it)")
    values = np.zeros(blob.GetSize()[::-1], np.float32)
    depth, height, width = values.shape
    first = depth // 2 - 3, height // 4 - 3, 3 * width // 4 - 3
    values[tuple(slice(n, n + 6) for n in first)] = 100
    fixed = sitk.GetImageFromArray(values)
    fixed.SetSpacing(blob.GetSpacing())
    fixed.SetOrigin((-20.0, -30.0, -40.0))
    marker_lps = fixed.TransformContinuousIndexToPhysicalPoint([n + 2.5 for n in first[::-1]])
    sitk.WriteImage(fixed, str(tmp_path / "fixed.nii.gz"))
    stretch = sitk.AffineTransform(3)
    stretch.SetCenter(marker_lps)
    stretch.Scale((1.0, 1.0, 1.5))  # fixed to moving: larger there
    facts = {"inputs": dict.fromkeys(("fixed", "moving"), str(tmp_path / "fixed.nii.gz"))}
    LDRCore.RegistrationResult(fixed, stretch, stretch, None, facts).save(tmp_path / "result")
    assert cli.main(["view", str(tmp_path / "result"), "--save", str(tmp_path / "page.html")]) == 0
    with open_browser() as browser:
        shown = Watched(browser).open(tmp_path / "page.html")
        shown.wait_for_selector("body[data-ready]", state="attached", timeout=300_000)
        shown.keyboard.press("f")  # the fixed image
        shown.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        bright = sitk.GetImageFromArray((pixels(shown, tmp_path / "v.png").min(-1) > 200).astype(np.uint8))
        marker = sitk.GetArrayFromImage(sitk.RelabelComponent(sitk.ConnectedComponent(bright))) == 1
        row, column = np.argwhere(marker).mean(0)
        canvas = shown.locator("canvas")
        canvas.click(position={"x": column, "y": row})
        shown.wait_for_function("document.getElementById('location').textContent.includes('1.50')")
        location = shown.locator("#location").inner_text()
        places = {part[0]: float(part.split()[1]) for part in location.split(", ")[:3]}
        wanted = {"RL"[marker_lps[0] > 0]: abs(marker_lps[0]), "AP"[marker_lps[1] > 0]: abs(marker_lps[1])}
        wanted |= {"IS"[marker_lps[2] > 0]: abs(marker_lps[2])}
        assert places == pytest.approx(wanted, abs=2.0)  # a pixel of the screen is smaller
        box = canvas.bounding_box()
        assert marker_lps[0] > fixed.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in fixed.GetSize()])[0]
        assert column > box["width"] / 6  # right of the middle of the first of three panels
        shown.keyboard.press("j")
        shown.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        red, green, blue = pixels(shown, tmp_path / "j.png")[int(row) + 9, int(column) + 9]
        assert red > green == pytest.approx(blue, abs=3)
