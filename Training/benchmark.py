r"""Time everything against everything in one run: networks, warps, cascades, registration end to end, other programs.

    python -m Training.benchmark --peer-python PYTHON --out runs/benchmark.json

Absolute seconds differ from machine to machine and from minute to minute, so everything that is compared is timed here
in turn, round after round, and printed as median (smallest to largest) with its ratio to a reference, the light one of
each part. A network's time also stands over its lower bound: its multiply-adds at the rate of this machine's fastest
convolutions, timed right after it, or its memory traffic, whichever is longer. Both, and warps, run for a moment in a
round, of which the fastest run counts, so that none starts with what another item left in the caches. Cascades go from
two images to the composed field, stem and all warps included. "torch's sampler" means that this package's own sampling
is switched off, "unoptimised torch" that half precision and layouts for a CPU are as well. End to end means
`register()` from images in memory to the warped image, warm; other programs: their own affine and deformable
registration, images in memory. Networks that have no weights yet run with random ones, which cost the same time. Cold
starts are whole programs: `ldr`, and the process behind Slicer's panel.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import SimpleITK as sitk
import torch
from tqdm import tqdm

from LDRCore import registration, sampling
from LDRCore.cli import demo
from LDRCore.cpu import layout, memory, precision
from LDRCore.errors import RegistrationError
from LDRCore.evaluation import scoring
from LDRCore.io import images
from LDRCore.models import registry, weights
from LDRCore.models.cascade import Cascade
from LDRCore.pipeline import preprocess
from LDRCore.pipeline.model import deploy, load_model
from LDRCore.transforms import spatial
from Training.evaluation import cold_start, machine_bounds, systems
from Training.evaluation.config import System
from Training.evaluation.datasets import Loaded
from Training.evaluation.peers import METHODS
from Training.evaluation.systems import Place

NETWORK_SIZE = 128
SIZES = {"128^3": ((128, 128, 128), 2.0), "native": ((256, 256, 180), 1.0)}  # (x, y, z) voxels and spacing, mm
CHOSEN_S = 5.0  # from the choice of both volumes to Apply
CASCADES = {  # architectures that are timed end to end beside the models that ship; names as in systems.toml
    "LDR-release": {"stem": "affine-ldr", "network": "ldr-release", "cascades": 3},
    "RCN": {"stem": "affine-vtn", "network": "vtn", "cascades": 3},
    "VoxelMorph": {"stem": "affine-vtn", "network": "voxelmorph", "cascades": 1},
}
LDR_FORMS = {  # beside the text's: as the models that ship use it
    "head=half": {"head": "half"},
    "head=half, channels=8x32x32x32, up=16x16x4": {"head": "half", "channels": (8, 32, 32, 32), "up": (16, 16, 4)},
}
PEERS = ("ants-syn", "elastix-bspline", "greedy")
PARTS = ("networks", "warps", "cascades", "register", "peers", "cold")
REFERENCES = {
    "networks": "ldr",
    "warps": "torch grid_sample alone, coordinates given",
    "cascades": "{model} 3-cas",
    "register": "{model} 3-cas",
    "cold": "panel: a later Apply",
}
VOXELMORPH = Path(__file__).parent / "evaluation" / "voxelmorph_timing.py"


@dataclass
class Item:
    """One thing that is timed.

    Attributes:
        group: what it may be compared with: same part, same size, same threads.
        name: shown.
        once: does it once and returns its seconds.
        rounds: how many count at most, after none that does not (programs that start anew each time), or None for all.
        seconds: of every finished round.
        problem: why it could not be timed, or "".
        bound: tells the seconds below which it cannot come on this machine at this moment, where that is known.
        bounds: of every finished round.
    """

    group: tuple[str, str, int]
    name: str
    once: Callable[[], float] | None
    rounds: int | None = None
    seconds: list[float] = field(default_factory=list)
    problem: str = ""
    bound: Callable[[], float] | None = None
    bounds: list[float] = field(default_factory=list)


def _seconds(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _by(backend: str, action: Callable[[], object], timed: Callable[..., float] = _seconds) -> float:
    with sampling.forced(backend):
        return timed(action)


_by_torchs_sampler = partial(_by, "reference")
_without_numba = partial(_by, "torch")


def _predict(network: Any, given: list[torch.Tensor], dtype: torch.dtype) -> float:
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return machine_bounds.fastest(lambda: network.predict(*given))


def _with_threads(threads: int, once: Callable[[], float]) -> Callable[[], float]:
    def limited() -> float:
        torch.set_num_threads(threads)
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(threads)
        return once()

    return limited


def networks(threads: list[int]) -> Iterator[Item]:
    """Every network and stem of the registry alone: channels last, no gradient, float32.

    LDR in its layout for a CPU, also in the precision that `register` uses here, where that is another one, with the
    lower bound of that one.
    """
    pair = [torch.rand(1, 1, *[NETWORK_SIZE] * 3).to(memory_format=torch.channels_last_3d) for _ in range(2)]
    every: dict[str, Any] = {name: registry.build_network(name) for name in sorted(registry.DENSE)}
    every |= {f"ldr ({text})": registry.build_network("ldr", **options) for text, options in LDR_FORMS.items()}
    every |= {name: registry.build_stem(name) for name in sorted(registry.STEMS)}
    precisions = list(dict.fromkeys((torch.float32, precision.of_convolutions("cpu"))))
    fastest, traffic = {p: machine_bounds.Convolutions(p) for p in precisions}, {}
    for n in threads:
        torch.set_num_threads(n)
        traffic[n] = machine_bounds.bandwidth()
        rates = ", ".join(f"{2 * f.rate() / 1e9:.0f} in {_short(p)}" for p, f in fastest.items())
        print(f"{n} threads at best: GFLOP/s {rates}; {traffic[n] / 1e9:.1f} GB/s of copying", file=sys.stderr)

    def bound(network: Any, dtype: torch.dtype, bytes_per_second: float) -> float:
        return machine_bounds.lower_bound(network, NETWORK_SIZE, fastest[dtype].rate(), bytes_per_second, dtype)

    for name, network in every.items():
        network.eval().requires_grad_(False).to(memory_format=torch.channels_last_3d)
        for dtype in precisions if name.startswith("ldr") else precisions[:1]:
            label = name if dtype == torch.float32 else f"{name}, {_short(dtype)}"
            for n in threads:
                arranged = layout.arrange_network(network, dtype)
                once = _with_threads(n, partial(_predict, arranged, pair, dtype))
                lowest = partial(bound, network, dtype, traffic[n])
                yield Item(("networks", f"{NETWORK_SIZE}^3", n), label, once, bound=lowest)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def normalised(image: sitk.Image) -> torch.Tensor:
    """(1, 1, N, N, N), 0 to 1, N = `NETWORK_SIZE`: as networks see it."""
    tensor = preprocess.to_tensor(image)
    tensor = preprocess.normalise(tensor, *preprocess.intensity_range(tensor))
    return torch.nn.functional.interpolate(tensor, [NETWORK_SIZE] * 3, mode="trilinear")


def warps(pair: Loaded, threads: list[int]) -> Iterator[Item]:
    """An image warped by a smooth field of some voxels, at full size and at half of it, here and by torch's sampler."""
    image = normalised(pair.moving)
    shape = tuple(image.shape[2:])
    torch.manual_seed(0)
    half = spatial.upsample(2 * torch.randn(1, 3, 5, 5, 5), [n // 2 for n in shape])
    full = spatial.upsample(half, shape)
    where = spatial.identity_grid(shape) + full
    last = torch.tensor(shape).view(1, 3, 1, 1, 1) - 1
    grid = (2 * where / last - 1).flip(1).permute(0, 2, 3, 4, 1).contiguous()

    def torchs() -> torch.Tensor:
        return torch.nn.functional.grid_sample(image, grid, align_corners=True)

    own: dict[str, Callable[[], object]] = {
        "image by a field": lambda: spatial.warp(image, full),
        "image by a field of half size": lambda: spatial.warp_by_coarse(image, half),
        "field by a field, half size": lambda: spatial.compose(half, half),
    }
    ways = {
        "": machine_bounds.fastest,
        ", without numba": partial(_without_numba, timed=machine_bounds.fastest),
        ", torch's sampler": partial(_by_torchs_sampler, timed=machine_bounds.fastest),
    }
    actions = {name + way: partial(timed, warp) for name, warp in own.items() for way, timed in ways.items()}
    actions[REFERENCES["warps"]] = partial(machine_bounds.fastest, torchs)
    for name, once in actions.items():
        for n in threads:
            yield Item(("warps", f"{NETWORK_SIZE}^3", n), name, _with_threads(n, once))


def cascades(pair: Loaded, threads: list[int]) -> Iterator[Item]:
    """From two images to the composed field: stem, networks, and all warps between them."""
    images_01 = normalised(pair.moving), normalised(pair.fixed)

    ways = {"": _seconds, ", without numba": _without_numba, ", unoptimised torch": _by_torchs_sampler}
    convolutions = precision.of_convolutions("cpu")

    def once(cascade: Cascade, count: int, way: Callable[[Callable[[], object]], float]) -> float:
        with torch.no_grad():
            return way(lambda: cascade(*images_01, count))

    built = {name: weights.load_cascade(name) for name in weights.list_models()}
    built |= {name: registry.build_cascade(architecture) for name, architecture in CASCADES.items()}
    for name, cascade in built.items():
        cascade.eval().requires_grad_(False).to(memory_format=torch.channels_last_3d)
        deployed = deploy(copy.deepcopy(cascade), "cpu", convolutions)
        for count in range(1, len(cascade) + 1):
            for label, way in ways.items():
                chosen = cascade if way is _by_torchs_sampler else deployed  # float32 as it trains, or as it ships
                for n in threads:
                    timed = _with_threads(n, partial(once, chosen, count, way))
                    yield Item(("cascades", f"{NETWORK_SIZE}^3", n), f"{name} {count}-cas{label}", timed)


def sized_pair(fixed: str, moving: str, size: str) -> Loaded:
    """The pair on a grid of a given size, each image about its own middle, so that content and geometry are real."""
    voxels, spacing = SIZES[size]
    made = []
    for source, name in ((fixed, "fixed image"), (moving, "moving image")):
        image = images.load(source, name)
        grid = sitk.Image(list(voxels), sitk.sitkUInt8)
        grid.SetSpacing([spacing] * 3)
        grid.SetDirection(image.GetDirection())
        middle = image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()])
        own = grid.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in voxels])
        grid.SetOrigin([m - o for m, o in zip(middle, own, strict=True)])
        made.append(registration.warp_image(image, sitk.Transform(3, sitk.sitkIdentity), grid))
    return Loaded(made[0], made[1], scoring.Truth(made[0]))


