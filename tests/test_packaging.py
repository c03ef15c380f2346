"""The package as people get it: a checkout on PYTHONPATH, editable, an sdist, a wheel; with a compiler and without.

Everything is built in a copy of the checkout, offline, with what is installed. Kernels are compiled without
optimisation, which changes their speed and nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = "megatron_ext/kernels/cpu/libmegatron_ext_cpu.so"
SHOW = (
    "import megatron_ext, megatron_ext.kernels.cpu as cpu, pathlib; print(megatron_ext.__file__); "
    "print(*sorted(p.name for p in pathlib.Path(cpu.__file__).parent.glob('*.so')))"
)

pytestmark = pytest.mark.skipif(find_spec("pip") is None, reason="this environment has no pip")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a command printed; fails with it. The environment knows nothing of this checkout."""
    env = {**os.environ, "CXXFLAGS": "-O0", "NVCC": "", "PIP_NO_INDEX": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    env |= environment  # (no cubins: tests/kernels compiles them)
    if "PYTHONPATH" not in environment:
        env.pop("PYTHONPATH", None)
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, text=True, capture_output=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def pip(*arguments: str | Path, cwd: Path) -> str:
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, cwd=cwd)


def copy_of_checkout(target: Path) -> Path:
    unwanted = (".git", ".venv", "build", "dist", "runs", "*.egg-info", "*.so", "*.cubin", "__pycache__", ".*_cache",
                "shared")
    return Path(shutil.copytree(ROOT, target, symlinks=True, ignore=shutil.ignore_patterns(*unwanted)))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_of_checkout(tmp_path_factory.mktemp("source") / "checkout")


@pytest.fixture(scope="module")
def sources(checkout: Path) -> set[str]:
    """Every file of the package by its name inside the package, which the symlink makes differ from its place."""
    suffixes = {".py", ".cpp", ".cu", ".cuh", ".h"}
    files = [
        path.relative_to(checkout) for folder in ("megatron_ext", "kernels") for path in checkout.glob(f"{folder}/**/*")
    ]
    names = {path.as_posix() for path in files if path.suffix in suffixes}
    return {f"megatron_ext/{name}" if name.startswith("kernels/") else name for name in names}


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the sdist unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    hook = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", hook, folder, cwd=checkout)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, so that it also shows the sdist to be complete."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, sdist, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_sdist_holds_every_source_and_nothing_built(sdist: Path, sources: set[str]) -> None:
    files = {path.relative_to(sdist).as_posix() for path in sdist.glob("**/*") if path.is_file()}
    assert sources - files == set()
    assert "megatron_ext/kernels/cpu/quantize.cpp" in sources
    assert {"LICENSE", "README.md", "Makefile", "setup.py", "tests/conftest.py", "megatron_ext/__init__.py"} <= files
    assert not [name for name in files if name.endswith((".so", ".pyc")) or name.startswith("kernels/")]


def test_the_wheel_holds_the_library_and_its_sources(wheel: Path, sources: set[str]) -> None:
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"megatron_ext-0.1.0-py3-none-{platform}.whl"
    with zipfile.ZipFile(wheel) as archive:
        files = set(archive.namelist())
    assert (sources | {LIBRARY}) - files == set()
    assert {name.split("/")[0] for name in files} == {"megatron_ext", "megatron_ext-0.1.0.dist-info"}


def test_the_wheel_works_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    pip("install", "-q", "--no-deps", "--target", tmp_path / "site", wheel, cwd=tmp_path)
    (tmp_path / "elsewhere").mkdir()
    # the deepspeed launcher puts its working directory first on the path, and that may hold a `kernels` of its own
    (tmp_path / "elsewhere" / "kernels").mkdir()
    shown = run(
        sys.executable, "-c", SHOW, cwd=tmp_path / "elsewhere", PYTHONPATH=f"{tmp_path}/elsewhere:{tmp_path}/site"
    )
    assert shown.split() == [f"{tmp_path}/site/megatron_ext/__init__.py", "libmegatron_ext_cpu.so"]


def test_a_checkout_works_on_pythonpath_before_anything_is_built(tmp_path: Path) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    shown = run(sys.executable, "-c", SHOW, cwd=tmp_path, PYTHONPATH=str(checkout))
    assert shown.split() == [f"{checkout}/megatron_ext/__init__.py"]


def test_an_editable_install_builds_in_place_and_needs_no_path(tmp_path: Path) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    (site / "tests_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")  # torch, setuptools, pip
    install = ("-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-build-isolation")
    run(python, *install, "--ignore-installed", "-e", checkout, cwd=tmp_path)
    assert run(python, "-c", SHOW, cwd=tmp_path).split() == [
        f"{checkout}/megatron_ext/__init__.py",
        "libmegatron_ext_cpu.so",
    ]
    assert (checkout / "kernels/cpu/libmegatron_ext_cpu.so").is_file()
    assert "doctor" in run(tmp_path / "venv" / "bin" / "megatron-ext", "--help", cwd=tmp_path)


@pytest.mark.parametrize(
    ("compiler", "said"), [("no-such-compiler", "no C++ compiler (no-such-compiler)"), ("false", "did not compile")]
)
def test_without_a_working_compiler_one_line_says_so_and_the_build_goes_on(
    tmp_path: Path, compiler: str, said: str
) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    printed = run(sys.executable, "setup.py", "--quiet", "build_ext", "--inplace", cwd=checkout, CXX=compiler)
    assert len(printed.splitlines()) == 1
    assert said in printed
    assert not list(checkout.glob("kernels/**/*.so"))
