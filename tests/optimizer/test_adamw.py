"""AdamW as a torch optimizer: what it accepts and refuses, and moments that keep their dtype whatever is loaded."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from megatron_ext.config.errors import ConfigError, UserError
from megatron_ext.kernels.cpu import library
from megatron_ext.optimizer import AdamW, optimizer_state_bytes

BETAS = (0.9, 0.95)
MOMENTS = ("exp_avg", "exp_avg_sq")


def make(shapes=((5, 3), (7,)), dtype=torch.float32, **options):
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    return params, AdamW(params, **{"lr": 1e-2, "betas": BETAS, "weight_decay": 0.1, **options})


def train(params, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def copy_of(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16])
def test_state_and_its_bytes(name, dtype, param_dtype):
    params, optimizer = make(dtype=param_dtype, moment_dtype=name)
    train(params, optimizer, 2)
    for p in params:
        state = optimizer.state[p]
        assert set(state) == {"step", *MOMENTS} and state["step"] == 2
        assert all(state[key].dtype == dtype and state[key].shape == p.shape for key in MOMENTS)
    held = optimizer_state_bytes(optimizer)
    assert held.parameters == 22
    assert held.master == {"cpu": 22 * param_dtype.itemsize} and held.moments == {"cpu": 2 * 22 * dtype.itemsize}
    assert held.per_parameter == (param_dtype.itemsize, 2 * dtype.itemsize)


def test_the_bytes_of_a_stock_optimizer_count_no_step():
    params, _ = make()
    stock = torch.optim.AdamW(params)
    train(params, stock, 1)
    assert optimizer_state_bytes(stock).per_parameter == (4, 8)


def test_the_parameters_of_a_ds_config_are_taken_as_they_are():
    ds_params = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1, "bias_correction": True,
                 "adam_w_mode": True, "amsgrad": False}
    optimizer = AdamW([torch.nn.Parameter(torch.zeros(1))], **ds_params, moment_dtype="bf16")
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95) and optimizer.param_groups[0]["eps"] == 1e-6


def test_groups_schedulers_and_closures_work_as_in_torch():
    params, _ = make()
    optimizer = AdamW([{"params": params[:1], "weight_decay": 0.0}, {"params": params[1:], "lr": 0.0}], betas=BETAS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step == 0 else 0.0)
    before = [p.detach().clone() for p in params]

    def closure():
        optimizer.zero_grad()
        loss = sum((p * p).sum() for p in params)
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert not torch.equal(params[0], before[0]) and torch.equal(params[1], before[1])
    scheduler.step()
    moved = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], moved)


def test_parameters_count_their_own_steps():
    params, optimizer = make()
    train(params[:1], optimizer, 3)
    assert params[1] not in optimizer.state
    alone, other = make(((7,),))
    alone[0].data.copy_(params[1].data)
    for p, o in ((params[1], optimizer), (alone[0], other)):
        p.grad = torch.ones(7)
        o.step()
    assert torch.equal(params[1], alone[0])
    assert [optimizer.state[p]["step"] for p in params] == [4, 1]


def test_without_the_compiled_library_the_bits_are_the_same(monkeypatch):
    params, optimizer = make()
    others = copy_of(params)
    train(params, optimizer, 5)
    monkeypatch.setattr(library, "load", lambda: None)
    train(others, AdamW(others, lr=1e-2, betas=BETAS, weight_decay=0.1), 5)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.parametrize("view", [lambda x: x.t(), lambda x: x[:, ::2], lambda x: x.expand(4, 6).clone().t()])
def test_a_parameter_that_is_no_dense_array(view):
    base = torch.randn(4, 6)
    odd = torch.nn.Parameter(view(base.clone()))
    plain = torch.nn.Parameter(odd.detach().clone(memory_format=torch.contiguous_format))
    assert not odd.is_contiguous()
    for p in (odd, plain):
        train([p], AdamW([p], betas=BETAS), 3)
    assert torch.equal(odd, plain) and not odd.is_contiguous()


def test_resume_through_a_file_is_bit_exact():
    params, optimizer = make()
    train(params, optimizer, 5)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    resumed = copy_of(params)
    file.seek(0)
    loaded = AdamW(resumed, lr=0.5, betas=BETAS)
    loaded.load_state_dict(torch.load(file))
    for p in resumed:
        assert all(loaded.state[p][key].dtype == torch.bfloat16 for key in MOMENTS)
    assert loaded.param_groups[0]["lr"] == 1e-2
    for ps, o in ((params, optimizer), (resumed, loaded)):
        train(ps, o, 5, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


def test_no_moment_is_fp32_even_for_a_moment_while_loading(monkeypatch):
    params, optimizer = make()
    train(params, optimizer, 1)
    state_dict = optimizer.state_dict()
    process = torch.optim.Optimizer._process_value_according_to_param_policy
    seen = []
    monkeypatch.setattr(torch.optim.Optimizer, "_process_value_according_to_param_policy",
                        staticmethod(lambda *args, **kwargs: seen.append(args) or process(*args, **kwargs)))
    AdamW(copy_of(params), betas=BETAS).load_state_dict(state_dict)
    assert not seen


def test_the_state_of_another_adam_is_taken_over():
    params, _ = make()
    stock = torch.optim.AdamW(params, lr=3e-3, betas=BETAS, weight_decay=0.1)
    train(params, stock, 4)
    ours = AdamW(params, betas=BETAS)
    ours.load_state_dict(copy.deepcopy(stock.state_dict()))
    for p in params:
        for key in MOMENTS:
            assert torch.equal(ours.state[p][key], stock.state[p][key].bfloat16())
    train(params, ours, 1)
    assert ours.state[params[0]]["step"] == 5 and ours.param_groups[0]["lr"] == 3e-3


@pytest.mark.parametrize("heal", ["step", "recast"])
def test_fp32_moments_put_in_place_by_a_load_are_cast_once(heal):
    params, optimizer = make()
    train(params, optimizer, 3)
    others = copy_of(params)
    loaded = AdamW(others, lr=1e-2, betas=BETAS, weight_decay=0.1)
    for p, q in zip(params, others, strict=True):  # as DeepSpeed's universal load does it
        loaded.state[q] = {key: optimizer.state[p][key].float() for key in MOMENTS}
        loaded.state[q]["step"] = optimizer.state[p]["step"]
    if heal == "recast":
        assert loaded.recast_moments() == 4 and loaded.recast_moments() == 0
        assert all(loaded.state[q][key].dtype == torch.bfloat16 for q in others for key in MOMENTS)
    for ps, o in ((params, optimizer), (others, loaded)):
        train(ps, o, 2, seed=1)
    assert all(loaded.state[q][key].dtype == torch.bfloat16 for q in others for key in MOMENTS)
    assert all(torch.equal(a, b) for a, b in zip(params, others, strict=True))


def test_a_step_that_only_the_group_knows():
    params, optimizer = make()
    train(params, optimizer, 4)
    others = copy_of(params)
    loaded = AdamW(others, lr=1e-2, betas=BETAS, weight_decay=0.1)
    for p, q in zip(params, others, strict=True):
        loaded.state[q] = {key: optimizer.state[p][key].clone() for key in MOMENTS}
    loaded.param_groups[0]["step"] = optimizer.param_groups[0]["step"]
    for ps, o in ((params, optimizer), (others, loaded)):
        train(ps, o, 1, seed=1)
    assert loaded.state[others[0]]["step"] == 5 and torch.equal(params[0], others[0])


def test_moments_of_another_shape_are_refused():
    params, optimizer = make()
    train(params, optimizer, 1)
    text = r"'exp_avg' has shape \[3, 5\] for a parameter of shape \[5, 3\]"
    state_dict = copy.deepcopy(optimizer.state_dict())
    state_dict["state"][0]["exp_avg"] = torch.zeros(3, 5)
    with pytest.raises(UserError, match=text):
        AdamW(copy_of(params), betas=BETAS).load_state_dict(state_dict)
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(3, 5)
    with pytest.raises(UserError, match=text):
        optimizer.recast_moments()
    with pytest.raises(UserError, match=text):
        optimizer.step()


@pytest.mark.parametrize("options, text", [
    ({"lr": -1}, "optimizer.params.lr = -1: must be a number of at least 0"),
    ({"lr": float("nan")}, "optimizer.params.lr = nan"),
    ({"eps": -1e-8}, "optimizer.params.eps = -1e-08"),
    ({"weight_decay": -1}, "optimizer.params.weight_decay = -1"),
    ({"betas": (0.9, 1.0)}, "optimizer.params.betas = (0.9, 1.0): must be two numbers of at least 0 and below 1"),
    ({"betas": (0.9,)}, "optimizer.params.betas = (0.9,)"),
    ({"amsgrad": True}, "optimizer.params.amsgrad = True: AMSGrad is not available"),
    ({"moment_dtype": "fp16"}, 'megatron_ext.optimizer.moment_dtype = \'fp16\': must be "bf16" or "fp32"'),
    ({"dtype": torch.float16}, "optimizer = 'torch.float16': AdamW takes parameters in FP32 or BF16"),
])
def test_what_cannot_work_is_refused(options, text):
    with pytest.raises(ConfigError) as error:
        make(**options)
    assert str(error.value).startswith(text)


def test_sparse_gradients_are_refused():
    p = torch.nn.Parameter(torch.zeros(3, 2))
    p.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 2), (3, 2), check_invariants=True)
    with pytest.raises(UserError, match="sparse=False"):
        AdamW([p], betas=BETAS).step()


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu_bit_for_bit():
    params, optimizer = make(((1000,), (3, 5)))
    others = [torch.nn.Parameter(p.detach().cuda()) for p in params]
    on_gpu = AdamW(others, lr=1e-2, betas=BETAS, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for p, q in zip(params, others, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.cuda()
        optimizer.step()
        on_gpu.step()
    assert all(torch.equal(p, q.cpu()) for p, q in zip(params, others, strict=True))
    assert optimizer_state_bytes(on_gpu).moments == {"cuda:0": 4 * 1015}
