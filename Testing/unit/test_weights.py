"""Cards and weights: bundled models are complete and documented, written models can be read, faults are named."""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from LDRCore import RegistrationError, registration
from LDRCore.models import weights
from LDRCore.models.registry import build_cascade
from LDRCore.pipeline import model as model_file
from LDRCore.pipeline.model import load_model

ARCHITECTURE = {"network": {"name": "ldr", "head": "half"}, "cascades": 1, "multiplier": 1.0}
GRID = {"spacing_mm": 2.0, "margin_mm": 8.0, "stem_spacing_mm": 4.0, "stem_shape": [64, 64, 64], "stem_passes": 3}
CARD = {"name": "tiny", "architecture": ARCHITECTURE, "working_grid": GRID}


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
        assert "test" in card["results"]
        for split in card["results"].values():
            for kind in split["systems"].values():
                assert {"nothing", "affine"} < set(kind)


def test_a_loaded_model_is_kept():
    assert load_model("brain-t1") is load_model("brain-t1")


def test_two_threads_load_one_model_once(monkeypatch):
    model_file._load.cache_clear()
    both = threading.Barrier(2)

    def load() -> model_file.Model:
        both.wait()
        return load_model("brain-t1")

    with ThreadPoolExecutor(2) as pool:
        first, second = (task.result() for task in [pool.submit(load), pool.submit(load)])
    assert first is second


def test_a_card_that_was_changed_on_disk_is_read_again(tmp_path):
    card = weights.save_model(tmp_path, CARD, build_cascade(ARCHITECTURE).state_dict())
    first = load_model(card)
    content = json.loads(card.read_text(encoding="utf-8"))
    content["working_grid"]["spacing_mm"] = 1.5
    card.write_text(json.dumps(content), encoding="utf-8")
    assert load_model(card).card["working_grid"]["spacing_mm"] == 1.5
    assert first.card["working_grid"]["spacing_mm"] == 2.0


def test_saved_models_come_back_in_half_precision(tmp_path):
    cascade = build_cascade(ARCHITECTURE)
    card = weights.save_model(tmp_path, CARD, cascade.state_dict())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.json", "tiny.pt"]
    for path in (card, tmp_path / "tiny.pt"):
        loaded = weights.load_cascade(path).state_dict()
        for name, value in cascade.state_dict().items():
            assert torch.equal(loaded[name], value.half().float())
        assert not any(p.requires_grad for p in load_model(path).cascade.parameters())


def test_a_deployed_model_computes_what_its_trainable_cascade_computes(tmp_path, monkeypatch):
    monkeypatch.setenv("LDR_PRECISION", "float32")
    cascade = build_cascade({**ARCHITECTURE, "stem": "affine-ldr"})
    torch.nn.init.normal_(cascade.networks[0].flow.weight, 0, 0.1)
    card = weights.save_model(
        tmp_path, {**CARD, "architecture": {**ARCHITECTURE, "stem": "affine-ldr"}}, cascade.state_dict()
    )
    moving, fixed = torch.rand(2, 1, 1, 32, 32, 32)
    with torch.no_grad():
        plain = weights.load_cascade(card)(moving, fixed).displacement
        deployed = load_model(card).cascade(moving, fixed).displacement
    assert float(plain.abs().max()) > 0.1
    assert torch.allclose(plain, deployed, atol=1e-4)


def test_wrong_cards_and_weights_are_named(tmp_path):
    with pytest.raises(RegistrationError, match=r"model must be one of .* got 'nowhere.pt'"):
        weights.model_info("nowhere.pt")
    card = weights.save_model(tmp_path, CARD, build_cascade(ARCHITECTURE).state_dict())
    content = json.loads(card.read_text(encoding="utf-8"))
    content["architecture"] = {**ARCHITECTURE, "cascades": 2}
    card.write_text(json.dumps(content))
    with pytest.raises(RegistrationError, match="weights of tiny must fit its card's architecture"):
        load_model(card)
    del content["sha256"]
    card.write_text(json.dumps(content))
    with pytest.raises(RegistrationError, match="must hold 'sha256'"):
        load_model(card)
    card.write_text("{")
    with pytest.raises(RegistrationError, match="must be readable JSON"):
        load_model(card)


def test_no_code_in_weights_is_run(tmp_path, capsys):
    class Trap:
        def __reduce__(self):
            return (print, ("the trap was sprung",))

    card = weights.save_model(tmp_path, CARD, build_cascade(ARCHITECTURE).state_dict())
    for content in ({"x": Trap()}, [torch.zeros(3)], {"x": "text"}, None):
        torch.save(content, tmp_path / "tiny.pt")
        put_sha256(card)
        with pytest.raises(RegistrationError, match="weights of tiny must be a plain state dict"):
            load_model(card)
    for data in (b"", b"text", b"PK\x03\x04"):
        (tmp_path / "tiny.pt").write_bytes(data)
        put_sha256(card)
        with pytest.raises(RegistrationError, match="weights of tiny must be a plain state dict"):
            load_model(card)
    assert capsys.readouterr().out == ""


def put_sha256(card) -> None:
    """Write the sha256 of the weights into their card."""
    content = json.loads(card.read_text(encoding="utf-8"))
    content["sha256"] = hashlib.sha256(card.with_suffix(".pt").read_bytes()).hexdigest()
    card.write_text(json.dumps(content), encoding="utf-8")


def test_a_model_is_loaded_without_the_compiler_of_torch():
    """Importing it took more than a second of every first registration."""
    code = "import sys; from LDRCore.models import weights; weights.load_cascade('brain-t1-small'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch._dynamo" not in done.stdout.split()
