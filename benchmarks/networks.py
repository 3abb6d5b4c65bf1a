"""Parameters of every network under every method that makes sense for it.

Nothing is computed: networks are traced, CIFAR forms with 100 classes on their smallest image, ImageNet forms with
1,000 at 224 x 224. Keeps what results/networks.jsonl already holds, then writes networks.md.

  python -m benchmarks.networks
"""

import math

import jax
import jax.numpy as jnp
from tqdm import tqdm

from benchmarks import _results
from benchmarks._results import Record, Store
from mimicnorm_jax import models
from mimicnorm_jax.models import methods_of


def measure(net: str, method: str) -> Record:
    """One record."""
    imagenet = net.endswith("_imagenet")
    size = 224 if imagenet else 32
    model = models.create(net, method=method, num_classes=1000 if imagenet else 100)
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return {
        "net": net,
        "method": method,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])),
    }


def _order(record: Record) -> tuple[int, int]:
    return list(models.ARCHITECTURES).index(record["net"]), methods_of(record["net"]).index(record["method"])


STORE = Store("networks", lambda record: (record["net"], record["method"]), _order)


def table(records: list[Record]) -> str:
    """Parameters by network and method; a dash where a method is not for a network."""
    methods = list(dict.fromkeys(record["method"] for record in records))
    counts = {(record["net"], record["method"]): record["parameters"] for record in records}
    rows = [
        [f"`{net}`", *(f"{counts[net, method]:,}" if (net, method) in counts else "-" for method in methods)]
        for net in dict.fromkeys(record["net"] for record in records)
    ]
    return _results.table(["parameters", *(f"`{method}`" for method in methods)], rows)


def page(records: list[Record]) -> str:
    """The table."""
    return f"""# Networks under every method

`python -m benchmarks.networks`. Parameters; CIFAR forms with 100 classes, ImageNet forms with 1,000 at 224 x 224. A
dash where a method is not for a network.

{table(records)}
"""


def main() -> None:
    parser = _results.make_parser("networks", __doc__)
    args = parser.parse_args()
    held = STORE.read(args.results)
    missing = [(net, method) for net in models.ARCHITECTURES for method in methods_of(net) if (net, method) not in held]
    for net, method in tqdm([] if args.render else missing, desc="networks"):
        STORE.add(args.results, measure(net, method))
    STORE.write_page(args.results, page)


if __name__ == "__main__":
    main()
