"""Draws the tutorial's pictures, the panel and the slice views of one registration, and the sample data's thumbnail.

python -m Testing.standin.pictures docs
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from Testing.standin import application, sliceview, widgets

VIEW, WIDTH = 340, 440
OFFSETS_MM = {"Red": 17.5, "Green": -15.0, "Yellow": -1.8}  # of the slices: through the ventricles
BAR = 20
BARS = {"Red": ("#f34a33", "R  axial"), "Green": ("#6eb04b", "G  coronal"), "Yellow": ("#edd54c", "Y  sagittal")}
FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def views_picture(views: dict[str, Any], across: bool = True) -> Image.Image:
    """The three slice views with their coloured bars, beside or below each other."""
    tiles = []
    for name, view in views.items():
        tile = Image.new("RGB", (VIEW, VIEW + BAR), BARS[name][0])
        draw = ImageDraw.Draw(tile)
        draw.text((6, 3), BARS[name][1], fill="black", font=ImageFont.truetype(str(FONT), 12))
        tile.paste(Image.fromarray(view.picture()), (0, BAR))
        tiles.append(tile)
    gap = 4
    width = len(tiles) * VIEW + (len(tiles) - 1) * gap if across else VIEW
    height = VIEW + BAR if across else len(tiles) * (VIEW + BAR) + (len(tiles) - 1) * gap
    whole = Image.new("RGB", (width, height), "white")
    for n, tile in enumerate(tiles):
        whole.paste(tile, (n * (VIEW + gap), 0) if across else (0, n * (VIEW + BAR + gap)))
    return whole


def window_picture(widget: Any) -> Image.Image:
    """The panel's window, as high as what it holds."""
    import qt

    parent = widget.parent
    for _ in range(3):
        qt.QApplication.processEvents()
        parent.resize(WIDTH, parent.layout().totalHeightForWidth(WIDTH))
    pixels = parent.grab().toImage().convertToFormat(qt.QImage.Format.Format_RGB888)
    rows = np.frombuffer(pixels.constBits(), np.uint8).reshape(pixels.height(), pixels.bytesPerLine())
    return Image.fromarray(rows[:, : 3 * pixels.width()].reshape(pixels.height(), pixels.width(), 3).copy())


def beside(*pictures: Image.Image, gap: int = 12) -> Image.Image:
    """Pictures beside each other, tops aligned."""
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    whole = Image.new("RGB", (width, max(p.height for p in pictures)), "white")
    x = 0
    for picture in pictures:
        whole.paste(picture, (x, 0))
        x += picture.width + gap
    return whole


def save(picture: Image.Image, path: Path) -> None:
    """A small PNG: all colours where they matter, a palette where the picture is mostly grey.

    The palette covers rare colours as well: one by frequency turned the verdict's green into a grey blue.
    """
    saturation = np.asarray(picture.convert("HSV"))[..., 1]
    grey = (saturation > 60).mean() < 0.1
    palette = picture.quantize(method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    (palette if grey else picture).save(path, optimize=True)
    print(f"{path} {picture.width} x {picture.height}, {path.stat().st_size // 1000} kB")


def wait(widget: Any) -> None:
    """Until the panel's job is done and what is displayed is computed."""
    import qt

    while widget.panel.job is not None or widget.panel.display.busy:
        qt.QApplication.processEvents()
        time.sleep(0.01)


def main() -> None:
    """Draw everything."""
    import slicer

    target = Path(sys.argv[1])
    application.start()
    widgets.start()
    import qt

    module = application.module()
    application.clear()
    sliceview.add_views()
    from LightweightRegistrationLib.parameters import Overlay

    widget = module.LightweightRegistrationWidget()
    ui = widget.ui
    empty = window_picture(widget)
    ui.tryItButton.click()
    views = {name: sliceview.SliceView(name, VIEW, VIEW) for name in ("Red", "Green", "Yellow")}
    for name, view in views.items():
        view.fit()
        view.logic.SetSliceOffset(OFFSETS_MM[name])
    loaded = window_picture(widget)
    save(beside(empty, loaded), target / "slicer-panel-inputs.png")
    save(views_picture(views), target / "slicer-before.png")
    thumbnail = Image.fromarray(views["Red"].picture()).resize((260, 260), Image.Resampling.LANCZOS)
    save(
        thumbnail.crop((0, -10, 260, 270)),
        application.MODULE / "Resources" / "Icons" / "LightweightRegistrationSample.png",
    )
    widget._parameterNode.wantJacobian = True
    for _ in range(2):  # the second time torch and the weights are there: what a user sees from then on
        ui.applyButton.click()
        wait(widget)
    p = widget._parameterNode
    save(views_picture(views), target / "slicer-warped.png")
    save(beside(window_picture(widget), views_picture(views, across=False)), target / "slicer-overview.png")
    p.fade, p.showGrid = 1.0, True
    save(views_picture(views), target / "slicer-grid.png")
    p.fade, p.showGrid, p.overlay = 0.6, False, Overlay.jacobian
    wait(widget)
    save(views_picture(views), target / "slicer-jacobian.png")
    p.overlay, p.fade = Overlay.warped, 0.5
    for name, kind in (("Brain B segmentation", "Segmentation"), ("Brain B landmarks", "MarkupsFiducial")):
        node = slicer.mrmlScene.AddNewNodeByClass(f"vtkMRML{kind}Node", name)
        ui.othersList.findItems(node.GetName(), qt.Qt.MatchExactly)[0].setCheckState(qt.Qt.Checked)
    for button in ("inputs", "model", "outputs", "results", "display"):
        getattr(ui, f"{button}CollapsibleButton").collapsed = True
    for button in ("masks", "advanced", "others", "files", "sequence", "batch"):
        getattr(ui, f"{button}CollapsibleButton").collapsed = False
    save(window_picture(widget), target / "slicer-panel-more.png")
    for view in views.values():
        view.close()
    widget.cleanup()


if __name__ == "__main__":
    main()
