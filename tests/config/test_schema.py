"""The `megatron_ext` section: defaults, and one sentence per mistake, naming key, value and what to write instead."""

from __future__ import annotations

import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_ext.checkpoint.convert.formats import FORMATS
from megatron_ext.config import ConfigError, MegatronExtConfig, parse_section
from megatron_ext.config.schema import SCHEDULES
from megatron_ext.pipeline.schedules import NAMES

KEYS = {part: tuple(field.annotation.model_fields) for part, field in MegatronExtConfig.model_fields.items()
        if hasattr(field.annotation, "model_fields")}


def parse(section):
    return parse_section({"megatron_ext": section})


def message(section) -> str:
    with pytest.raises(ConfigError) as error:
        parse(section)
    assert isinstance(error.value, ValueError)
    return str(error.value)


def test_defaults_without_a_section():
    assert parse_section({"train_batch_size": 8}).resolved() == {
        "pipeline": {"schedule": "dualpipe", "stages": None, "chunks": 1, "placement": None, "memory_limit": None,
                     "overlap": True, "trace": None},
        "expert_parallel": {"size": 1, "dispatch_dtype": "model", "combine_dtype": "model", "dispatch_chunks": "auto",
                            "transport": "torch", "two_hop": "auto", "ranks_per_node": None},
        "fp8": {"enabled": False, "activation_cache": True},
        "kernels": {"backend": "auto"},
        "router": {"balancing": "aux_loss_free", "bias_update_speed": 0.001},
        "optimizer": {"moment_dtype": None},
        "recompute": [],
        "load": {"from": None, "format": None, "config": None, "optimizer": True, "follow_links": False},
    }


def test_every_key_can_be_set_and_the_record_reads_back():
    section = {
        "pipeline": {"schedule": "auto", "stages": 4, "chunks": 2, "placement": "wave", "memory_limit": 4.5,
                     "overlap": False, "trace": "runs/trace"},
        "expert_parallel": {"size": 2, "dispatch_dtype": "bf16", "combine_dtype": "bf16", "dispatch_chunks": 2,
                            "transport": "deep_ep", "two_hop": True, "ranks_per_node": 4},
        "fp8": {"enabled": True, "activation_cache": False},
        "kernels": {"backend": "reference"},
        "router": {"balancing": "none", "bias_update_speed": 0},
        "optimizer": {"moment_dtype": "bf16"},
        "recompute": ["attention"],
        "load": {"from": "runs/v3", "format": "hf", "config": "runs/config.json", "optimizer": False,
                 "follow_links": True},
    }
    resolved = parse(section).resolved()
    assert resolved == section
    assert parse(json.loads(json.dumps(resolved))).resolved() == section


@pytest.mark.parametrize("fp8, given_dtype, dtype", [
    (True, None, "fp8"), (False, None, "model"), (True, "model", "model"), (False, "fp8", "fp8")])
def test_dispatch_is_fp8_where_fp8_is_on_unless_chosen(fp8, given_dtype, dtype):
    config = parse({"expert_parallel": {"dispatch_dtype": given_dtype}, "fp8": {"enabled": fp8}})
    assert config.expert_parallel.dispatch_dtype == dtype


def test_a_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        parse({}).fp8.enabled = True


