"""The list of DeepSpeed's private names: true for this DeepSpeed, complete for our engine, and it tells what left."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from megatron_ext.config import ConfigError
from megatron_ext.engine import PipelineEngine, private

TABLES = (private.ENGINE_METHODS, private.ENGINE_SOURCES, private.ZERO_SOURCES, private.CONFIG_SOURCES)
LISTED = {name for table in TABLES for name in table}
OTHERS = {"_exit", "_replace", "_get_default_store", "_version"}  # of Python's os, of named tuples, and of torch


def test_nothing_is_missing_here() -> None:
    assert private.missing() == []
    private.check_version()


@pytest.mark.parametrize("name", sorted(private.ENGINE_METHODS))
def test_a_method_that_is_gone_is_named_with_what_it_was_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = next(c for c in DeepSpeedEngine.__mro__ if name in vars(c))
    monkeypatch.delattr(owner, name)
    assert private.missing() == [f"DeepSpeedEngine.{name}: {private.ENGINE_METHODS[name]}"]


def test_an_attribute_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    source = inspect.getsource

    def renamed(thing: type) -> str:
        return source(thing).replace("use_grad_accum_attribute", "use_another").replace("has_moe_layers", "has_moe")

    monkeypatch.setattr(inspect, "getsource", renamed)
    assert [line.split(":")[0] for line in private.missing()] == [
        "DeepSpeedEngine.has_moe_layers", f"{DeepSpeedZeroOptimizer.__name__}.use_grad_accum_attribute"]


def test_a_group_table_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(groups, "_EXPERT_PARALLEL_GROUP_RANKS")
    assert private.missing() == ["deepspeed.utils.groups._EXPERT_PARALLEL_GROUP_RANKS: pre-registered expert groups"]


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.0.0", "0.190.1"])
def test_another_version_is_refused_in_one_line(version: str) -> None:
    with pytest.raises(ConfigError) as raised:
        private.check_version(version)
    assert str(raised.value) == (f"deepspeed = '{version}': this version of megatron_ext works with DeepSpeed 0.19.*; "
                                 'pip install "deepspeed==0.19.*"')


def test_an_untried_version_is_taken_if_it_has_all_names(monkeypatch: pytest.MonkeyPatch) -> None:
    private.check_version("0.19.99")
    monkeypatch.delattr(DeepSpeedEngine, "_take_model_step")
    private.check_version(private.CHECKED)  # is not looked into
    with pytest.raises(ConfigError, match=r"deepspeed = '0.19.99': lacks DeepSpeedEngine._take_model_step"):
        private.check_version("0.19.99")


def test_every_private_name_that_the_engine_uses_is_listed() -> None:
    used: dict[str, str] = {}
    defined: set[str] = set()
    for path in Path(private.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                defined.add(node.name)
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                if isinstance(node.ctx, ast.Store):
                    defined.add(node.attr)
                else:
                    used[node.attr] = f"{path.name}:{node.lineno}"
    assert {name: where for name, where in used.items() if name not in defined | LISTED | OTHERS} == {}


def test_every_private_method_that_the_engine_overrides_is_listed() -> None:
    ours = {name for c in PipelineEngine.__mro__ if c.__module__.startswith("megatron_ext") for name in vars(c)}
    private_names = {name for name in ours if name.startswith("_") and not name.startswith("__")}
    assert private_names & set(dir(DeepSpeedEngine)) <= LISTED
