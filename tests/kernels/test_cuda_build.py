"""The machine code of the CUDA kernels: compiles for sm_90a, keeps everything in registers, uses what Hopper has."""

from __future__ import annotations

import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_ext.kernels.cuda import cubins, tiles

NVCC = cubins.compiler()
ROOT = Path(__file__).parents[2]
KERNELS = {
    *(f"dense_{kind}_{tile}" for kind in ("1d2d", "1d1d") for tile in tiles.TILES),
    *(f"grouped_{tile}" for tile in tiles.TILES),
    *(f"wgrad_{tile}" for tile in tiles.TILES if tile != "small"),
}


def disassembler() -> str | None:
    """nvdisasm of PATH, or the one that triton's wheel brings."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = importlib.util.find_spec("triton")
    places = spec.submodule_search_locations if spec else None
    return shutil.which("nvdisasm", path=f"{next(iter(places))}/backends/nvidia/bin") if places else None


# ---- what nvcc makes


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, str]]:
    """Cubin and the assembler's report of each module."""
    if NVCC is None:
        pytest.skip("needs nvcc")
    folder = tmp_path_factory.mktemp("cubins")

    def compile(module: str) -> tuple[Path, str]:
        target, source = folder / f"{module}.cubin", cubins.FOLDER / f"{module}.cu"
        done = subprocess.run([NVCC, *cubins.FLAGS, "-Xptxas=-v", str(source), "-o", str(target)],
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return target, done.stdout + done.stderr

    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(cubins.MODULES, pool.map(compile, cubins.MODULES), strict=True))
    # of processors, for others may be at work here: some 10 s
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 90
    return found


def test_every_kernel_keeps_its_numbers_in_registers(compiled: Mapping[str, tuple[Path, str]]) -> None:
    report = "".join(text for _, text in compiled.values())
    assert set(re.findall(r"Compiling entry function '(\w+)' for 'sm_90a'", report)) == KERNELS
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert stacks == [("0", "0", "0")] * len(KERNELS)
    # 168 x 384 threads fill the register file; setmaxnreg moves them from there
    assert set(re.findall(r"Used (\d+) registers", report)) == {"168"}


def test_the_assembler_has_nothing_to_say(compiled: Mapping[str, tuple[Path, str]]) -> None:
    """No "wgmma serialized" (C7510 to C7514), no setmaxnreg ignored (C7508)."""
    for _, text in compiled.values():
        assert not re.search(r"warning|C75\d\d|serializ", text, re.IGNORECASE), text


def test_machine_code(compiled: Mapping[str, tuple[Path, str]]) -> None:
    if disassembler() is None:
        pytest.skip("needs nvdisasm, of the CUDA toolkit or of triton's wheel")
    found = set()
    for cubin, _ in compiled.values():
        listing = subprocess.run([disassembler(), str(cubin)], capture_output=True, text=True, check=True).stdout
        parts = re.split(r"^\.text\.(\w+):$", listing, flags=re.MULTILINE)[1:]
        for name, code in zip(parts[::2], parts[1::2], strict=True):
            found.add(name)
            count = {op: len(re.findall(rf"\b{op}\b", code)) for op in ("QGMMA", "USETMAXREG", "UTMALDG", "LDL", "STL")}
            assert count["USETMAXREG"] == 2 and count["UTMALDG"] >= 3, (name, count)
            assert count["LDL"] == count["STL"] == 0, (name, count)
            # two products a step, or five places in the loop that keeps two in flight; 4 x 32 columns each
            assert count["QGMMA"] == (8 if "large" in name else 16), (name, count)
            # accumulators of a product are waited for once, and one product stays in flight behind another
            waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", code)
            assert sorted(waits) == (["0", "0"] if "large" in name else ["0", "0", "1", "1", "1"]), name
            if "pair" in name:
                assert "MULTICAST" in code and "UCGABAR_ARV" in code
            if name.startswith("wgrad"):
                assert "REDG.E.ADD.F32x4" in code, name  # four numbers are added at a time, in L2
            assert "MEMBAR.ALL.GPU" not in _between_products(code), name
    assert found == KERNELS


def _between_products(code: str) -> str:
    """The code from the first product to the last: the loop."""
    return code[code.index("QGMMA") : code.rindex("QGMMA")]


# ---- cubins.py and setup.py, with compilers that are scripts


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def working(path: Path, version: str = "13.0") -> Path:
    """An nvcc that notes each call beside itself and writes a cubin of nothing."""
    return script(path, f"""
        if [ "$1" = --version ]; then echo "Cuda compilation tools, release {version}, V{version}.1"; exit; fi
        echo "$@" >> "$0.calls"
        while [ "$1" != -o ]; do shift; done
        sleep 0.2; printf '\\177ELF' > "$2"
    """)


def broken(path: Path) -> Path:
    return script(path, '[ "$1" = --version ] && echo "release 13.0" || { echo "nothing works" >&2; exit 3; }')


FIND = """
import runpy, sys
cubins = runpy.run_path(sys.argv[1])
try:
    print(cubins["find"]("dense", tuple(map(int, sys.argv[2].split(".")))))
except cubins["CubinError"] as error:
    print("CubinError:", error)
"""


