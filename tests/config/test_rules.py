"""Rules across sections and sizes: each refusal with the words a user sees, and what must stay allowed."""

from __future__ import annotations

import pytest

from megatron_ext.config import (
    Batch,
    ConfigError,
    check_deepspeed_config,
    load_config,
    parse_section,
    resolve_batch,
)


def check(ds_config):
    check_deepspeed_config(ds_config, parse_section(ds_config))


def refusal(call, *args) -> str:
    with pytest.raises(ConfigError) as error:
        call(*args)
    return str(error.value)


# -- the file

def test_a_file_and_a_dict_give_the_same_and_the_dict_is_copied(tmp_path):
    given = {"train_batch_size": 8, "zero_optimization": {"stage": 1}}
    path = tmp_path / "ds_config.json"
    path.write_text('\ufeff{"train_batch_size": 8, "zero_optimization": {"stage": 1}}', encoding="utf-8")
    loaded = load_config(given)
    assert load_config(path) == load_config(str(path)) == loaded == given
    loaded["zero_optimization"]["stage"] = 2
    assert given["zero_optimization"]["stage"] == 1


def test_comments_are_read_as_deepspeed_reads_them(tmp_path):
    path = tmp_path / "ds_config.json"
    path.write_text('{\n  // sixteen\n  "train_batch_size": 16,\n}')
    assert load_config(path) == {"train_batch_size": 16}


@pytest.mark.parametrize("text, rule", [
    ('{"a": 1, "a": 2}', "the key 'a' is given twice, as 1 and 2"),
    ('{"z": {"a": 1, // comment\n "a": 2}}', "the key 'a' is given twice, as 1 and 2"),
    ('{"a": 1', "is not JSON: Expecting ',' delimiter at line 1, column 8"),
    ('[1]', "must hold a JSON object, not list"),
    ('3', "must hold a JSON object, not int"),
])
def test_a_bad_file(tmp_path, text, rule):
    path = tmp_path / "ds_config.json"
    path.write_text(text)
    assert refusal(load_config, path) == f"config = {str(path)!r}: {rule}"


def test_no_file(tmp_path):
    assert refusal(load_config, tmp_path / "no.json").endswith("no.json': there is no such file")
    assert "cannot be read" in refusal(load_config, tmp_path)
    assert refusal(load_config, None) == "config = None: must be the path of a JSON file, or a dict"


# -- batch sizes

@pytest.mark.parametrize("given, batch", [
    ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}, (32, 2, 4)),
    ({"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2}, (32, 2, 4)),
    ({"train_batch_size": 32, "gradient_accumulation_steps": 4}, (32, 2, 4)),
    ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}, (32, 2, 4)),
    ({"train_batch_size": 32}, (32, 8, 1)),
    ({"train_micro_batch_size_per_gpu": 2}, (8, 2, 1)),
])
def test_the_batch_triangle(given, batch):
    assert resolve_batch(given, 4) == Batch(*batch)


@pytest.mark.parametrize("given, text", [
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps = 0: must be an integer of at least 1"),
    ({"gradient_accumulation_steps": -2}, "gradient_accumulation_steps = -2: must be an integer of at least 1"),
    ({"gradient_accumulation_steps": 2.0}, "gradient_accumulation_steps = 2.0: must be an integer"),
    ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps = True: must be an integer"),
    ({"gradient_accumulation_steps": "2"},
     "gradient_accumulation_steps = '2': must be an integer of at least 1; write 2 without the quotes"),
    ({"gradient_accumulation_steps": "auto"},
     "gradient_accumulation_steps = 'auto': must be an integer of at least 1; \"auto\" is filled in by Hugging Face"),
    ({"train_batch_size": 0}, "train_batch_size = 0: must be an integer of at least 1"),
    ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu = 0: must be an integer of at least 1"),
    ({"gradient_accumulation_steps": 2}, "train_batch_size = None: is needed, or train_micro_batch_size_per_gpu"),
    ({"train_batch_size": 30, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4},
     "train_batch_size = 30: must be train_micro_batch_size_per_gpu x gradient_accumulation_steps x data-parallel "
     "ranks; here 2 x 4 x 4 = 32"),
    ({"train_batch_size": 30, "train_micro_batch_size_per_gpu": 2}, "train_batch_size = 30: must be"),
    ({"train_batch_size": 30, "gradient_accumulation_steps": 4}, "train_batch_size = 30: must be"),
    ({"train_batch_size": 3}, "train_batch_size = 3: must be"),
])
def test_batch_sizes_that_cannot_work(given, text):
    assert refusal(resolve_batch, given, 4).startswith(text)


