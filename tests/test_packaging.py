"""Every way to install the project gives every module, its data files, its version and its command."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOP_PACKAGES = ("manifolds", "optim", "nets", "benchmarks")
IGNORED = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def shipped_files() -> set[str]:
    """Every source and data file of the packages, as it should lie in an installation."""
    files = (path for top in TOP_PACKAGES for path in (ROOT / top).rglob("*") if path.is_file())
    return {f"retract/{path.relative_to(ROOT)}" for path in files if "__pycache__" not in path.parts}


def modules() -> list[str]:
    paths = (name.removesuffix(".py") for name in shipped_files() if name.endswith(".py"))
    return sorted(name.removesuffix("/__init__").replace("/", ".") for name in paths)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree without what git ignores: builds write into their source folder."""
    return Path(shutil.copytree(ROOT, tmp_path_factory.mktemp("source") / "retract", ignore=IGNORED))


@pytest.fixture(scope="module")
def distributions(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel built from that sdist, as they would be published."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return {"wheel": wheel, "sdist": sdist}


def test_every_folder_with_python_files_is_a_listed_package() -> None:
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in shipped_files() if name.endswith(".py")}
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])


def test_wheel_holds_every_file_and_nothing_else(distributions: dict[str, Path]) -> None:
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    assert {n for n in names if ".dist-info/" not in n} == shipped_files()
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    core = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, flags=re.MULTILINE)
    assert core == ["torch", "geoopt", "numpy", "scipy", "opt_einsum", "tensorly"]


def test_sdist_holds_every_file(distributions: dict[str, Path]) -> None:
    with tarfile.open(distributions["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {name.removeprefix("retract/") for name in shipped_files()} | {"LICENSE", "README.md"} <= names


CHECK = f"""
import importlib, sys
from importlib import metadata
from importlib.resources import files
for name in {modules()!r}:
    importlib.import_module(name)
for name in {TOP_PACKAGES!r}:
    package = importlib.import_module("retract." + name)
    assert package.__version__ == metadata.version("retract") == {PROJECT["project"]["version"]!r}, name
    assert files(package).joinpath("py.typed").is_file(), name
    assert all(hasattr(package, public) for public in package.__all__), name
    assert str(files(package)).startswith(sys.argv[1]), f"{{name}} comes from {{files(package)}}"
"""


@pytest.mark.parametrize("kind", ["wheel", "sdist", "plain", "editable", "editable-strict"])
def test_install(kind: str, source: Path, distributions: dict[str, Path], tmp_path: Path) -> None:
    """Each kind of install, into an environment of its own that borrows this one's dependencies."""
    python = borrowing_environment(tmp_path / "venv")
    options = {
        "wheel": [distributions["wheel"]],
        "sdist": [distributions["sdist"]],
        "plain": [source],
        "editable": ["--editable", source],
        "editable-strict": ["--config-settings", "editable_mode=strict", "--editable", source],
    }
    pip_install(python, *options[kind])
    home = source if kind.startswith("editable") else tmp_path
    run(python, "-c", CHECK, home, cwd=tmp_path)
    assert "demo" in run(python.with_name("retract"), "--help", cwd=tmp_path)


def borrowing_environment(folder: Path) -> Path:
    """A new virtual environment that sees this environment's packages behind its own; returns its python."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (own,) = folder.glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (own / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))
    return folder / "bin" / "python"


def pip_install(python: Path, *what: str | Path) -> None:
    """Install ``what`` with the dependencies and the build tools that are there: nothing is downloaded."""
    options = ("--no-deps", "--ignore-installed", "--no-build-isolation")
    run(python, "-m", "pip", "install", *options, *what, cwd=python.parent)


@pytest.mark.slow
def test_a_type_checker_sees_the_types(source: Path, tmp_path: Path) -> None:
    """What py.typed promises: a user's mypy reads our annotations from an ordinary install."""
    python = borrowing_environment(tmp_path / "venv")
    pip_install(python, source)
    (tmp_path / "user.py").write_text("from retract.manifolds import PSI\nwrong: str = PSI().num_scales((3, 3))\n")
    command = [sys.executable, "-m", "mypy", "--python-executable", str(python), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'expression has type "int", variable has type "str"' in done.stdout
    assert done.stdout.count("error:") == 1