@pytest.mark.parametrize("section, expected", [
    ({"pipeline": {"stages": "four"}}, "megatron_ext.pipeline.stages = 'four': must be an integer of at least 1"),
    ({"pipeline": {"stages": "4"}}, "megatron_ext.pipeline.stages = '4': must be an integer"),
    ({"pipeline": {"stages": True}}, "megatron_ext.pipeline.stages = True: must be an integer"),
    ({"pipeline": {"stages": 4.0}}, "megatron_ext.pipeline.stages = 4.0: must be an integer"),
    ({"pipeline": {"stages": 0}}, "megatron_ext.pipeline.stages = 0: must be an integer of at least 1"),
    ({"pipeline": {"schedule": "dualpip"}},
     "megatron_ext.pipeline.schedule = 'dualpip': must be one of \"gpipe\", \"1f1b\", "),
    ({"expert_parallel": {"size": None}}, "megatron_ext.expert_parallel.size = None: must be an integer of at least 1"),
    ({"expert_parallel": {"dispatch_dtype": "fp16"}},
     'megatron_ext.expert_parallel.dispatch_dtype = \'fp16\': must be "model", "bf16", "fp8" or null'),
    ({"expert_parallel": {"combine_dtype": "fp8"}},
     'megatron_ext.expert_parallel.combine_dtype = \'fp8\': must be "model" or "bf16"'),
    ({"fp8": {"enabled": 1}}, "megatron_ext.fp8.enabled = 1: must be true or false"),
    ({"fp8": {"enabled": "true"}}, "megatron_ext.fp8.enabled = 'true': must be true or false"),
    ({"kernels": {"backend": ["cpu"]}}, "megatron_ext.kernels.backend = ['cpu']: must be \"auto\""),
    ({"router": {"balancing": "loss_free"}},
     'megatron_ext.router.balancing = \'loss_free\': must be "aux_loss_free" or "none"; did you mean "aux_loss_free"?'),
    ({"router": {"bias_update_speed": -0.1}},
     "megatron_ext.router.bias_update_speed = -0.1: must be a number of at least 0"),
    ({"router": {"bias_update_speed": float("nan")}}, "megatron_ext.router.bias_update_speed = nan: must be a number"),
    ({"router": {"bias_update_speed": float("inf")}}, "megatron_ext.router.bias_update_speed = inf: must be a number"),
    ({"router": {"bias_update_speed": "1e-3"}}, "megatron_ext.router.bias_update_speed = '1e-3': must be a number"),
    ({"router": {"bias_update_speed": False}}, "megatron_ext.router.bias_update_speed = False: must be a number"),
    ({"optimizer": {"moment_dtype": "fp16"}}, 'megatron_ext.optimizer.moment_dtype = \'fp16\': must be "bf16", "fp32"'),
    ({"expert_parallel": {"dispatch_chunks": 0}},
     "megatron_ext.expert_parallel.dispatch_chunks = 0: must be an integer of at least 1"),
    ({"expert_parallel": {"dispatch_chunks": "2"}},
     "megatron_ext.expert_parallel.dispatch_chunks = '2': must be an integer of at least 1"),
    ({"expert_parallel": {"two_hop": 1}}, 'megatron_ext.expert_parallel.two_hop = 1: must be true, false or "auto"'),
    ({"expert_parallel": {"two_hop": "aut"}},
     'megatron_ext.expert_parallel.two_hop = \'aut\': must be true, false or "auto"; did you mean "auto"?'),
    ({"expert_parallel": {"ranks_per_node": 0}}, "megatron_ext.expert_parallel.ranks_per_node = 0: must be an integer"),
    ({"pipeline": {"overlap": 1}}, "megatron_ext.pipeline.overlap = 1: must be true or false"),
    ({"recompute": "mlp"}, 'megatron_ext.recompute = \'mlp\': must be a list of "attention", "mlp", "rms_norm" and'),
    ({"recompute": ["attention", "mpl"]}, 'megatron_ext.recompute.1 = \'mpl\': must be a list of "attention"'),
    ({"kernels": {"backend": "tritn"}}, "megatron_ext.kernels.backend = 'tritn': must be \"auto\", \"cuda\", "),
    ({"load": "x"}, "megatron_ext.load = 'x': must be an object"),
    ({"load": {"from": ""}}, "megatron_ext.load.from = '': must be the folder of a checkpoint, or null"),
    ({"load": {"from": ["x"]}}, "megatron_ext.load.from = ['x']: must be the folder of a checkpoint"),
    ({"load": {"from": "x", "format": "dpc"}}, "megatron_ext.load.format = 'dpc': must be \"hf\", \"deepseek\", "),
    ({"load": {"from": "x", "optimizer": "keep"}}, "megatron_ext.load.optimizer = 'keep': must be true or false"),
    ({"load": {"from": "x", "config": 3}}, "megatron_ext.load.config = 3: must be a Hugging Face config.json"),
    ({"pipeline": 4}, "megatron_ext.pipeline = 4: must be an object"),
    ({"fp8": True}, "megatron_ext.fp8 = True: must be an object"),
    (None, "megatron_ext = None: must be an object"),
    ([], "megatron_ext = []: must be an object"),
    ({1: 2}, "megatron_ext.1 = 1: every key must be a string"),
])
def test_a_wrong_value_names_its_key_and_what_it_must_be(section, expected):
    assert message(section).startswith(expected)