def untrained_models(folder: Path) -> dict[str, str]:
    """{name: path} of the architectures of `CASCADES` with random weights, as models that `register` loads."""
    shipped = weights.model_info(weights.list_models()[0])
    paths = {}
    for name, architecture in CASCADES.items():
        torch.manual_seed(0)
        card = {"name": name, "architecture": architecture, "working_grid": shipped["working_grid"]}
        weights.save_model(folder, card, registry.build_cascade(architecture).state_dict())
        paths[name] = str(folder / f"{name}.pt")
    return paths


def _register(pair: Loaded, model: str, cascades: int, way: Callable[[Callable[[], object]], float]) -> float:
    load_model(model)  # from here on in memory
    return way(lambda: registration.register(pair.fixed, pair.moving, model=model, cascades=cascades, device="cpu"))


def registrations(pairs: dict[str, Loaded], threads: list[int], folder: Path) -> Iterator[Item]:
    """`register()` end to end with the models that ship and with untrained ones, 1 to all cascades."""
    models = {name: name for name in weights.list_models()} | untrained_models(folder)
    for name, model in models.items():
        most = weights.model_info(model)["architecture"]["cascades"]
        ways: dict[str, Any] = {f"{name} {count}-cas": (count, _seconds) for count in range(1, most + 1)}
        if name == model:
            ways[f"{name} {most}-cas, without numba"] = most, _without_numba
        for label, (cascades, way) in ways.items():
            for size, pair in pairs.items():
                for n in threads:
                    action = partial(_register, pair, model, cascades, way)
                    yield Item(("register", size, n), label, _with_threads(n, action))


