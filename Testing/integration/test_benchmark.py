"""`Training.benchmark` on small volumes: everything in one run, ratios, and what cannot be had."""

from __future__ import annotations

import json
import re
import sys

import pytest

from LDRCore import sampling
from LDRCore.errors import RegistrationError
from LDRCore.models import registry, weights
from Training import benchmark
from Training.evaluation import cold_start


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(benchmark, "NETWORK_SIZE", 64)
    monkeypatch.setattr(benchmark, "SIZES", {"128^3": ((40, 40, 40), 5.0), "native": ((48, 44, 40), 4.5)})
    monkeypatch.setattr(benchmark, "CASCADES", {"VoxelMorph": benchmark.CASCADES["VoxelMorph"]})


def test_everything_is_timed_in_one_run(small, tmp_path, capsys, monkeypatch):
    out = tmp_path / "b.json"
    monkeypatch.setattr(
        benchmark, "cold_starts", lambda *_: [benchmark.Item(("cold", "the pair", 1), "x", lambda: 1.0)]
    )
    given = ["--repeats", "1", "--threads", "1", "--sizes", "native", "--peers", "greedy", "--out", str(out)]
    assert benchmark.main([*given, "--peer-python", str(tmp_path / "no-python")]) == 0
    measured = json.loads(out.read_text(encoding="utf-8"))["results"]
    rows = {(r["part"], r["name"]): r for r in measured}
    assert {n for p, n in rows if p == "networks"} >= {*registry.DENSE, *registry.STEMS, "ldr (head=half)"}
    cascades = {name: weights.model_info(name)["architecture"]["cascades"] for name in weights.list_models()}
    assert {n for p, n in rows if p == "register"} == {
        *(f"{name} {n}-cas" for name, most in cascades.items() for n in range(1, most + 1)),
        *(f"{name} {most}-cas, without numba" for name, most in cascades.items()),
        "VoxelMorph 1-cas",
        "greedy",
    }
    assert {n for p, n in rows if p == "cascades"} >= {"brain-t1 3-cas", "brain-t1 3-cas, unoptimised torch"}
    assert rows["networks", "ldr"]["ratio"] == rows["warps", benchmark.REFERENCES["warps"]]["ratio"] == 1
    assert rows["cold", "x"]["median_s"] == 1
    assert rows["networks", "vtn"]["over_bound"] > 0.5  # rough: one run on a busy machine
    assert rows["register", f"{weights.DEFAULT} 3-cas"]["ratio"] == 1
    assert sampling._forced is None
    timed = [r for r in measured if "median_s" in r]
    assert all(0 < r["min_s"] <= r["median_s"] <= r["max_s"] and r["runs"] == 1 for r in timed)
    assert "the peers' Python cannot be used" in rows["register", "greedy"]["problem"]
    printed = capsys.readouterr().out
    assert "networks, 64^3: median (min to max) seconds, x times ldr" in printed
    assert "| greedy | the peers' Python cannot be used" in printed


def test_cold_starts_are_those_of_the_real_programs(demo_pair, tmp_path):
    items = {i.name: i for i in benchmark.cold_starts(demo_pair["fixed"], demo_pair["moving"], tmp_path)}
    assert 0 < items["ldr --help"].once() < items["ldr register, with its picture"].once()
    assert not (tmp_path / "cold").exists()
    first, later = (items[f"panel: {name}"].once() for name in ("first Apply", "a later Apply"))
    assert 0 < later < first  # the first one imports torch, which takes many times as long


def test_a_program_that_fails_is_said(tmp_path):
    with pytest.raises(RegistrationError, match=r"ldr register must end well, got .*must be an existing file"):
        cold_start.ldr_register("none.nii.gz", "none.nii.gz", tmp_path / "out")


def test_a_missing_voxelmorph_is_said(monkeypatch, tmp_path):
    (tmp_path / "voxelmorph.py").write_text("raise ImportError('not here')")
    script = benchmark.VOXELMORPH.read_text(encoding="utf-8")
    (tmp_path / "timing.py").write_text(script)  # a script's folder comes first on its path
    monkeypatch.setattr(benchmark, "VOXELMORPH", tmp_path / "timing.py")
    item = benchmark.Item(
        ("networks", "64^3", 1), "voxelmorph (PyPI)", lambda: benchmark._voxelmorph(sys.executable, 1)
    )
    benchmark.measure([item], 1)
    assert item.problem == "package voxelmorph is missing or cannot be used (not here)"
    assert "package voxelmorph is missing" in benchmark.text(benchmark.results([item]))


def test_a_network_stands_over_the_bound_of_its_own_round():
    times, bounds = iter([9.0, 2.0, 8.0, 3.0]), iter([1.0, 2.0, 1.0])
    item = benchmark.Item(("networks", "s", 1), "ldr", lambda: next(times), bound=lambda: next(bounds))
    benchmark.measure([item], 3)
    assert benchmark.results([item])[0]["over_bound"] == 3.0  # the median of 2, 4 and 3; not of seconds alone
    assert "3.0 of its bound" in benchmark.text(benchmark.results([item]))


def test_rounds_medians_and_ratios_by_hand():
    times = iter([9.0, 1.0, 3.0, 2.0, 4.0, 8.0])
    base = benchmark.Item(("networks", "s", 1), "ldr", lambda: next(times))
    peer = benchmark.Item(("networks", "s", 1), "peer", lambda: next(times), rounds=1)
    benchmark.measure([base, peer], 3)  # base: 9 uncounted, 1; peer 3; base 2, 4
    assert base.seconds == [1.0, 2.0, 4.0]
    assert peer.seconds == [3.0]
    rows = benchmark.results([base, peer])
    assert rows[1]["ratio"] == pytest.approx(1.5)
    assert "| peer | 3.000 (3.000 to 3.000), x 1.50 |" in benchmark.text(rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--sizes", "512"], "--sizes must be some of .*, got '512'"),
        (["--threads", "x"], "--threads must be some of 1 to 256, got 'x'"),
        (["--repeats", "0"], "1 <= --peer-repeats <= --repeats must hold"),
        (["--fixed", "none.nii.gz"], "fixed image must be an existing file"),
        (["--parts", "peers", "--peers", "magic"], "--peers must be some of .*, got 'magic'"),
    ],
)
def test_bad_arguments(small, capsys, given, message):
    assert benchmark.main(given) == 2
    assert re.search(message, capsys.readouterr().err)
