"""Cards and weights: what ships is whole and documented, what is written can be read, what is wrong is named."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from LDRCore import RegistrationError, registration
from LDRCore.models import weights
from LDRCore.models.registry import build_cascade

ARCHITECTURE = {"network": {"name": "ldr", "head": "half"}, "cascades": 1, "multiplier": 1.0}
CARD = {"name": "tiny", "architecture": ARCHITECTURE, "working_grid": {"spacing_mm": 2.0}}


def test_what_ships_is_whole_small_and_documented():
    names = weights.list_models()
    assert "brain-t1" in names
    assert weights.DEFAULT in names
    assert inspect.signature(registration.register).parameters["model"].default == weights.DEFAULT
    assert sum(p.stat().st_size for p in weights.BUNDLED.glob("*.pt")) < 30e6
    for name in names:
        weights.verify(name)
        card = weights.model_info(name)
        assert card["licence"]
        assert card["data"]["split_sha256"]
        assert card["recipe"]
        for split in ("val", "test"):
            for kind in card["results"][split]["systems"].values():
                assert {"nothing", "affine", "1 cascades"} <= set(kind)


def test_a_loaded_model_is_kept():
    assert weights.load_model("brain-t1") is weights.load_model("brain-t1")


def test_saved_models_come_back_in_half_precision(tmp_path):
    cascade = build_cascade(ARCHITECTURE)
    card = weights.save_model(tmp_path, CARD, cascade.state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.json", "tiny.pt"]
    for path in (card, tmp_path / "tiny.pt"):
        loaded = weights.load_model(path)
        for name, value in cascade.state_dict().items():
            assert torch.allclose(loaded.cascade.state_dict()[name], value, atol=1e-3)
        assert not any(p.requires_grad for p in loaded.cascade.parameters())


def test_wrong_cards_and_weights_are_named(tmp_path):
    with pytest.raises(RegistrationError, match=r"model must be one of .* got 'nowhere.pt'"):
        weights.model_info("nowhere.pt")
    card = weights.save_model(tmp_path, CARD, build_cascade(ARCHITECTURE).state_dict())
    content = json.loads(card.read_text(encoding="utf-8"))
    content["architecture"] = {**ARCHITECTURE, "cascades": 2}
    card.write_text(json.dumps(content))
    with pytest.raises(RegistrationError, match="weights of tiny must fit its card's architecture"):
        weights.load_model(card)
    del content["sha256"]
    card.write_text(json.dumps(content))
    with pytest.raises(RegistrationError, match="must hold 'sha256'"):
        weights.load_model(card)
    card.write_text("{")
    with pytest.raises(RegistrationError, match="must be readable JSON"):
        weights.load_model(card)


def test_no_code_in_weights_is_run(tmp_path):
    import hashlib

    class Trap:
        def __reduce__(self):
            return (print, ("the trap was sprung",))

    card = weights.save_model(tmp_path, CARD, build_cascade(ARCHITECTURE).state_dict())
    torch.save({"x": Trap()}, tmp_path / "tiny.pt")
    content = json.loads(card.read_text(encoding="utf-8"))
    content["sha256"] = hashlib.sha256((tmp_path / "tiny.pt").read_bytes()).hexdigest()
    card.write_text(json.dumps(content))
    with pytest.raises(RegistrationError, match="weights of tiny must be a plain state dict"):
        weights.load_model(card)