def peers(pairs: dict[str, Loaded], threads: list[int], python: str, methods: list[str], rounds: int) -> Iterator[Item]:
    """Other programs, on the same pairs; and the network of the PyPI package voxelmorph among the networks."""
    for method in methods:
        system = System(method, "peer", method=method)
        why = systems.unavailable(system, Place((), python, 1))
        for size, pair in pairs.items():
            for n in threads:
                once = None if why else partial(_peer, system, pair, Place((), python, n))
                yield Item(("register", size, n), method, once, rounds, problem=why)
    for n in threads:
        yield Item(("networks", f"{NETWORK_SIZE}^3", n), "voxelmorph (PyPI)", partial(_voxelmorph, python, n))


def _peer(system: System, pair: Loaded, place: Place) -> float:
    return systems.run(system, pair, place).seconds


def cold_starts(fixed: str, moving: str, folder: Path) -> Iterator[Item]:
    """Whole programs from nothing: `ldr`, and the process behind Slicer's panel from Apply to the last output.

    Each starts anew every time, with as many threads as the machine has cores. Not in it: drawing the result.
    """
    pair = images.load(fixed, "fixed image"), images.load(moving, "moving image")
    actions = {
        "ldr --help": cold_start.ldr_help,
        "ldr register, with its picture": partial(cold_start.ldr_register, fixed, moving, folder / "cold"),
        "panel: first Apply": partial(cold_start.first_apply, *pair),
        "panel: first Apply, some seconds after both volumes were chosen": partial(
            cold_start.first_apply, *pair, chosen_s=CHOSEN_S
        ),
        "panel: a later Apply": partial(cold_start.first_apply, *pair, earlier=2),
    }
    for name, once in actions.items():
        yield Item(("cold", "the pair", os.cpu_count() or 1), name, once)


