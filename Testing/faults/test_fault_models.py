"""Model files of strangers: nothing outside their folder is read, nothing is made that their file does not hold."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from LDRCore import RegistrationError, model_info
from LDRCore.cli import doctor
from LDRCore.distillation import teacher_store
from LDRCore.models import weights
from Training.evaluation import config

h5py = pytest.importorskip("h5py")
SMALL = weights.BUNDLED / "brain-t1-small.json"


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of a bundled model; its card."""
    for suffix in (".json", ".pt"):
        shutil.copy(SMALL.with_suffix(suffix), tmp_path)
    return tmp_path / SMALL.name


def change(card: Path, keys: str, value: object) -> None:
    content = json.loads(card.read_text(encoding="utf-8"))
    *path, last = keys.split(".")
    table = content
    for key in path:
        table = table[key]
    table[last] = value
    card.write_text(json.dumps(content), encoding="utf-8")


def test_the_weights_that_were_asked_for_are_those_of_the_card(model):
    """X.pt with a card that names Y.pt gave the results of Y.pt."""
    shutil.copy(model.with_suffix(".pt"), model.with_name("other.pt"))
    change(model, "weights", "other.pt")
    with pytest.raises(RegistrationError, match=r"must name it as its weights, got other.pt"):
        weights.load_cascade(model.with_suffix(".pt"))
    assert weights.load_cascade(model) is not None  # by its card, which says what it loads


@pytest.mark.parametrize("name", ["../secret.pt", "/etc/passwd", "a/b.pt", "..", ""])
def test_weights_lie_beside_their_card_and_no_hash_is_told(model, name):
    (model.parent.parent / "secret.pt").write_bytes(b"secret")
    change(model, "weights", name)
    with pytest.raises(RegistrationError, match="must lie beside its card") as caught:
        weights.load_cascade(model)
    assert hashlib.sha256(b"secret").hexdigest()[:6] not in str(caught.value)


def test_no_part_of_the_hash_of_a_damaged_file_is_told(model):
    model.with_suffix(".pt").write_bytes(b"secret")
    with pytest.raises(RegistrationError, match="is damaged") as caught:
        weights.load_cascade(model)
    assert hashlib.sha256(b"secret").hexdigest()[:6] not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        ("architecture.cascades", 10**6),
        ("architecture.cascades", 0),
        ("architecture.cascades", "3"),
        ("architecture.cascades", True),
        ("architecture.network.channels", [10**7, 32, 32, 32]),
        ("architecture.network.channels", [-1, 32, 32, 32]),
        ("architecture.network.channels", "many"),
        ("architecture.network.name", "unknown"),
        ("architecture.network.colour", "red"),
        ("architecture.network", None),
        ("architecture", []),
        ("working_grid.spacing_mm", 1e-6),
        ("working_grid.spacing_mm", float("nan")),
        ("working_grid.spacing_mm", None),
        ("working_grid.stem_spacing_mm", -4),
        ("working_grid.stem_passes", 10**9),
        ("working_grid.stem_shape", [64, 64]),
        ("working_grid.stem_shape", [10**6, 64, 64]),
        ("weights", 3),
        ("sha256", None),
    ],
)
def test_cards_have_bounds(model, keys, value):
    change(model, keys, value)
    with pytest.raises(RegistrationError) as caught:
        weights.load_cascade(model)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("key", ["spacing_mm", "margin_mm", "stem_spacing_mm", "stem_shape", "stem_passes"])
def test_cards_hold_all_of_the_working_grid(model, key):
    """A card without stem_spacing_mm ended in a KeyError in the middle of a registration."""
    content = json.loads(model.read_text(encoding="utf-8"))
    del content["working_grid"][key]
    model.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(RegistrationError, match=f"a model card must hold '{key}'"):
        model_info(model)


