"""`megatron-ext convert`, `inspect` and `diff`, as a person runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from megatron_ext.cli import app
from megatron_ext.cli.convert import parse_size
from megatron_ext.config.errors import UserError
from tests.checkpoint import tiny


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.make(tmp_path / "source", "fp8", mtp=1, shards=2)


def test_convert_says_what_it_did_and_proves_it(source: Path, tmp_path: Path) -> None:
    done = cli("convert", source, tmp_path / "out", "--to", "hf", "--dtype", "bf16", "--shard-size", "40K", "--verify",
               "--workers", 2)
    assert done.exit_code == 0, done.output
    assert "hf -> hf" in done.output and "verified: " in done.output and "are the same" in done.output
    back = cli("convert", tmp_path / "out", tmp_path / "back", "--to", "hf", "--dtype", "fp8")
    assert back.exit_code == 0 and tiny.equal(tiny.load(source), tiny.load(tmp_path / "back"))


def test_a_plan_writes_nothing(source: Path, tmp_path: Path) -> None:
    done = cli("convert", source, tmp_path / "out", "--to", "deepseek", "--plan")
    assert done.exit_code == 0 and not (tmp_path / "out").exists()
    for words in ("carried beside: ", "multi-token prediction", "memory: ", "files: 2", "F8_E4M3"):
        assert words in done.output


def test_inspect(source: Path) -> None:
    done = cli("inspect", source)
    assert done.exit_code == 0
    for words in ("Hugging Face safetensors, deepseek_v3, 1 dense + 1 MoE layers + 1 for multi-token prediction",
                  "4 experts, 2 files", "hidden_size = 32", "F8_E4M3", "checksums: none"):
        assert words in done.output


def test_diff(source: Path, tmp_path: Path) -> None:
    cli("convert", source, tmp_path / "there", "--to", "deepseek")
    same = cli("diff", source, tmp_path / "there")
    assert same.exit_code == 0 and "the same: " in same.output
    other = tiny.make(tmp_path / "other", "fp8", mtp=1, seed=1)
    differs = cli("diff", source, other, "--top", 3)
    assert differs.exit_code == 1 and "more" in differs.output and "of the largest number" in differs.output


def test_errors_are_one_line(source: Path, tmp_path: Path) -> None:
    (source / "model-00001-of-00002.safetensors").unlink()
    for arguments in (("convert", source, tmp_path / "out", "--to", "hf"), ("inspect", source),
                      ("diff", source, source), ("convert", source, tmp_path / "out", "--to", "nothing"),
                      ("convert", source, tmp_path / "out", "--to", "hf", "--workers", -1),
                      ("convert", source, tmp_path / "out", "--to", "hf", "--config", tmp_path / "gone.json")):
        done = cli(*arguments)
        assert done.exit_code == 1 and done.output.startswith("error: ") and done.output.count("\n") == 1


def test_a_config_can_be_given(source: Path, tmp_path: Path) -> None:
    (source / "config.json").rename(tmp_path / "given.json")
    done = cli("convert", source, tmp_path / "out", "--to", "hf", "--config", tmp_path / "given.json")
    assert done.exit_code == 0 and tiny.equal(tiny.load(source), tiny.load(tmp_path / "out"))
    assert cli("inspect", tmp_path / "out").exit_code == 0


def test_sizes() -> None:
    assert [parse_size(text) for text in ("5GB", "500M", "1e9", "4096", "1.5k", "2TB")] == [
        5 * 10**9, 5 * 10**8, 10**9, 4096, 1500, 2 * 10**12]
    for text in ("", "GB", "5 apples", "infGB", "nan"):
        with pytest.raises(UserError, match="--shard-size"):
            parse_size(text)