# -- DeepSpeed's sections

ALLOWED = [
    {},
    {"zero_optimization": True},
    {"zero_optimization": {"stage": 0}},
    {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}},
    {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}, "checkpoint": {"load_universal": True}},
    {"fp16": {"enabled": False}, "bf16": {"enabled": True}, "torch_autocast": {"enabled": False}},
    {"fp16": None, "gradient_clipping": 0.1, "data_types": {"grad_accum_dtype": "fp32"}, "wall_clock_breakdown": True},
    {"tensor_parallel": {"autotp_size": 1, "tp": {"tp_size": 1}}, "sequence_parallel_size": 1},
    {"optimizer": {"type": "Lamb", "params": {"lr": 1e-3}},
     "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_type": "log", "total_num_steps": 10}}},
    {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}},
    {"optimizer": {"type": "AdamW", "params": {"lr": 1, "betas": [0.9, 0.95], "torch_adam": True, "amsgrad": False,
                                               "fp32_optimizer_states": False}},
     "megatron_ext": {"optimizer": {"moment_dtype": "bf16"}}},
    {"megatron_ext": {"optimizer": {"moment_dtype": "fp32"}}},
]


@pytest.mark.parametrize("ds_config", ALLOWED)
def test_what_deepspeed_means_is_left_alone(ds_config):
    check(ds_config)


@pytest.mark.parametrize("ds_config, text", [
    ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3: ZeRO-3 is not supported"),
    ({"zero_optimization": {"stage": "1"}}, "zero_optimization.stage = '1': must be 0, 1 or 2"),
    ({"zero_optimization": {"stage": True}}, "zero_optimization.stage = True: must be 0, 1 or 2"),
    ({"zero_optimization": 1}, "zero_optimization = 1: must be an object"),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
     "zero_optimization.offload_param = {'device': 'cpu'}: is not supported"),
    ({"zero_optimization": {"stage": 2, "cpu_offload_param": True}}, "zero_optimization.cpu_offload_param = True"),
    ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow = {"),
    ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation = False: train_batch owns"),
    ({"fp16": {"enabled": True}}, "fp16.enabled = True: FP16 is not supported; use \"bf16\""),
    ({"fp16": {"enabled": "true"}}, "fp16.enabled = 'true': FP16 is not supported"),
    ({"fp16": True}, "fp16 = True: must be an object"),
    ({"amp": {"enabled": False}}, "amp = {'enabled': False}: DeepSpeed has removed this section"),
    ({"elasticity": {"enabled": True}}, "elasticity = {'enabled': True}: DeepSpeed has removed this section"),
    ({"torch_autocast": {"enabled": True}}, "torch_autocast.enabled = True: autocast does not reach"),
    ({"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled = True: "),
    ({"expert_parallel": {"enabled": True}}, "expert_parallel.enabled = True: DeepSpeed's AutoEP is not supported; set "
                                             "megatron_ext.expert_parallel.size"),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size = 2: tensor parallelism is not supported"),
    ({"tensor_parallel": {"tp": {"tp_size": 4}}}, "tensor_parallel.tp.tp_size = 4: tensor parallelism"),
    ({"tensor_parallel": {"tensor_parallel": {"tp_size": 4}}}, "tensor_parallel.tensor_parallel.tp_size = 4: tensor"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size = 2: sequence parallelism is not supported"),
    ({"context_parallel_size": 2}, "context_parallel_size = 2: context parallelism is not supported"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": "1e-2"}}},
     "optimizer.params.lr = '1e-2': must hold numbers, not strings; write 0.01 without the quotes"),
    ({"optimizer": {"type": "AdamW", "params": {"betas": [0.9, "0.95"]}}},
     "optimizer.params.betas = [0.9, '0.95']: must hold numbers, not strings; write 0.95 without the quotes"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "optimizer.params.lr = 'auto': must hold numbers"),
    ({"optimizer": {"type": "AdamW", "params": [1]}}, "optimizer.params = [1]: must be an object"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "1e-3"}}},
     "scheduler.params.warmup_max_lr = '1e-3': must hold numbers, not strings; write 0.001 without the quotes"),
    ({"gradient_clipping": "0.1"}, "gradient_clipping = '0.1': must be a number of at least 0; write 0.1 without"),
    ({"gradient_clipping": -1}, "gradient_clipping = -1: must be a number of at least 0"),
    ({"gradient_clipping": True}, "gradient_clipping = True: must be a number of at least 0"),
])
def test_what_the_engine_cannot_do_is_refused(ds_config, text):
    assert refusal(check, ds_config).startswith(text)


