"""Builds sdist and wheel, checks them, and uses the wheel from outside of the repository.

  python tools/check_release.py [--out DIR]

The wheel is built from the sdist, and installed into an environment that holds nothing but it: what it depends on is
read from the environment of this command, so nothing is downloaded. Needs the extra [release]."""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = "import mimicnorm_jax as m; print(m.__file__, m.__version__)"


def _run(*command: str | Path, cwd: Path = ROOT, code: int = 0) -> str:
    """Runs a command, shows what it says if it ends with another code, and returns it."""
    print("+", *command, flush=True)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != code:
        raise SystemExit(f"{done.stdout}{done.stderr}\nerror: exit code {done.returncode} instead of {code}")
    return done.stdout + done.stderr


def _require(found: bool, said: str) -> None:
    if not found:
        raise SystemExit(f"error: {said}")


def _environment(folder: Path) -> Path:
    """An environment that sees the packages of this one, but not what this one has installed as editable."""
    venv.create(folder, with_pip=False)
    (python,) = [path for path in (folder / "bin" / "python", folder / "Scripts" / "python.exe") if path.exists()]
    site = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # Folders that a .pth file names are searched after the environment's own, and their own .pth files are not read.
    seen = dict.fromkeys([sysconfig.get_path("purelib"), *(path for path in sys.path if path.endswith("-packages"))])
    Path(site, "of_the_caller.pth").write_text("\n".join(seen) + "\n")
    return python


def main() -> int:
    """Builds and checks; returns 0 or ends with an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that keeps sdist and wheel; default: none does")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dist = arguments.out.resolve() if arguments.out else folder / "dist"
        _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist)
        (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
        _run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)

        python = _environment(folder / "venv")
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index")
        _run(*pip, "--ignore-installed", wheel)
        file, version = _run(python, "-c", IMPORTED, cwd=folder).split()
        _require(Path(file).is_relative_to(folder), f"{file} is imported, not the wheel")
        _require(f"-{version}-" in wheel.name, f"version {version} of {wheel.name}")

        mimicnorm = python.with_name("mimicnorm")
        _require("mimicnorm report" in _run(mimicnorm, "--help", cwd=folder), "no `report` in the help")
        _run(mimicnorm, "train", "--config.epochs=3", "--workdir=run", cwd=folder)
        said = _run(mimicnorm, "train", "--config=configs/cifar100.py", "--config.data_dir=none", cwd=folder, code=2)
        _require("cifar100 is not prepared under none" in said, said)
        _run(mimicnorm, "report", "run", "--out", "run.html", cwd=folder)
        print(f"{wheel.name} and {sdist.name} are ready to be published")
    return 0


if __name__ == "__main__":
    sys.exit(main())