def _voxelmorph(python: str, threads: int) -> float:
    command = [python, str(VOXELMORPH), "--threads", str(threads), "--repeats", "1", "--size", str(NETWORK_SIZE)]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except OSError as error:
        raise RegistrationError(f"the peers' Python cannot be used ({error})") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RegistrationError(lines[-1] if lines else f"ended with code {done.returncode}")
    return float(json.loads(done.stdout)["seconds"][0])


def measure(items: list[Item], repeats: int) -> None:
    """Everything in turn, `repeats` rounds after one that is not counted; what fails is not tried again."""
    bar = tqdm(total=len(items) * (repeats + 1), disable=None, unit="run")
    for number in range(repeats + 1):
        for item in items:
            bar.set_postfix_str(item.name)
            bar.update()
            enough = item.rounds is not None and not 0 < number <= item.rounds
            if item.once is None or item.problem or enough:
                continue
            try:
                seconds = item.once()
            except RegistrationError as error:
                item.problem = str(error)
                continue
            if number:
                item.seconds.append(seconds)
                if item.bound is not None:
                    item.bounds.append(item.bound())
    bar.close()


def reference(part: str) -> str:
    """The name that others of a part are compared with."""
    return REFERENCES[part].replace("{model}", weights.DEFAULT)


def results(items: list[Item]) -> list[dict[str, Any]]:
    """Median, smallest, largest, the ratio of medians to the reference of the same group, and to the lower bound."""
    medians = {(i.group, i.name): statistics.median(i.seconds) for i in items if i.seconds}
    found = []
    for item in items:
        row: dict[str, Any] = dict(zip(("part", "size", "threads"), item.group, strict=True)) | {"name": item.name}
        base = medians.get((item.group, reference(item.group[0])))
        if item.seconds:
            median = statistics.median(item.seconds)
            row |= {"runs": len(item.seconds), "median_s": median}
            row |= {"min_s": min(item.seconds), "max_s": max(item.seconds), "ratio": median / base if base else None}
            over = [s / b for s, b in zip(item.seconds, item.bounds, strict=False)]
            row |= {"over_bound": statistics.median(over) if over else None}
        else:
            row["problem"] = item.problem or "not timed"
        found.append(row)
    return found


