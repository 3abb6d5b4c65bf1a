"""The supported pairs of Python and jax, each in an environment of its own, by one command: `nox`.

nox                                      # the fast tier in all of them; Pythons that are not there are an error
nox -s "tests(python='3.12', jax='0.12')" -- tests/functional
"""

import nox

PAIRS = [("3.11", "0.10"), ("3.12", "0.12"), ("3.13", "0.12")]
"""Python 3.11 ends at jax 0.10."""

nox.options.default_venv_backend = "uv|virtualenv"  # uv fetches a Python that is not there
nox.options.error_on_missing_interpreters = True


@nox.session
@nox.parametrize(("python", "jax"), PAIRS)
def tests(session: nox.Session, jax: str) -> None:
    """Installs the package with that jax, and runs the fast tier or what stands behind `--`."""
    session.install("-e", ".[test,plots,tensorboard]", f"jax=={jax}.*", f"jaxlib=={jax}.*")
    session.run("python", "-c", "import jax; print(jax.__version__)")
    session.run("python", "-m", "pytest", "-n", "2", "--dist", "loadfile", *session.posargs)
