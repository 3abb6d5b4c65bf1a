"""Forms of the parts of stacked parameters, which the turns of a loop take one by one."""

from collections.abc import Sequence
from dataclasses import replace

from mimicnorm_jax.diagnostics.tracing.forms import CONSTANT, OTHER, Constant, Entries, Form, Other, Sums, Uniform


def part(form: Form, index: int, size: int) -> Form:
    """What the part at `index` of the first axis is, if the whole is of `form` and the part has `size` numbers."""
    if isinstance(form, Uniform):
        return form
    if isinstance(form, Constant):
        return Uniform(object()) if size == 1 else CONSTANT
    if not isinstance(form, Entries) or (0 in form.centered | form.repeated and not form.single):
        return OTHER
    centered, repeated = (frozenset(axis - 1 for axis in axes if axis) for axes in (form.centered, form.repeated))
    return replace(form, layout=(*form.layout, ("part", index)), centered=centered, repeated=repeated)


def stacked(forms: Sequence[Form]) -> Form:
    """What values are that are put beside one another."""
    moved = any(isinstance(form, Other | Sums) or (isinstance(form, Entries) and not form.single) for form in forms)
    return OTHER if moved else CONSTANT


def disjoint(first: Entries, second: Entries) -> bool:
    """Whether two values are of different entries of the same parameter: parts at two places of the same whole.

    Without repeated entries, equal changes of shape make the same whole of a parameter.
    """
    if first.leaf != second.leaf or first.repeated or second.repeated:
        return False
    for one, other in zip(first.layout, second.layout, strict=False):
        if one != other:
            return one[0] == other[0] == "part"
    return False
