"""The evaluation's TOML: unknown keys refused, placeholders filled, baselines required; configurations that ship."""

from __future__ import annotations

from pathlib import Path

import pytest

from LDRCore.errors import RegistrationError
from Training.evaluation import config, peers, systems
from Training.evaluation.systems import Place

CONFIGS = Path(__file__).parents[2] / "Training" / "configs"
GOOD = """
reference = "mine"
[[dataset]]
name = "one"
kind = "csv"
root = "{data}/x"
pairs = "pairs.csv"
[[system]]
name = "nothing"
kind = "nothing"
[[system]]
name = "affine only"
kind = "affine"
model = "{domain}"
[[system]]
name = "mine"
kind = "model"
model = "{model}"
cascades = 2
"""


def read(tmp_path: Path, text: str, **places: str) -> config.Config:
    path = tmp_path / "c.toml"
    path.write_text(text)
    return config.load(path, {"data": "/d", "model": "m.pt", **places})


def test_placeholders_and_paths(tmp_path):
    loaded = read(tmp_path, GOOD)
    assert loaded.datasets[0].root == "/d/x"
    assert loaded.datasets[0].pairs == str(tmp_path / "pairs.csv")
    assert [s.model for s in loaded.systems] == ["", "{domain}", "m.pt"]
    with pytest.raises(RegistrationError, match="data set one needs --data, which is not given"):
        config.load(tmp_path / "c.toml", {"model": "m"})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cascades = 2", "cascade = 2", "'mine' of c.toml knows the keys .*, got 'cascade'"),
        ("cascades = 2", 'cascades = "2"', "cascades of .*'mine' of c.toml must be of type int, got '2'"),
        ("cascades = 2", "cascades = true", "must be of type int, got True"),
        ("cascades = 2", "", "mine of kind model must have the key 'cascades'"),
        ('kind = "csv"', 'kind = "folder"', r"kind of data set one must be one of \['ixi'.*, got 'folder'"),
        ('kind = "csv"', 'kind = "csv"\nprotocol = "cubic"', "protocol of data set one must be one of"),
        ('kind = "csv"', 'kind = "csv"\nlandmarks = "mni"', "landmarks of data set one must be one of"),
        ('root = "{data}/x"', "", "must have the key 'root'"),
        ('kind = "nothing"', 'kind = "magic"', "kind of nothing must be one of .*, got 'magic'"),
        ('kind = "affine"', 'kind = "model"\ncascades = 1', "must have exactly one system of kind 'affine'"),
        ('kind = "model"', 'kind = "peer"\nmethod = "demons"', "method of mine must be one of .*, got 'demons'"),
        ('name = "mine"', 'name = "nothing"', "must have its own name, got 'nothing' twice"),
        ('reference = "mine"', 'reference = "yours"', "reference must be the name of a system, got 'yours'"),
        ('reference = "mine"', 'measures = ["dice"]', "measures must be some of .*, got 'dice'"),
        ('reference = "mine"', "speed = 1", "knows the keys .*, got 'speed'"),
        ('reference = "mine"', "systems = 1", "systems of c.toml must name a TOML file, got 1"),
        ('reference = "mine"', 'datasets = "none.toml"', r"existing TOML file, got .*none\.toml"),
        ("[[dataset]]", "[[dataset", "must be TOML, got"),
    ],
)
def test_mistakes_are_named(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(RegistrationError, match=message):
        read(tmp_path, GOOD.replace(old, new))


def test_data_sets_and_systems_of_another_file_come_first(tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "other.toml").write_text(GOOD)
    text = """
datasets = "shared/other.toml"
systems = "shared/other.toml"
[[dataset]]
name = "two"
kind = "csv"
root = "{data}/y"
pairs = "pairs.csv"
"""
    loaded = read(tmp_path, text)
    assert [d.name for d in loaded.datasets] == ["one", "two"]
    folders = [tmp_path / "shared", tmp_path]  # paths are relative to the file that they stand in
    assert [d.pairs for d in loaded.datasets] == [str(folder / "pairs.csv") for folder in folders]
    assert [s.name for s in loaded.systems] == ["nothing", "affine only", "mine"]


def test_the_cards_of_all_models_are_measured_on_the_same_data():
    places = {"data": "/data", "model": "m.pt"}
    first, second = (config.load(CONFIGS / f"evaluate-card{more}.toml", places) for more in ("", "-gradient"))
    assert first.datasets == second.datasets
    assert [d.name for d in first.datasets] == ["val-stripped", "val-whole", "test-stripped", "test-whole"]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RegistrationError, match=r"existing TOML file, got .*none\.toml \(not found\)"):
        config.load(tmp_path / "none.toml", {})


@pytest.mark.parametrize(
    "name", [f"evaluate-{what}.toml" for what in ("ixi", "paper", "card", "card-gradient", "refine")]
)
def test_the_configurations_that_ship_can_be_read(name):
    loaded = config.load(CONFIGS / name, {"data": "/data", "model": "m.pt"})
    assert loaded.systems[0].kind == "nothing"
    assert loaded.systems[1].kind == "affine"
    assert all(Path(d.pairs).is_file() for d in loaded.datasets if d.kind in ("ixi", "csv"))


def test_the_fixed_pairs_are_forty_of_different_subjects():
    lines = (CONFIGS / "pairs" / "ixi-test-40.csv").read_text(encoding="utf-8").splitlines()
    rows = [line.split(",") for line in lines[1:]]
    assert lines[0] == "fixed,moving,pose_seed"
    assert [int(r[2]) for r in rows] == list(range(40))
    assert all(f != m for f, m, _ in rows)
    assert len({(f, m) for f, m, _ in rows}) == 40
    assert len({s for f, m, _ in rows for s in (f, m)}) == 20


def test_every_peer_has_its_settings_and_every_configured_method_exists():
    assert set(peers.SETTINGS) == set(peers.METHODS)
    loaded = config.load(CONFIGS / "evaluate-ixi.toml", {"data": "/data"})
    methods = [s.method for s in loaded.systems if s.kind == "peer"]
    assert set(methods) == set(peers.METHODS)
    place = Place((), "python", 1)
    prints = {systems.fingerprint(s, place) for s in loaded.systems if s.kind == "peer"}
    assert len(prints) == len(methods)
