"""The panel's list of models: which networks run, how many, and what is said of it."""

from __future__ import annotations

import json
import re

import pytest

from Testing.slicer_window import choose, click, run

pytest.importorskip("slicer", reason="needs slicer-core (make test installs it)")


@pytest.mark.parametrize("name", ["any", "none"])
def test_without_a_fitting_network_fast_still_deforms_and_the_panel_says_why_none_ran(chosen, name):
    from LDRCore.models import weights

    choose(chosen.ui.qualityComboBox, "Fast")
    choose(chosen.ui.modelComboBox, weights.model_titles()[name])
    assert chosen.p.model == name
    assert chosen.ui.cascadesSlider.isEnabled() == (name == "any")
    assert chosen.p.cascades == 1  # kept for a model with networks
    click(chosen.ui.applyButton)
    run(chosen)
    assert chosen.said == []
    report = json.loads(chosen.p.transform.GetAttribute("LightweightRegistration.Report"))
    assert (report["model"], report["refine"]) == (name, "fast")
    assert not chosen.p.transform.IsLinear()
    shown = re.search(r"<b>Networks</b></td><td[^>]*>([^<]*)", chosen.ui.resultsLabel.text)[1]
    small = "no network fits: brain-t1-gradient: the fixed content of"
    assert shown.startswith("none: " + (small if name == "any" else "it was asked for"))
    assert "Traceback" not in chosen.panel.logic.worker.log()  # getting ready for this model went well


def test_every_network_runs_unless_fewer_were_chosen(opened):
    from LDRCore.models import weights

    ui, p, titles = opened.ui, opened.widget._parameterNode, weights.model_titles()
    assert p.cascades == ui.cascadesSlider.value == weights.model_info(weights.DEFAULT)["architecture"]["cascades"] == 9
    for name, cascades in (("brain-t1-small", 3), ("none", 3), ("any", 9), ("none", 9), ("brain-t1-small", 3)):
        choose(ui.modelComboBox, titles[name])
        assert p.cascades == cascades, name
    ui.cascadesSlider.value = 2
    for name in ("any", "none", weights.DEFAULT):
        choose(ui.modelComboBox, titles[name])
        assert p.cascades == 2, name


def test_the_networks_that_were_chosen_for_two_heads_are_named(opened):
    from LDRCore.models import weights

    click(opened.ui.tryItButton)
    choose(opened.ui.modelComboBox, weights.model_titles()["any"])
    click(opened.ui.applyButton)
    run(opened)
    shown = re.search(r"<b>Networks</b></td><td[^>]*>([^<]*)", opened.ui.resultsLabel.text)[1]
    assert re.match(r"T1 head \(brain-t1-gradient\), 9 cascades: MR of a fitting size, contrasts agree \(\d+ % ", shown)
