"""The tables of results in README.md and docs/: each a function of the folder of records, registered under a name."""

from benchmarks.tables import memory, studies, summary, training
from benchmarks.tables.registry import TABLES

__all__ = ["TABLES", "memory", "studies", "summary", "training"]
