"""Forms of the study of sharpness are records of their own."""

from benchmarks import sharpness
from benchmarks._results import RESULTS


def test_what_one_form_has_measured_the_other_has_not(tmp_path):
    """The committed records are small ones; a full one has rows of its own and changes no other."""
    before = list(sharpness.STORE.read(RESULTS).values())
    sharpness.STORE.add(tmp_path, *before)
    assert not dict(sharpness.missing("small", set(sharpness.STORE.read(tmp_path)), [0], str(tmp_path)))
    full = dict(sharpness.missing("full", set(sharpness.STORE.read(tmp_path)), [0], str(tmp_path)))
    assert len(full) == len(sharpness.ARMS) + 2 * len(sharpness.NORMS)  # without photographs
    small = next(record for record in before if (record["part"], record["net"]) == ("norms", "mlp"))
    new = small | {"form": "full", "eigenvalue": 2 * small["eigenvalue"]}
    sharpness.STORE.add(tmp_path, new)
    after = list(sharpness.STORE.read(tmp_path).values())
    rows = sharpness.norms_table(after).splitlines()
    assert [row for row in rows if "full" in row] == [sharpness.norms_table([new]).splitlines()[2]]
    assert [row for row in rows if "full" not in row] == sharpness.norms_table(before).splitlines()
    done = set(sharpness.STORE.read(tmp_path))
    assert len(dict(sharpness.missing("full", done, [0], str(tmp_path)))) == len(full) - 1
