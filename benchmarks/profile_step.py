"""Where the time of a training step goes, by kind of operation.

Traces steps of one network in one variant (see baselines.py) and sums the time of the compiled program's
operations by kind; operations that run at the same time count each. Writes results/profile_NET_VARIANT.md.

  python -m benchmarks.profile_step --net resnet50 --variant ours:mimicnorm
"""

import gzip
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import _results, baselines
from mimicnorm_jax.utils import log_line, write_text

STEPS = 3


def _events(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.rglob("*.trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def seconds_by_kind(net: str, variant: str, dtype: str, batch: int) -> Counter[str]:
    """Seconds a step, by the operation's name without its number."""
    case = baselines.training_step(net, variant, batch, jnp.dtype(dtype))
    step = case.compile()
    state, images, labels = case.init()
    state = jax.block_until_ready(step(state, images, labels))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(STEPS):
                state = step(state, images, labels)
            jax.block_until_ready(state)
        events = _events(Path(folder))
    kinds: Counter[str] = Counter()
    for event in events:
        name = event.get("args", {}).get("hlo_op")
        if event.get("ph") == "X" and name:
            kinds[re.sub(r"[.\d]+(\.clone)?$", "", name)] += event["dur"] / 1e6 / STEPS
    return kinds


def main() -> None:
    parser = _results.make_parser("profile_step", __doc__, render=False)
    parser.add_argument("--net", default="resnet50")
    parser.add_argument("--variant", default="ours:mimicnorm", choices=baselines.VARIANTS)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    kinds = seconds_by_kind(arguments.net, arguments.variant, arguments.dtype, arguments.batch)
    total = sum(kinds.values())
    about = _results.machine()
    rows = [(kind, f"{s:.3f}", f"{s / total:.1%}") for kind, s in kinds.most_common() if s > 0.003 * total]
    where = f"{about['device']}, {about['cores']} cores, jax {about['jax']}"
    text = f"""# A step of {arguments.net}, {arguments.variant}, {arguments.dtype}, batch {arguments.batch}

`python -m benchmarks.profile_step`. Mean of {STEPS} traced steps on {where}. Seed 0.

{_results.table(["operations", "s", "share"], [*rows, ("all", f"{total:.3f}", "")])}
"""
    path = arguments.results / f"profile_{arguments.net}_{arguments.variant.replace(':', '_')}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    log_line(f"wrote {path}")


if __name__ == "__main__":
    main()
