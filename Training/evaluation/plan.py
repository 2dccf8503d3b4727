"""What an evaluation is to compare, after looking at which data and systems there are."""

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
    """What is to be compared, after looking at what there is.

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
        """The system as it runs on a data set."""
        return systems.for_domain(system, data.domain)

    def runs(self) -> Iterable[tuple[DataSet, Pair, System, str]]:
        """Every (data set, pair, system, id) that can run; pairs outside, so that a pair is read once."""
        for data in self.config.datasets:
            if data.name not in self.pairs:
                continue
            able = [s for s in self.config.systems if s.name not in self.unavailable[data.name]]
            found = [(s, identity(data, s, self)) for s in (self.system(data, s) for s in able)]
            for pair in self.pairs[data.name]:
                for system, own_id in found:
                    yield data, pair, system, own_id


def identity(data: DataSet, system: System, plan: Plan) -> str:
    """What a row's result depends on beside its pair; a row with another id is not this one."""
    views = "+".join(n for n in ("stripped", "intra_subject") if getattr(data, n)) or "whole"
    measures = "+".join(sorted(plan.config.measures))
    return f"{systems.fingerprint(system, plan.place)}-{data.kind}-{views}-{data.landmarks}-{data.protocol}-{measures}"


def make_plan(settings: Config, place: Place, limit: int | None) -> Plan:
    """Look for data and systems.

    Raises:
        RegistrationError: a data set that is not optional is not there.
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
