"""Parts of `Training.evaluate` and `Training.report`: data sets, systems, workers, tables, figures."""