def environment(cache: Path, **changes: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    return {**kept, "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache), **changes}


@pytest.fixture()
def sources(tmp_path: Path) -> Path:
    """The backend's folder as it comes without compiled kernels."""
    return Path(shutil.copytree(cubins.FOLDER, tmp_path / "cuda", ignore=shutil.ignore_patterns("*.cubin")))


def find(sources: Path, driver: str, env: Mapping[str, str], count: int = 1) -> list[str]:
    """What `cubins.find` said in each of `count` processes started at once."""
    command = [sys.executable, "-S", "-c", FIND, str(sources / "cubins.py"), driver]  # -S: no site-packages
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    return [process.communicate(timeout=120)[0].strip() for process in started]


def test_compiled_on_first_use_and_then_found(sources: Path, tmp_path: Path) -> None:
    nvcc = working(tmp_path / "bin" / "nvcc")
    env = environment(tmp_path / "cache", NVCC=str(nvcc))
    expected = tmp_path / "cache" / "megatron_ext" / "cubins" / f"dense-{cubins.digest()}-cuda13.0.cubin"
    assert find(sources, "13.0", env, count=2) == [str(expected)] * 2  # two ranks at once
    assert expected.read_bytes() == b"\x7fELF"
    calls = len(Path(f"{nvcc}.calls").read_text().splitlines())
    assert find(sources, "13.1", env) == [str(expected)]
    assert len(Path(f"{nvcc}.calls").read_text().splitlines()) == calls
    assert [path.name for path in expected.parent.iterdir()] == [expected.name]  # nothing unfinished stays


@pytest.mark.parametrize(("home", "driver", "said"), [
    (None, "13.0", "CubinError: no compiled kernels came with the package, and there is no nvcc to compile them"),
    ("broken", "13.0", "nvcc failed on dense.cu: nothing works"),
    ("13.0", "12.4", "is of CUDA 13.0: a driver of CUDA 12.4 is too old"),
    ("readonly", "13.0", "cannot compile into"),
], ids=["no nvcc", "broken", "driver too old", "no cache"])  # fmt: skip
def test_one_line_says_what_is_missing(sources: Path, tmp_path: Path, home: str | None, driver: str, said: str) -> None:
    env, cache = {"NVCC": "no-such-nvcc"}, tmp_path / "cache"
    if home == "broken":
        env = {"NVCC": str(broken(tmp_path / "nvcc"))}
    elif home is not None:
        working(tmp_path / "toolkit" / "bin" / "nvcc")
        env = {"CUDA_HOME": str(tmp_path / "toolkit")}
        if home == "readonly":
            cache.write_text("a file where the folder should be")
    (line,) = find(sources, driver, environment(cache, **env))
    assert said in line and "\n" not in line


def test_a_cubin_of_a_newer_toolkit_is_passed_over(sources: Path, tmp_path: Path) -> None:
    cache = tmp_path / "megatron_ext" / "cubins"
    cache.mkdir(parents=True)
    for version in ("12.8", "13.0"):
        (cache / f"dense-{cubins.digest()}-cuda{version}.cubin").write_bytes(b"\x7fELF")
    (line,) = find(sources, "12.9", environment(tmp_path, NVCC="no-such-nvcc"))
    assert line == str(cache / f"dense-{cubins.digest()}-cuda12.8.cubin")


def test_a_cubin_of_other_sources_is_not_found(sources: Path, tmp_path: Path) -> None:
    env = environment(tmp_path, NVCC="no-such-nvcc")
    cubin = sources / f"dense-{cubins.digest()}-cuda13.0.cubin"
    cubin.write_bytes(b"\x7fELF")
    assert find(sources, "13.0", env) == [str(cubin)]
    with (sources / "gemm.cuh").open("a") as file:
        file.write("// changed\n")
    (line,) = find(sources, "13.0", env)
    assert line.startswith("CubinError: no compiled kernels")


@pytest.fixture()
def checkout(tmp_path: Path) -> Path:
    """Enough of the package for setup.py."""
    target = tmp_path / "checkout"
    (target / "megatron_ext").mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.cubin", "*.cpp")
    shutil.copytree(ROOT / "kernels", target / "kernels", ignore=ignored)
    (target / "kernels" / "cpu" / "empty.cpp").write_text("")
    (target / "megatron_ext" / "kernels").symlink_to("../kernels")
    return target


def set_up(checkout: Path, nvcc: Path | str) -> str:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    env = {**os.environ, "NVCC": str(nvcc)}
    return subprocess.run(command, cwd=checkout, env=env, text=True, capture_output=True, check=True).stdout


def test_setup_compiles_cubins_and_replaces_old_ones(checkout: Path, tmp_path: Path) -> None:
    old = checkout / "kernels" / "cuda" / "dense-0123456789ab-cuda12.0.cubin"
    old.write_bytes(b"")
    assert set_up(checkout, working(tmp_path / "nvcc")) == ""
    names = {f"{module}-{cubins.digest()}-cuda13.0.cubin" for module in cubins.MODULES}
    assert {path.name for path in (checkout / "kernels" / "cuda").glob("*.cubin")} == names
    assert (checkout / "kernels" / "cpu" / "libmegatron_ext_cpu.so").is_file()


def test_setup_without_cubins_on_request(checkout: Path) -> None:
    assert set_up(checkout, "") == ""
    assert not list(checkout.glob("kernels/cuda/*.cubin"))


@pytest.mark.parametrize(("nvcc", "said"), [("no-such-nvcc", "no nvcc, CUDA kernels not built"),
                                            ("broken", "CUDA kernels not built (")])  # fmt: skip
def test_setup_says_one_line_and_goes_on(checkout: Path, tmp_path: Path, nvcc: str, said: str) -> None:
    printed = set_up(checkout, broken(tmp_path / "nvcc") if nvcc == "broken" else nvcc)
    assert len(printed.splitlines()) == 1 and said in printed
    assert (checkout / "kernels" / "cpu" / "libmegatron_ext_cpu.so").is_file()
