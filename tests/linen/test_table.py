import jax
import jax.numpy as jnp
from flax import linen as nn

from mimicnorm_jax import models
from mimicnorm_jax.functional import KernelTransform, center
from mimicnorm_jax.linen import CenteredConv, Transformed, find_kernels, tabulate

WIDE = {"force_terminal": False, "width": 400}


def _column(text, name):
    """By path, what the table says of each row, joined over its lines."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    header = next(line for line in text.splitlines() if line.startswith("┃"))
    place = [cell.strip() for cell in header.split("┃")[1:-1]].index(name)
    return {cells[0]: cells[place] for cells in lines if cells[0]}


def test_a_table_says_of_every_kernel_whether_it_is_transformed():
    model, image = models.create("resnet8", num_classes=10, width=0.5), jnp.ones((1, 8, 8, 3))
    text = tabulate(model, jax.random.key(0), console_kwargs=WIDE)(image)
    said = {path: cell for path, cell in _column(text, "kernel").items() if cell}
    found = find_kernels(model, image)
    assert said == {
        "/".join(path[:-1]): "center: bool[0]" if one.transformed else "raw: bool[0]" for path, one in found.items()
    }
    assert {"center: bool[0]", "raw: bool[0]"} == set(said.values())


def test_no_number_of_flax_own_table_changes():
    block = Transformed(nn.MultiHeadDotProductAttention(2), KernelTransform(center))
    tokens = jnp.ones((1, 5, 8))
    ours = tabulate(block, jax.random.key(0), console_kwargs=WIDE)(tokens)
    flax = nn.tabulate(block, jax.random.key(0), console_kwargs=WIDE)(tokens)
    assert _column(ours, "params") == _column(flax, "params")
    assert ours.splitlines()[-2].strip() == flax.splitlines()[-2].strip()  # the total
    assert "kernel" not in flax.splitlines()[3]


def test_layers_that_are_lifted_without_the_mark_are_in_the_table():
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return CenteredConv(8, (3, 3), name="conv")(x), None

    net = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)()
    x = jnp.ones((1, 6, 6, 8))
    ours, flax = (table(net, jax.random.key(0), console_kwargs=WIDE)(x, None) for table in (tabulate, nn.tabulate))
    assert _column(ours, "params") == _column(flax, "params")
