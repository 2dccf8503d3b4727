"""The worker process: registers and warps with LDRCore. It reads requests from stdin and appends events to a file.

Slicer's own process never imports torch and never waits: it can end this one at any moment, and running out of memory
here leaves the scene as it is. Started as ``python worker.py SESSION_FOLDER LIBRARY_FOLDER``. Each line on stdin is a
JSON request that names a folder with .npy arrays, or a request to warm up. Events are JSON lines in `events.jsonl` of
that folder; the last one is "done" or "error". The process ends when stdin is closed (Slicer ended), after an idle
minute, or when the file `wanted` is removed (cancelled: a kill may only reach the launcher of Slicer's Python). The
folder of a run is there before its request arrives and until its results are read: meanwhile the process is not idle.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

IDLE_S = 60.0  # then the process ends and gives its memory back
WATCH_S = 0.2
TOUCH_EVERY = 300  # turns of the watch: a minute
WANTED = "wanted"  # the file in the session folder that must stay
EARLY_SPACING_MM = 4.0  # of the early, coarse field
_default_threads: list[int] = []  # of torch and SimpleITK


class IdleTime:
    """How long the process has had nothing to do.

    Attributes:
        since_s: when it began, by the monotonic clock; None while a request is handled.
    """

    def __init__(self, session: Path):
        self._session = session
        self.since_s: float | None = time.monotonic()

    def is_over(self) -> bool:
        """Return whether it has lasted for `IDLE_S`; it begins anew where a run is being sent or read."""
        since_s = self.since_s  # the main thread may change it meanwhile
        if since_s is None or time.monotonic() - since_s < IDLE_S:
            return False
        if any(self._session.glob("run*")):
            self.since_s = time.monotonic()
            return False
        return True


class Answer:
    """Arrays and events of one request."""

    def __init__(self, folder: Path):
        self.folder = folder

    def event(self, event: str, **facts: Any) -> None:
        """Append one event as a line."""
        with (self.folder / "events.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"event": event, **facts}) + "\n")

    def load(self, name: str) -> Any:
        """Load an array of the request."""
        import numpy as np

        return np.load(self.folder / name, mmap_mode="r")

    def save(self, name: str, values: Any) -> str:
        """Write an array for the reader and return its file name."""
        import numpy as np

        np.save(self.folder / name, values)
        return name


def image_of(answer: Answer, item: dict[str, Any]) -> Any:
    """Convert {"values", "to_world"} to a sitk.Image."""
    import numpy as np

    from LDRCore.io import images

    values = np.asarray(answer.load(item["values"]))
    return images.read((values.T, np.array(item["to_world"])), "image")


def transform_of(answer: Answer, given: dict[str, Any]) -> Any:
    """Convert {"matrix_lps"} or {"vectors", "to_lps"} to a sitk.Transform."""
    import numpy as np
    import SimpleITK as sitk

    from LDRCore import geometry

    if "matrix_lps" in given:
        return geometry.affine_transform(np.array(given["matrix_lps"]))
    to_lps = np.array(given["to_lps"])
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    field = sitk.GetImageFromArray(np.asarray(answer.load(given["vectors"]), dtype=np.float64), isVector=True)
    field.SetSpacing(spacing.tolist())
    field.SetDirection((to_lps[:3, :3] / spacing).ravel().tolist())
    field.SetOrigin(to_lps[:3, 3].tolist())
    return sitk.DisplacementFieldTransform(field)


def field_facts(answer: Answer, name: str, field: Any) -> dict[str, Any]:
    """Write a displacement field image and return {"vectors", "to_lps"}."""
    import SimpleITK as sitk

    from LDRCore import geometry

    to_lps = geometry.index_to_lps(field)[:, [2, 1, 0, 3]]
    return {"vectors": answer.save(name, sitk.GetArrayViewFromImage(field)), "to_lps": to_lps.tolist()}


def transform_facts(answer: Answer, name: str, transform: Any, fixed: Any, moving: Any) -> dict[str, Any]:
    """Return {"matrix_lps"} of a linear transform, else write a field that covers its images, as `field_facts`."""
    from LDRCore import geometry

    matrix = geometry.linear_matrix(transform)
    if matrix is not None:
        return {"matrix_lps": matrix.tolist()}
    return field_facts(answer, name, geometry.covering_field_image(transform, fixed, moving))


def register(answer: Answer, request: dict[str, Any]) -> None:
    """Register two images. Events: progress, field (early, coarse), done."""
    import SimpleITK as sitk

    import LDRCore
    from LDRCore import geometry

    fixed, moving = (image_of(answer, request[name]) for name in ("fixed", "moving"))
    masks = {}
    for name in ("fixed", "moving"):
        if request.get(f"{name}_mask"):
            masks[f"{name}_mask"] = image_of(answer, {**request[name], "values": request[f"{name}_mask"]})
    initial = request["initial"]
    if isinstance(initial, dict):
        initial = transform_of(answer, initial)

    def early(transform: Any) -> None:
        if request["early"]:
            field = geometry.covering_field_image(transform, fixed, moving, EARLY_SPACING_MM)
            answer.event("field", field=field_facts(answer, "early.npy", field))

    result = LDRCore.register(
        fixed,
        moving,
        **request["options"],
        initial=initial,
        inverse=request["inverse"],
        progress=lambda fraction, message: answer.event("progress", fraction=0.75 * fraction, message=message),
        on_transform=early,
        **masks,
    )
    facts: dict[str, Any] = {}
    if request["warped"]:
        facts["warped"] = answer.save("warped.npy", sitk.GetArrayViewFromImage(result.warped))
    if request["transform"]:
        answer.event("progress", fraction=0.75, message="writing the transform")
        facts["transform"] = transform_facts(answer, "transform.npy", result.transform, fixed, moving)
    if request["jacobian"]:
        answer.event("progress", fraction=0.85, message="computing the Jacobian map")
        facts["jacobian"] = answer.save("jacobian.npy", sitk.GetArrayViewFromImage(result.jacobian_determinant))
    if result.inverse_transform is not None:
        answer.event("progress", fraction=0.95, message="writing the inverse")
        facts["inverse"] = transform_facts(answer, "inverse.npy", result.inverse_transform, moving, fixed)
    answer.event("done", report=result.report, **facts)


def grid_of(item: dict[str, Any]) -> Any:
    """Return an image on the grid of {"shape", "to_world"}, of zeros."""
    import numpy as np

    from LDRCore.io import images

    k, j, i = item["shape"]
    return images.read((np.broadcast_to(np.uint8(0), (i, j, k)), np.array(item["to_world"])), "reference")


def write_transform(answer: Answer, request: dict[str, Any]) -> None:
    """Write a transform in the format of another program. Event: done."""
    from LDRCore.io import transforms

    fixed, moving = (grid_of(request[name]) for name in ("fixed", "moving"))
    transform = transform_of(answer, request["transform"])
    transforms.write(transform, request["path"], request["format"], fixed=fixed, moving=moving)
    answer.event("done")


def read_transform(answer: Answer, request: dict[str, Any]) -> None:
    """Read a transform in the format of another program. Event: done."""
    from LDRCore.io import transforms

    fixed, moving = (grid_of(request[name]) for name in ("fixed", "moving"))
    context = transforms.Context(fixed, moving)
    transform = transforms.read_transform(request["path"], format_name=request["format"], context=context)
    answer.event("done", transform=transform_facts(answer, "transform.npy", transform, fixed, moving))


def register_many(answer: Answer, request: dict[str, Any]) -> None:
    """Register a list of pairs of files into one folder. Events: progress, done."""
    from LDRCore.cohort import page, runner

    pairs = request.get("list") or request.get("rows") or pairs_of_folders(*map(Path, request["folders"]))
    summary = runner.register_many(
        pairs,
        request["out"],
        workers=request["workers"],
        progress=lambda fraction, message: answer.event("progress", fraction=fraction, message=message),
        **request["options"],
    )
    del summary["pairs"]  # the table holds them
    answer.event("done", summary={**summary, "page": str(Path(request["out"]) / page.PAGE)})


def pairs_of_folders(fixed: Path, moving: Path) -> list[dict[str, str]]:
    """Pair the images of two folders by their names without suffix; a single fixed image is paired with all.

    Raises:
        RegistrationError: a folder without images, or a moving image without a fixed one.
    """
    from LDRCore.cohort.pairs import IMAGE_SUFFIXES, stem
    from LDRCore.errors import RegistrationError

    files = []
    for folder in (fixed, moving):
        found = sorted(p for p in folder.glob("*") if p.is_file() and p.name.lower().endswith(IMAGE_SUFFIXES))
        if not found:
            raise RegistrationError(f"a folder of images must hold some, got none in {folder}")
        files.append(found)
    if len(files[0]) == 1:
        return [{"fixed": str(files[0][0]), "moving": str(path)} for path in files[1]]
    by_name = {stem(path.name): str(path) for path in files[0]}
    alone = next((path.name for path in files[1] if stem(path.name) not in by_name), None)
    if alone is not None:
        raise RegistrationError(f"every moving image must have a fixed one of the same name, got none for {alone}")
    return [{"fixed": by_name[stem(path.name)], "moving": str(path)} for path in files[1]]


def warp(answer: Answer, request: dict[str, Any]) -> None:
    """Warp images through a transform, or through its inverse. Events: progress, done."""
    import SimpleITK as sitk

    from LDRCore import registration
    from LDRCore.transforms import inversion

    transform = transform_of(answer, request["transform"])
    residual_mm = None
    if request["inverse"]:
        answer.event("progress", fraction=0.1, message="inverting the transform")
        transform, consistency = inversion.invert_transform(transform, grid_of(request["fixed"]))
        residual_mm = consistency.p99_9
    reference = grid_of(request["reference"])
    names = []
    for n, item in enumerate(request["items"]):
        answer.event("progress", fraction=0.5 + 0.5 * n / len(request["items"]), message="resampling")
        warped = registration.warp_image(image_of(answer, item), transform, reference, item["interpolation"])
        names.append(answer.save(f"warped{n}.npy", sitk.GetArrayViewFromImage(warped)))
    answer.event("done", items=names, residual_mm=residual_mm)


def warm_up(request: dict[str, Any]) -> None:
    """Import everything, load the model and register two small synthetic images, so that the first run is fast."""
    import numpy as np

    import LDRCore
    from LDRCore.pipeline.options import every_cascade

    k, j, i = np.ogrid[-1:1:48j, -1:1:48j, -1:1:48j]
    ball = (k * k + j * j + i * i < 0.6) * (2.0 + k)
    grid = np.diag([4.0, 4.0, 4.0, 1.0])
    cascades = min(1, every_cascade(request["model"]))
    options = {"model": request["model"], "cascades": cascades, "device": request["device"]}
    LDRCore.register((ball, grid), (ball[::-1], grid), **options)


def use_threads(count: int) -> None:
    """Set the number of threads of torch and SimpleITK; 0 sets their defaults (the processor's cores)."""
    import SimpleITK as sitk
    import torch

    if not _default_threads:
        _default_threads.extend((torch.get_num_threads(), sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()))
    torch_threads, sitk_threads = (count, count) if count else _default_threads
    if torch.get_num_threads() != torch_threads:
        torch.set_num_threads(torch_threads)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(sitk_threads)


def is_about_memory(error: BaseException) -> bool:
    """Return whether an exception reports a lack of memory (Python, torch on CPU or GPU, ITK)."""
    text = str(error).lower()
    phrases = (
        "out of memory",
        "not enough memory",
        "allocate memory",
        "bad_alloc",
        "failed to allocate",
        "failed to map segment",
        "could not create a primitive",  # what oneDNN says
    )
    return isinstance(error, MemoryError) or any(phrase in text for phrase in phrases)


ACTIONS = {
    "register": register,
    "register many": register_many,
    "warp": warp,
    "write transform": write_transform,
    "read transform": read_transform,
}


def serve(request: dict[str, Any]) -> None:
    """Handle one request. A failure becomes an event; a failed warm-up is only printed."""
    if request["do"] == "warm up":
        try:
            use_threads(request["threads"])
            warm_up(request)
        except Exception:
            traceback.print_exc()
        return
    answer = Answer(Path(request["folder"]))
    try:
        from LDRCore.errors import RegistrationError

        try:
            use_threads(request.get("threads", 0))
            ACTIONS[request["do"]](answer, request)
        except RegistrationError as error:
            answer.event("error", kind="input", message=str(error))
    except Exception as error:
        traceback.print_exc()
        log = traceback.format_exc()
        if is_about_memory(error):
            answer.event("error", kind="memory")
        elif isinstance(error, ImportError):
            answer.event("error", kind="setup", message=str(error), log=log)
        else:
            answer.event("error", kind="unexpected", message=f"{type(error).__name__}: {error}", log=log)


def main() -> None:
    """Serve requests until stdin is closed, then remove the session folder."""
    session, library = Path(sys.argv[1]), sys.argv[2]
    sys.path[0] = library  # instead of this file's folder, whose names could hide other modules
    set_up_process()
    idle = IdleTime(session)
    threading.Thread(target=watch, args=(session, idle), daemon=True).start()
    try:
        while line := sys.stdin.readline():
            idle.since_s = None
            serve(json.loads(line))
            idle.since_s = time.monotonic()
    finally:
        shutil.rmtree(session, ignore_errors=True)


def set_up_process() -> None:
    """Keep freed memory for the next run, and let idle threads sleep early: before torch is imported."""
    try:
        from LDRCore.cpu import memory, waiting
    except ImportError:  # the first request reports it
        return
    waiting.limit_spinning()
    memory.keep_freed_blocks()


def watch(session: Path, idle: IdleTime) -> None:
    """End the process when it has been idle, and, whatever it is doing, when the file `wanted` is gone."""
    turns = 0
    while (session / WANTED).exists() and not idle.is_over():
        time.sleep(WATCH_S)
        turns += 1
        if turns % TOUCH_EVERY == 0:
            with contextlib.suppress(OSError):
                os.utime(session / WANTED)  # says that this session is alive
    exit_process(session)


def exit_process(session: Path) -> None:
    """End the process from another thread than the main one."""
    shutil.rmtree(session, ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
