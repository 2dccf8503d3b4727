"""A network that is being trained predicts with the weights it has now, also without gradients on a CPU."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from LDRCore import losses
from LDRCore.models import registry
from LDRCore.models.cascade import Cascade
from LDRCore.transforms import spatial
from Training import checkpoints, engine, objectives, train_student

ARCHITECTURE = {"network": {"name": "ldr", "head": "half", "channels": (8, 8, 8, 8)}, "cascades": 2}
TINY = {"shape": (32, 32, 32), "initial": "centred", "cache": None, "val_pairs": 2, "device": "cpu"}


@pytest.fixture
def images() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    moving, fixed = torch.rand(2, 1, 1, 32, 32, 32, generator=generator)
    return moving, fixed


@pytest.fixture
def model() -> Cascade:
    torch.manual_seed(0)
    cascade = registry.build_cascade(ARCHITECTURE)
    for network in cascade.networks:
        torch.nn.init.normal_(network.flow.weight, 0, 0.02)
    return cascade.to(memory_format=torch.channels_last_3d)


@torch.no_grad()
def predicted(model: Cascade, images: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return model(*images).displacement.clone()


def fresh(state: dict[str, torch.Tensor], architecture: dict) -> Cascade:
    cascade = registry.build_cascade(architecture)
    cascade.load_state_dict(state)
    return cascade


def test_one_step_of_fused_adam_changes_the_prediction(model, images):
    """Fused Adam writes weights in place and does not raise their version counter."""
    before = predicted(model, images)
    optimizer = engine.adam(model.parameters(), 1e-2)
    model(*images).displacement.square().mean().backward()
    optimizer.step()
    after = predicted(model, images)
    assert (after - before).abs().max() > 1e-3
    expected = predicted(fresh(model.state_dict(), ARCHITECTURE), images)
    assert torch.allclose(after, expected, atol=1e-6)


def test_weights_that_are_changed_through_data_change_the_prediction(model, images):
    before = predicted(model, images)
    for network in model.networks:
        network.flow.weight.data.mul_(2)
        network.flow.bias.data.mul_(2)
    # increments double; sampling and composing are not linear, so compare the first cascade, which is
    first = torch.no_grad()(model)(*images, 1).displacement
    assert (predicted(model, images) - before).abs().max() > 1e-3
    for network in model.networks:
        network.flow.weight.data.div_(2)
        network.flow.bias.data.div_(2)
    assert torch.allclose(first, 2 * torch.no_grad()(model)(*images, 1).displacement, atol=1e-6)
    assert torch.equal(predicted(model, images), before)


def test_validation_during_a_run_is_that_of_the_checkpoint(tiny_brains, tmp_path: Path, monkeypatch):
    """The second validation is the one that would see weights of the first, had any been kept."""
    settings = train_student.StudentSettings(
        data=tiny_brains, out=tmp_path / "s.pt", network="ldr", options=("head=half", "channels=8x8x8x8"),
        cascades=2, steps=4, lr=1e-2, warmup=1, val_every=2, save_every=2, **TINY,
    )  # fmt: skip
    validate, during = objectives.validate, []

    def kept(model, source):
        during.append((validate(model, source), source))
        return during[-1][0]

    monkeypatch.setattr(objectives, "validate", kept)
    train_student.train(settings)
    (first, source), (last, _) = during
    state = checkpoints.read_checkpoint(tmp_path / "s.pt")
    assert state["step"] == 4
    afresh = validate(fresh(state["model"], settings.architecture()), source)
    assert last == pytest.approx(afresh, abs=1e-6)
    sample = source[""].sample(0, 0, augment=False)
    only_one = {"": copy.copy(source[""])}
    only_one[""].pairs = source[""].pairs[:1]
    figures = validate(fresh(state["model"], settings.architecture()), only_one)
    displacement = predicted(fresh(state["model"], settings.architecture()), (sample.moving, sample.fixed))
    full = spatial.upsample(displacement, sample.fixed.shape[2:])
    local = 1 - float(losses.local_ncc(spatial.warp(sample.moving, full), sample.fixed, 5))
    assert figures["local correlation, 2 cascades"] == pytest.approx(local, abs=1e-6)
    assert abs(last["correlation, 2 cascades"] - first["correlation, 2 cascades"]) > 1e-4
    best = checkpoints.read_checkpoint(checkpoints.best_path(tmp_path / "s.pt"))
    name = "Dice, 2 cascades"
    assert best["best"] == {"step": 2 if first[name] >= last[name] else 4, "criterion": name,
                            "value": max(first[name], last[name])}  # fmt: skip
    assert validate(fresh(best["model"], settings.architecture()), source)[name] == pytest.approx(best["best"]["value"])