@pytest.mark.parametrize("text", ["[]", "null", '"card"', "{", "\xff", "[" * 100_000])
def test_cards_that_are_none(model, text):
    model.write_bytes(text.encode("latin-1"))
    with pytest.raises(RegistrationError, match="a model card must") as caught:
        model_info(model)
    assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite(model):
    state = torch.load(model.with_suffix(".pt"), weights_only=True)
    next(iter(state.values())).view(-1)[0] = float("nan")
    torch.save(state, model.with_suffix(".pt"))
    change(model, "sha256", hashlib.sha256(model.with_suffix(".pt").read_bytes()).hexdigest())
    with pytest.raises(RegistrationError, match="must be finite"):
        weights.load_cascade(model)


def test_what_ships_keeps_within_the_bounds():
    for name in weights.list_models():
        assert weights.load_cascade(name) is not None


@pytest.mark.parametrize("content", [b"name = 'B\xe4r'", b"\xff\xfe", b"[[", b""])
def test_configurations_that_are_none_end_in_a_sentence(tmp_path, content):
    (tmp_path / "c.toml").write_bytes(content)
    with pytest.raises(RegistrationError, match=r"c\.toml|must"):
        config.load(tmp_path / "c.toml", {})


def test_doctor_tells_numba_that_is_off_from_numba_that_is_missing(monkeypatch):
    monkeypatch.setattr("LDRCore.sampling.backend_name", lambda: "torch")
    monkeypatch.setenv("LDR_NUMBA", "0")
    assert "switched off" in doctor.examine()[0]["sampling"]
    monkeypatch.delenv("LDR_NUMBA")
    assert "does not work" in doctor.examine()[0]["sampling"]
    find_spec = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "numba" else find_spec(name))
    assert "not installed" in doctor.examine()[0]["sampling"]


def store(path: Path) -> Path:
    """A teacher store of two small fields."""
    with teacher_store.TeacherStoreWriter(path, (4, 5, 6), {}) as writer:
        for key in ("a|b", "b|a"):
            writer.write(key, np.zeros((3, 4, 5, 6), np.float32))
        return writer.finish()


def external_link(file) -> None:
    del file["displacement"]
    file["displacement"] = h5py.ExternalLink("other.h5", "displacement")


def soft_link(file) -> None:
    file.move("displacement", "elsewhere")
    file["displacement"] = h5py.SoftLink("/elsewhere")


def external_storage(file) -> None:
    del file["displacement"]
    file.create_dataset("displacement", (2, 3, 4, 5, 6), "f2", external=[("secret.bin", 0, h5py.h5f.UNLIMITED)])


def virtual(file) -> None:
    del file["displacement"]
    layout = h5py.VirtualLayout((2, 3, 4, 5, 6), "f2")
    layout[:] = h5py.VirtualSource("other.h5", "displacement", (2, 3, 4, 5, 6))
    file.create_virtual_dataset("displacement", layout)


def huge(file) -> None:
    del file["displacement"]
    file.create_dataset("displacement", (2, 3, 4000, 4000, 4000), "f2", chunks=(1, 1, 16, 16, 16))


def huge_index(file) -> None:
    del file["index"]
    file.create_dataset("index", (10**12,), "u1", chunks=(1024,))


def flat(file) -> None:
    del file["displacement"]
    file["displacement"] = np.zeros((2, 3), np.float16)


def missing(file) -> None:
    del file["displacement"]


@pytest.mark.parametrize(
    "change_file", [external_link, soft_link, external_storage, virtual, huge, huge_index, flat, missing]
)
def test_teacher_stores_read_nothing_outside_and_allocate_nothing_that_they_do_not_hold(tmp_path, change_file):
    path = store(tmp_path / "store.h5")
    shutil.copy(path, tmp_path / "other.h5")
    (tmp_path / "secret.bin").write_bytes(bytes(10_000))
    assert len(teacher_store.TeacherStore(path)) == 2
    with h5py.File(path, "r+") as file:
        change_file(file)
    with pytest.raises(RegistrationError, match="a teacher store must hold"):
        teacher_store.TeacherStore(path)
