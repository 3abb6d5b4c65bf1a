"""Diagnostics of runs: the only place that knows training and diagnostics."""
