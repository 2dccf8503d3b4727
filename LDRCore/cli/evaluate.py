"""`ldr evaluate`."""

from __future__ import annotations

import argparse

from LDRCore.cli.files import Outcome, check_output_file, progress_bar, write_file
from LDRCore.evaluation import pairs


def run(options: argparse.Namespace) -> Outcome:
    """Measure one pair or a list of pairs."""
    show = progress_bar(options)
    if options.out is not None:
        check_output_file(options.out, options.overwrite)
    found = pairs.evaluate(
        pairs.listed(options),
        model={k: getattr(options, k) for k in ("model", "cascades", "device")} | {"refine_steps": options.refine},
        frame=options.frame,
        protocol=options.protocol,
        surface=not options.no_surface,
        learn2reg=options.learn2reg,
        overwrite=options.overwrite,
        keep_going=options.pairs is not None,
        progress=show,
    )
    if options.out is not None:
        write_file(options.out, lambda name: pairs.write_csv(found, name))
    return found, pairs.text(found)
