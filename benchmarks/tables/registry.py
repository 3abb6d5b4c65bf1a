"""Where tables stand under their names."""

from collections.abc import Callable
from pathlib import Path

from benchmarks._results import Record, Store

Table = Callable[[Path], str]
TABLES: dict[str, Table] = {}
"""Every table by name."""
NETS = {
    "resnet50_imagenet": "ResNet-50, 224 x 224",
    "resnet50": "ResNet-50",
    "resnet18": "ResNet-18",
    "vgg16": "VGG-16",
    "squeezenet": "SqueezeNet",
    "shufflenetv2_x1": "ShuffleNetV2",
    "mobilenetv2": "MobileNetV2",
}


def named(name: str) -> Callable[[Table], Table]:
    """Registers a table."""

    def register(function: Table) -> Table:
        TABLES[name] = function
        return function

    return register


def or_nothing(of: Callable[[list[Record]], str], store: Store, results: Path) -> str:
    """A table of a study's records, if it has a row."""
    whole = of(list(store.read(results).values()))
    return whole if whole.count("\n") > 1 else "Nothing yet."