def text(found: list[dict[str, Any]]) -> str:
    """One Markdown table a part and size, thread counts side by side."""
    out = []
    for part, size in dict.fromkeys((r["part"], r["size"]) for r in found):
        rows = [r for r in found if (r["part"], r["size"]) == (part, size)]
        threads = sorted({r["threads"] for r in rows})
        out.append(f"\n{part}, {size}: median (min to max) seconds, x times {reference(part)}\n")
        out.append("| | " + " | ".join(f"{n} thread{'s' * (n > 1)}" for n in threads) + " |")
        out.append("|---|" + "---|" * len(threads))
        for name in dict.fromkeys(r["name"] for r in rows):
            cells = [_cell(r) for n in threads for r in rows if r["name"] == name and r["threads"] == n]
            out.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def _cell(row: dict[str, Any]) -> str:
    if "median_s" not in row:
        return row["problem"]
    ratio = f", x {row['ratio']:.2f}" if row["ratio"] else ""
    bound = f", {row['over_bound']:.1f} of its bound" if row.get("over_bound") else ""
    return f"{row['median_s']:.3f} ({row['min_s']:.3f} to {row['max_s']:.3f}){ratio}{bound}"


def main(given: list[str] | None = None) -> int:
    """Command line; 0 done, 2 unusable input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fixed", default=str(demo.FOLDER / "fixed.nii.gz"), help="image (default: the demo pair)")
    parser.add_argument("--moving", default=str(demo.FOLDER / "moving.nii.gz"))
    parser.add_argument("--threads", default="1,2", help="comma-separated (default 1,2)")
    parser.add_argument("--sizes", default=",".join(SIZES), help=f"of registrations, some of {', '.join(SIZES)}")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--peers", default=",".join(PEERS), help="methods of Training/evaluation/peers.py")
    parser.add_argument("--peer-python", default=sys.executable, help="interpreter that has the peers' packages")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count (default 5)")
    parser.add_argument("--peer-repeats", type=int, default=1, help="of these, rounds with other programs (default 1)")
    parser.add_argument("--out", type=Path, help="JSON to write")
    a = parser.parse_args(given)
    memory.keep_freed_blocks()  # for everything that is timed in this process, other networks included
    try:
        chosen = {n: _chosen(getattr(a, n), known, n) for n, known in (("sizes", list(SIZES)), ("parts", list(PARTS)))}
        threads = [int(n) for n in _chosen(a.threads, [str(n) for n in range(1, 257)], "threads")]
        if not 1 <= a.peer_repeats <= a.repeats:
            raise RegistrationError(f"1 <= --peer-repeats <= --repeats must hold, got {a.peer_repeats} and {a.repeats}")
        python = os.path.abspath(shutil.which(a.peer_python) or a.peer_python)
        pairs = {size: sized_pair(a.fixed, a.moving, size) for size in chosen["sizes"]}
        with tempfile.TemporaryDirectory() as folder:
            items: list[Item] = []
            if "networks" in chosen["parts"]:
                items += networks(threads)
            if "warps" in chosen["parts"]:
                items += warps(next(iter(pairs.values())), threads)
            if "cascades" in chosen["parts"]:
                items += cascades(next(iter(pairs.values())), threads)
            if "register" in chosen["parts"]:
                items += registrations(pairs, threads, Path(folder))
            if "peers" in chosen["parts"]:
                methods = _chosen(a.peers, sorted(METHODS), "peers")
                items += peers(pairs, threads, python, methods, a.peer_repeats)
            if "cold" in chosen["parts"]:
                items += cold_starts(a.fixed, a.moving, Path(folder))
            measure(items, a.repeats)
    except RegistrationError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    found = results(items)
    print(text(found))
    if a.out:
        a.out.parent.mkdir(parents=True, exist_ok=True)
        part = a.out.with_suffix(".part")
        part.write_text(json.dumps({"torch": torch.__version__, "results": found}, indent=1) + "\n", encoding="utf-8")
        part.replace(a.out)
    return 0


def _chosen(given: str, known: list[str], what: str) -> list[str]:
    names = [n.strip() for n in given.split(",") if n.strip()]
    wrong = [n for n in names if n not in known]
    if wrong or not names:
        shown = known if len(known) < 20 else f"{known[0]} to {known[-1]}"
        raise RegistrationError(f"--{what} must be some of {shown}, got {wrong[0] if wrong else 'none'!r}")
    return names


if __name__ == "__main__":
    sys.exit(main())