@pytest.mark.parametrize("section, key, value", [
    ({"router": {"sequence_loss": 0.0001}}, "megatron_ext.router.sequence_loss", 0.0001),
    ({"recompute": ["mlp", "mla_up_projection"]}, "megatron_ext.recompute.1", "mla_up_projection"),
    ({"ema": {"decay": 0.999}}, "megatron_ext.ema", {"decay": 0.999}),
])
def test_what_comes_later_is_refused_as_such(section, key, value):
    assert message(section).startswith(f"{key} = {value!r}: is not available yet")


@pytest.mark.parametrize("section, nearest", [
    ({"pipelin": {}}, "megatron_ext.pipeline"),
    ({"pipeline": {"stage": 4}}, "megatron_ext.pipeline.stages"),
    ({"stages": 4}, "megatron_ext.pipeline.stages"),
    ({"pipeline": {"size": 4}}, "megatron_ext.expert_parallel.size"),
    ({"fp8": {"Enabled": True}}, "megatron_ext.fp8.enabled"),
    ({"pipeline": {"chunk": 1}}, "megatron_ext.pipeline.chunks"),
    ({"pipeline": {"overlaps": True}}, "megatron_ext.pipeline.overlap"),
    ({"pipeline": {"###": 1}}, "megatron_ext.pipeline.schedule"),
    ({"load": {"path": "x"}}, "megatron_ext.pipeline.placement"),
    ({"load": {"fron": "x"}}, "megatron_ext.load.from"),
    ({"loads": {}}, "megatron_ext.load"),
])
def test_an_unknown_key_gets_the_nearest_name(section, nearest):
    assert message(section).endswith(f"; the nearest name is {nearest}")


@given(st.sampled_from([(part, key) for part, keys in KEYS.items() for key in keys]), st.data())
def test_one_typo_in_any_key_finds_that_key(names, data):
    part, key = names
    at = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from("qxz0"))
    before, after = key[:at], key[at + 1:]
    typo = data.draw(st.sampled_from([before + after, before + letter + key[at:], before + letter + after]))
    assume(typo not in KEYS[part])
    text = message({part: {typo: 1}})
    assert text.startswith(f"megatron_ext.{part}.{typo} = 1: is not a key here, where there are {KEYS[part][0]}")
    assert text.endswith(f"the nearest name is megatron_ext.{part}.{key}")


def test_the_schedules_are_those_that_there_are():
    assert sorted(SCHEDULES) == sorted([*NAMES, "auto"])
    assert message({"pipeline": {"schedule": "dualpip"}}).endswith('; did you mean "dualpipe"?')
    for name in SCHEDULES:
        assert parse({"pipeline": {"schedule": name}}).pipeline.schedule == name


def test_the_formats_to_load_are_those_that_there_are():
    for format in FORMATS:
        assert parse({"load": {"from": "x", "format": format.name}}).load.path == "x"
    said = message({"load": {"from": "x", "format": "safetensors"}})
    assert said.count('"') == 2 * len(FORMATS)


def test_the_first_mistake_of_the_file_is_reported():
    wrong = {"router": {"balancing": 3, "speed": 1}, "fp8": {"enable": True}, "pipeline": {"stages": "x", "chunks": 0}}
    assert message(wrong).startswith("megatron_ext.router.balancing = 3")
    del wrong["router"]["balancing"]
    assert message(wrong).startswith("megatron_ext.router.speed = 1")
    del wrong["router"]
    assert message(wrong).startswith("megatron_ext.fp8.enable = True")
    del wrong["fp8"]
    assert message(wrong).startswith("megatron_ext.pipeline.stages = 'x'")
    wrong["pipeline"] = dict(reversed(wrong["pipeline"].items()))
    assert message(wrong).startswith("megatron_ext.pipeline.chunks = 0")


@pytest.mark.parametrize("name", ["megatron-ext", "Megatron_ext", "megatron_ext ", "megatronext", "megatron_exts"])
def test_a_section_with_nearly_our_name_is_not_ignored(name: str) -> None:
    with pytest.raises(ConfigError, match="is no section; did you mean megatron_ext"):
        parse_section({name: {"fp8": {"enabled": True}}})


def test_other_sections_are_nobody_elses_business() -> None:
    assert parse_section({"megatron": {}, "extension": {}, "zero_optimization": {}}) == parse_section({})
