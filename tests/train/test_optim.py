"""The optimizer against `torch.optim` and `torch.nn.utils`, the schedules against `transformers`."""

import copy

import pytest
import torch
import transformers

from ft.model.gpt2 import GPT2, GPT2Config
from ft.train.optim import adamw_function, build_optimizer, clip_in_optimizer, global_norm, plain_adamw
from ft.train.schedule import learning_rate_at

TINY = GPT2Config(vocab_size=23, n_positions=8, n_embd=8, n_layer=2, n_head=2)


def make_model(dtype=torch.float64):
    model = GPT2(TINY)
    model.init_weights(0)
    return model.to(dtype)


def fill_gradients(model, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        gradient = torch.empty(parameter.shape, dtype=torch.float32).normal_(0, 1, generator=generator)
        parameter.grad = (gradient * scale).to(parameter.dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_norm", [1.0, 1e6, 0.0])
def test_steps_equal_plain_adamw_after_clip_grad_norm(weight_decay, max_norm):
    model, reference = make_model(), make_model()
    optimizer = build_optimizer(model, 1e-2, weight_decay)
    named = dict(reference.named_parameters())
    matrices = [p for p in named.values() if p.ndim == 2]
    rest = [p for p in named.values() if all(p is not m for m in matrices)]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, foreach=False)
    for step in range(5):
        for network in (model, reference):
            fill_gradients(network, step)
        norm = clip_in_optimizer(optimizer, max_norm)
        limit = max_norm if max_norm else float("inf")
        expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), limit)
        torch.testing.assert_close(norm, expected_norm, rtol=1e-12, atol=0)
        optimizer.step()
        plain.step()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            # Where it clips, the kernel's scale is a float: seven digits.
            rtol = 1e-6 if max_norm == 1.0 else 1e-12
            torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-8 if max_norm == 1.0 else 1e-14)


def test_the_norm_of_large_gradients_is_exact():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((5000, 768), (768, 2304), (768,))]
    gradients.append(torch.randn(768, 3072, generator=generator).T)
    exact = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt()
    torch.testing.assert_close(global_norm(gradients).double(), exact, rtol=2e-5, atol=0)
    gradients[1][3, 4] = float("inf")
    assert global_norm(gradients).isinf()
    gradients[0][1, 2] = float("nan")
    assert global_norm(gradients).isnan()
    assert global_norm([]) == 0


def test_clipping_and_the_loss_scale_go_into_one_step():
    model, reference = make_model(torch.float32), make_model(torch.float32)
    optimizer, plain = build_optimizer(model, 1e-2, 0.0), build_optimizer(reference, 1e-2, 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    for step in range(4):
        scale = scaler.scale(torch.ones(()))
        fill_gradients(model, step, scale=scale.item())
        fill_gradients(reference, step)
        scaler.unscale_(optimizer)
        norm = clip_in_optimizer(optimizer, 1.0)
        expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        torch.testing.assert_close(norm, expected_norm)
        scaler.step(optimizer)
        scaler.update()
        plain.step()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert scaler.get_scale() > 1024.0


def test_an_overflow_skips_the_step_and_lowers_the_scale():
    model = make_model(torch.float32)
    before = copy.deepcopy(model.state_dict())
    optimizer = build_optimizer(model, 1e-2, 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))  # creates the scaler's tensors
    fill_gradients(model, 0)
    model.h[1].mlp.c_fc.weight.grad[0, 0] = float("inf")
    scaler.unscale_(optimizer)
    clip_in_optimizer(optimizer, 1.0)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    fill_gradients(model, 1)
    scaler.unscale_(optimizer)
    clip_in_optimizer(optimizer, 1.0)
    scaler.step(optimizer)
    assert optimizer.state[model.wte.weight]["step"] == 1
    assert not torch.equal(before["wte.weight"], model.wte.weight)


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_schedules_equal_transformers(schedule, warmup_steps):
    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    reference = transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup_steps, num_training_steps=10)
    for step in range(10):
        ours = learning_rate_at(step, 10, peak=0.5, warmup_steps=warmup_steps, schedule=schedule)
        assert ours == pytest.approx(reference.get_last_lr()[0], rel=1e-12), step
        optimizer.step()
        reference.step()


def test_a_warm_up_may_be_longer_than_the_run():
    assert [learning_rate_at(step, 2, peak=1.0, warmup_steps=4) for step in range(2)] == [0.0, 0.25]


def test_weight_decay_acts_on_what_the_trainer_decays():
    model = make_model()
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**vars(TINY)))
    trainer = object.__new__(transformers.Trainer)  # this method uses no attribute of it
    optimizer = build_optimizer(model, 1e-3, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    named = trainer.get_decay_parameter_names(reference)
    assert decayed == {name.removeprefix("transformer.") for name in named if name != "lm_head.weight"}
    assert {"wte.weight", "wpe.weight"} <= decayed
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_on_mps_the_update_is_made_of_plain_operations():
    assert adamw_function(torch.device("mps")) is plain_adamw
    assert adamw_function(torch.device("cpu")) is adamw_function(torch.device("cuda:0")) is torch._fused_adamw_


@pytest.fixture
def as_on_mps(monkeypatch):
    """Let the optimizer take what it takes on MPS; returns the devices that it has asked for."""
    asked = []

    def choose(device):
        asked.append(device.type)
        return plain_adamw

    monkeypatch.setattr("ft.train.optim.adamw_function", choose)
    return asked


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_norm", [1.0, 0.0])
def test_plain_operations_equal_plain_adamw_after_clip_grad_norm(as_on_mps, weight_decay, max_norm):
    test_steps_equal_plain_adamw_after_clip_grad_norm(weight_decay, max_norm)
    assert set(as_on_mps) == {"cpu"}


def test_plain_operations_clip_unscale_and_skip_as_the_kernel_does(as_on_mps):
    test_clipping_and_the_loss_scale_go_into_one_step()
    test_an_overflow_skips_the_step_and_lowers_the_scale()
    assert as_on_mps


def test_the_bias_correction_of_plain_operations_keeps_its_digits():
    """In fp32, where 1 - 0.999 by itself has five of seven."""
    weights = [[torch.linspace(-1, 1, 9), torch.linspace(-1, 1, 9).square()] for _ in range(2)]
    for adamw, (weight, gradient) in zip((plain_adamw, torch._fused_adamw_), weights, strict=True):
        moments = [torch.zeros(9), torch.zeros(9)]
        options = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "amsgrad": False, "maximize": False, "lr": 1e-2}
        for step in range(1, 4):
            lists = [[weight], [gradient], [moments[0]], [moments[1]], [], [torch.tensor(float(step))]]
            adamw(*lists, weight_decay=0.0, grad_scale=None, found_inf=None, **options)
    torch.testing.assert_close(weights[0][0], weights[1][0], rtol=3e-7, atol=1e-8)
