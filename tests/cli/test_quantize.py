"""`megatron-ext quantize`: the formulas against the kernels, known figures, files, and errors of one line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from megatron_ext.cli import app
from megatron_ext.cli.quantize import FORMATS, GENERATED, GRANULARITIES, SCALES, coarse
from megatron_ext.cli.quantize.measure import Scheme, compare, figures_of
from megatron_ext.cli.quantize.sources import Sample, generate

SMALL = ("--rows", 130, "--columns", 300)


def call(*arguments: object, code: int = 0) -> str:
    """What the command prints; on an error, its one line."""
    result = CliRunner().invoke(app, ["quantize", *map(str, arguments)])
    assert result.exit_code == code, result.output
    if code:
        assert result.stdout == "" and len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")
        return result.stderr
    return result.stdout


def sample(kind: str, rows: int = 256, columns: int = 1024) -> Sample:
    return Sample(kind, generate(kind, rows, columns, 0), (rows, columns))


def row_of(found: Sample, *scheme: object) -> dict:
    [row] = compare(found, [Scheme("chosen", *scheme)], 0)
    return row


@pytest.mark.parametrize("kind", GENERATED)
@pytest.mark.parametrize(("granularity", "block"), [("1x128", (1, 128)), ("128x128", (128, 128))])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_formula_is_what_the_kernels_do(kind, granularity, block, format, scale):
    x = generate(kind, 130, 300, 3)
    ours, theirs = coarse.by_formula(x, block, scale, format), coarse.quantize(x, granularity, scale, format)
    assert torch.equal(ours.values, theirs.values) and torch.equal(ours.limit, theirs.limit)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("granularity", "dims"), [("tensor", (0, 1)), ("row", 1), ("channel", 0)])
def test_what_shares_a_scale_uses_all_of_it(granularity, dims, format):
    x = generate("lognormal", 20, 50, 0)
    rounded = coarse.quantize(x, granularity, "fp32", format)
    amax = x.abs().amax(dims, keepdim=True)
    torch.testing.assert_close(rounded.limit, amax, rtol=1e-6, atol=0)
    torch.testing.assert_close(rounded.values.abs().amax(dims, keepdim=True), amax, rtol=1e-6, atol=0)
    powers = coarse.quantize(x, granularity, "pow2", format).limit / coarse.largest(format)
    assert torch.equal(powers.log2(), powers.log2().round())
    up = powers * coarse.largest(format) / amax
    assert bool(((up >= 1) & (up < 2)).all())


@pytest.mark.parametrize("format", FORMATS)
def test_a_scale_that_is_a_power_of_two_stays(format):
    x = torch.tensor([[coarse.largest(format) * 8, 1.0]])
    assert coarse.quantize(x, "tensor", "pow2", format).limit.item() == coarse.largest(format) * 8


def test_e5m6_rounds_to_six_bits_and_to_even():
    x = torch.tensor([[65024.0, 1 + 2.0**-7, 1 + 3 * 2.0**-7, 1.5 * 2.0**-20, 2.5 * 2.0**-20, -0.4 * 2.0**-20]])
    rounded = coarse.by_formula(x, "tensor", "fp32", "e5m6")
    assert rounded.values.tolist() == [[65024.0, 1.0, 1 + 2.0**-5, 2.0**-19, 2.0**-19, -0.0]]


def test_known_figures():
    """The tables of the DeepSeek-V3 recipe: N(0, 1), outliers, gradients."""
    gaussian = sample("gaussian", 512, 4096)
    for granularity, decibels in (("tensor", 31.5), ("row", 31.5), ("1x128", 31.8), ("128x128", 31.6)):
        assert row_of(gaussian, granularity, "fp32", "e4m3")["snr_db"] == pytest.approx(decibels, abs=0.1)
    for format, decibels in (("e5m2", 25.6), ("e4m3", 31.5), ("e5m6", 49.6)):
        row = row_of(gaussian, "1x128", "pow2", format)
        assert row["snr_db"] == pytest.approx(decibels, abs=0.1) and row["clamped"] == 0
    channels = sample("outlier-channels", 512, 4096)
    row, tile, two = (row_of(channels, *scheme, "e4m3")["snr_db"]
                      for scheme in (("row", "fp32"), ("1x128", "fp32"), ("1x128", "pow2")))
    assert row == pytest.approx(33.0, abs=0.3) and tile > 39 and two == pytest.approx(31.5, abs=0.2)
    gradients = sample("heavy-tail", 512, 4096)
    tensor, tile, block = (row_of(gradients, granularity, "fp32", "e4m3")["flushed"]
                           for granularity in ("tensor", "1x128", "128x128"))
    assert tensor > 0.05 and tile < 1e-4 and 0.005 < block < 0.05


def test_a_static_range_clamps_what_has_grown():
    schemes = [Scheme("range", "tensor", "fp32", "e4m3", static, drift) for drift in (1, 4, 16) for static in (1, 0)]
    rows = list(compare(sample("lognormal", 512, 4096), schemes, 0))
    static, dynamic = rows[::2], rows[1::2]
    assert static[1]["snr_db"] < 13 and static[2]["snr_db"] < 7 and all(row["snr_db"] > 31 for row in dynamic)
    assert 0.2 < static[1]["clamping_error"] < 0.4 < static[2]["clamping_error"]
    assert static[2]["clamped"] > static[1]["clamped"] > 0 and all(row["clamped"] == 0 for row in dynamic)
    assert static[1]["gemm_error"] == pytest.approx(static[1]["clamping_error"], rel=0.1)  # clamping is what hurts


def test_figures_by_hand():
    x = torch.tensor([[4.0, 1.0, 0.0, -1.0]])
    rounded = coarse.Rounded(torch.tensor([[2.0, 1.0, 0.0, 0.0]]), torch.tensor([[2.0]]))
    figures = figures_of(x, rounded, 0.0)
    assert figures.snr_db == pytest.approx(10 * torch.log10(torch.tensor(18 / 5)).item())
    assert (figures.mae, figures.clamped, figures.flushed) == (0.5, 0.25, 0.25)
    assert figures.clamping_error == pytest.approx((4 / 18) ** 0.5)
    assert figures_of(x, coarse.Rounded(x, torch.tensor([[4.0]])), 0.0).snr_db is None


def test_table_json_and_picture(tmp_path):
    out = call(*SMALL, "--json", tmp_path / "q.json", "--picture", tmp_path / "made" / "q.svg", "--drift", 2)
    rows = json.loads((tmp_path / "q.json").read_text())
    assert {row["tensor"] for row in rows} == set(GENERATED) and len(rows) == len(GENERATED) * (10 + 3 + 3)
    assert all(row["drift"] == (2 if row["section"] == "range" else 1) for row in rows)
    line = next(line.split() for line in out.splitlines() if line.startswith("1x128    fp32"))
    first = next(row for row in rows if (row["granularity"], row["scale"]) == ("1x128", "fp32"))
    assert line[2:4] == ["E4M3", f"{first['snr_db']:.1f}"] and line[-1] == f"{first['gemm_error']:.2%}"
    assert "x2 static tensor" in out and "clip err" in out and "…" not in out
    assert "heavy-tail" in (tmp_path / "made" / "q.svg").read_text()


def test_every_combination_of_what_is_chosen(tmp_path):
    call("gaussian", *SMALL, "--scale", "pow2", "--format", "e5m6", "--json", tmp_path / "q.json", "--picture",
         tmp_path / "q.png")
    rows = json.loads((tmp_path / "q.json").read_text())
    assert [(row["granularity"], row["scale"], row["format"]) for row in rows] == [(g, "pow2", "e5m6")
                                                                                   for g in GRANULARITIES]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tensors = {"layers.0.up.weight": torch.randn(64, 200).bfloat16(), "layers.0.norm.weight": torch.ones(200),
               "layers.1.up.weight": torch.randn(3, 64, 200), "ids": torch.arange(9).view(3, 3),
               "bad": torch.tensor([[1.0, float("nan")], [float("inf"), 1.0]]), "zeros": torch.zeros(4, 4),
               "done": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_tensors_of_a_file(file, tmp_path):
    out = call(file, "--tensor", "layers.*.weight", "--json", tmp_path / "q.json", "--rows", 100)
    rows = json.loads((tmp_path / "q.json").read_text())
    assert {row["tensor"]: row["part"] for row in rows} == {"layers.0.up.weight": None,
                                                            "layers.1.up.weight": [100, 200]}
    assert "layers.1.up.weight 3x64x200, of which the first 100x200" in out
    quantised = {row["tensor"] for row in rows if row["snr_db"] is not None}
    assert quantised == {"layers.0.up.weight", "layers.1.up.weight"}


@pytest.mark.parametrize(("arguments", "message"), [
    (("gausian",), r"^error: SOURCE = 'gausian': must be one of .*did you mean 'gaussian'\?$"),
    (("nowhere/model.safetensors",), r"^error: nowhere/model\.safetensors: no such file$"),
    (("nowhere/model",), r"nowhere/model: no such file; a SOURCE is"),
    ((Path(__file__).parent,), "is a folder; give one of the .safetensors"),
    ((__file__,), "not a safetensors file"),
    (("gaussian", "--tensor", "a*"), r"--tensor = \['a\*'\]: .*no SOURCE is a \.safetensors file"),
    (("gaussian", "--granularity", "1x12"), "--granularity = '1x12': must be one of .*did you mean '1x128'"),
    (("gaussian", "--scale", "pow"), "--scale = 'pow': .*did you mean 'pow2'"),
    (("gaussian", "--format", "fp4"), "--format = 'fp4': must be one of e4m3, e5m2, e5m6"),
    (("gaussian", "--drift", 0), r"--drift = 0\.0: a factor is finite and above 0"),
    (("gaussian", "--rows", 1), r"--rows = 1: must be 2 or more"),
    (("gaussian", "--columns", -1), r"--columns = -1: must be 2 or more"),
    (("gaussian", "--seed", -1), r"--seed = -1: must be 0 or more"),
    (("gaussian", "--picture", "q.gif"), r"q\.gif: a picture's name ends in one of \.png"),
])
def test_errors_are_one_line(arguments, message):
    assert re.search(message, call(*arguments, code=1))


@pytest.mark.parametrize(("pattern", "message"), [
    ("layers.0.up.wieght", r"--tensor = .*: matches no tensor of .*did you mean 'layers\.0\.up\.weight'\?$"),
    ("ids", "tensor ids: has dtype I64; only floating-point"),
    ("bad", "tensor bad: 2 of 4 numbers are NaN or infinite"),
    ("zeros", "tensor zeros: all 16 numbers are zero"),
    ("done", "tensor done: has dtype F8_E4M3, which is quantised already"),
    ("*.norm.*", r"tensor layers\.0\.norm\.weight: has shape \[200\]; blocks need a matrix"),
    ("*", "tensor bad: 2 of 4"),
])
def test_tensors_that_cannot_be_quantised(file, pattern, message):
    assert re.search(message, call(file, "--tensor", pattern, code=1))


def test_too_many_tensors_are_not_taken_silently(tmp_path):
    save_file({f"w{i}": torch.ones(2, 2) for i in range(13)}, tmp_path / "m.safetensors")
    assert "chooses 13 tensors of" in call(tmp_path / "m.safetensors", code=1)