@pytest.mark.parametrize("ds_config, text", [
    ({"optimizer": {"type": "Lamb"}}, "optimizer.type = 'Lamb': must be \"Adam\" or \"AdamW\" beside "
                                      "megatron_ext.optimizer.moment_dtype = 'bf16'"),
    ({"optimizer": {"type": "AdamW", "params": {"weight_deacy": 0.1}}},
     "optimizer.params.weight_deacy = 0.1: is not a parameter of AdamW; the nearest is weight_decay"),
    ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, "optimizer.params.amsgrad = True: AMSGrad"),
    ({"optimizer": {"type": "AdamW", "params": {"fp32_optimizer_states": True}}},
     "optimizer.params.fp32_optimizer_states = True: contradicts megatron_ext.optimizer.moment_dtype = 'bf16'"),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}},
     "bf16.bf16_master_weights_and_grads = True: contradicts megatron_ext.optimizer.moment_dtype = 'bf16', which"),
    ({"bfloat16": {"bf16_optimizer_states": True}}, "bfloat16.bf16_optimizer_states = True: contradicts"),
])
def test_what_contradicts_our_optimizer_is_refused(ds_config, text):
    assert refusal(check, {**ds_config, "megatron_ext": {"optimizer": {"moment_dtype": "bf16"}}}).startswith(text)


def test_swiglu_is_recomputed_with_fp8_only():
    check_deepspeed_config({}, parse_section({"megatron_ext": {"recompute": ["rms_norm"]}}))
    section = {"recompute": ["swiglu"], "fp8": {"enabled": True}}
    check_deepspeed_config({}, parse_section({"megatron_ext": section}))
    with pytest.raises(ConfigError, match=r"recompute = \['swiglu'\]: swiglu is recomputed with FP8 only"):
        check_deepspeed_config({}, parse_section({"megatron_ext": {"recompute": ["swiglu"]}}))


@pytest.mark.parametrize(("key", "value"), [("format", "hf"), ("config", "x"), ("optimizer", False),
                                           ("follow_links", True)])
def test_how_to_load_means_nothing_without_what(key, value):
    check_deepspeed_config({}, parse_section({"megatron_ext": {"load": {"from": "x", key: value}}}))
    with pytest.raises(ConfigError, match=rf"megatron_ext.load.{key} = .*: there is nothing to load; set .*load.from"):
        check_deepspeed_config({}, parse_section({"megatron_ext": {"load": {key: value}}}))


@pytest.mark.parametrize("key", ["fp8", "kernels", "recompute", "load"])
def test_our_sections_outside_of_ours_are_refused(key: str):
    """DeepSpeed would ignore them, and training would go on without."""
    with pytest.raises(ConfigError, match=rf"{key} = .* is a section of megatron_ext; move it to megatron_ext\.{key}"):
        check_deepspeed_config({key: {"enabled": True}}, parse_section({}))
