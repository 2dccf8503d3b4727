"""Plans an evaluation: which systems run on which pairs, given the data and weights that exist."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from LDRCore.errors import RegistrationError
from Training.evaluation import datasets, systems, tables
from Training.evaluation.config import Config, DataSet, System
from Training.evaluation.datasets import Pair
from Training.evaluation.systems import Place


@dataclass(frozen=True)
class Plan:
    """Pairs and systems to compare, and those that are missing.

    Attributes:
        pairs: {data set name: its pairs}; a data set without files is missing here.
        no_data: {data set name: why it is not there} of optional data sets.
        unavailable: {data set name: {system name: why it cannot run}}.
    """

    config: Config
    place: Place
    pairs: dict[str, list[Pair]]
    no_data: dict[str, str]
    unavailable: dict[str, dict[str, str]]

    def system(self, data: DataSet, system: System) -> System:
        """Return the system as it runs on a data set."""
        return systems.for_domain(system, data.domain)

    def runs(self) -> Iterable[tuple[DataSet, Pair, System, str]]:
        """Yield every (data set, pair, system, id) that can run, pair by pair, so that each pair is read once."""
        for data in self.config.datasets:
            if data.name not in self.pairs:
                continue
            able = [s for s in self.config.systems if s.name not in self.unavailable[data.name]]
            identified = [(s, identity(data, s, self)) for s in (self.system(data, s) for s in able)]
            for pair in self.pairs[data.name]:
                for system, own_id in identified:
                    yield data, pair, system, own_id


def identity(data: DataSet, system: System, plan: Plan) -> str:
    """Return an id of everything but the pair that a row's result depends on."""
    views = "+".join(n for n in ("stripped", "intra_subject") if getattr(data, n)) or "whole"
    measures = "+".join(sorted(plan.config.measures))
    return f"{systems.fingerprint(system, plan.place)}-{data.kind}-{views}-{data.landmarks}-{data.protocol}-{measures}"


def make_plan(settings: Config, place: Place, limit: int | None) -> Plan:
    """Find the data and systems that exist.

    Raises:
        RegistrationError: a data set that is not optional is missing.
    """
    pairs, no_data, unavailable = {}, {}, {}
    for data in settings.datasets:
        try:
            pairs[data.name] = datasets.list_pairs(data)[:limit]
        except RegistrationError as error:
            if not data.optional:
                raise
            no_data[data.name] = str(error)
            continue
        why = {s.name: systems.unavailable(systems.for_domain(s, data.domain), place) for s in settings.systems}
        unavailable[data.name] = {name: text for name, text in why.items() if text}
    if settings.reference:
        tables.need_scipy()
    return Plan(settings, place, pairs, no_data, unavailable)
