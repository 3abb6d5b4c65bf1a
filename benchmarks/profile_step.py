"""Where the time of a training step goes, by kind of operation.

Traces steps of one network in one variant (see rivals.py) and sums the time of the compiled program's
operations by kind; operations that run at the same time count each. Writes profile_NET_VARIANT.md
to benchmarks/results.

  python benchmarks/profile_step.py --net resnet50 --variant ours:mimicnorm
"""

import argparse
import gzip
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import rivals

from mimicnorm_jax.utils import environment
from mimicnorm_jax.utils.console import log_line
from mimicnorm_jax.utils.files import write_text

RESULTS = Path(__file__).parent / "results"
STEPS = 3


def _events(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.rglob("*.trace.json.gz")
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def seconds_by_kind(net: str, variant: str, dtype: str, batch: int) -> Counter[str]:
    """Seconds a step, by the operation's name without its number."""
    subject = rivals.subject(net, variant, batch, jnp.dtype(dtype))
    step = subject.compiled()
    state, images, labels = subject.start()
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet50")
    parser.add_argument("--variant", default="ours:mimicnorm", choices=rivals.VARIANTS)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--batch", type=int, default=64)
    arguments = parser.parse_args()
    kinds = seconds_by_kind(arguments.net, arguments.variant, arguments.dtype, arguments.batch)
    total = sum(kinds.values())
    about = environment.describe()
    text = [
        f"# A step of {arguments.net}, {arguments.variant}, {arguments.dtype}, batch {arguments.batch}",
        "",
        f"`python benchmarks/profile_step.py`. Mean of {STEPS} traced steps on {about['device']}, {about['cores']} "
        f"cores, jax {about['jax']}. Seed 0.",
        "",
        "| operations | s | share |",
        "|---|---|---|",
        *(f"| {kind} | {s:.3f} | {s / total:.1%} |" for kind, s in kinds.most_common() if s > 0.003 * total),
        f"| all | {total:.3f} | |",
    ]
    name = f"profile_{arguments.net}_{arguments.variant.replace(':', '_')}.md"
    write_text(RESULTS / name, "\n".join(text) + "\n")
    log_line(f"wrote {RESULTS / name}")


if __name__ == "__main__":
    main()
