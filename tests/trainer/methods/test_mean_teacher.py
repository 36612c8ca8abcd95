"""A teacher: its values over many steps, its schedule, and that nothing but `update_teacher` moves it."""

import math
from unittest import mock

import pytest
import torch
from torch import nn

import trainer.methods.mean_teacher
from models.batch_norm import BatchNorm
from trainer.methods.mean_teacher import cosine_momentum, teacher_of, update_teacher


def make_module() -> nn.Module:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 6), BatchNorm(6, sync=True), nn.Linear(6, 3, bias=False))
    module[2].requires_grad_(False)
    return module


def test_it_is_a_copy_that_no_optimizer_sees():
    module = make_module()
    teacher = teacher_of(module)
    assert list(teacher.parameters()) == []
    assert teacher.state_dict().keys() == module.state_dict().keys()
    inputs = torch.randn(5, 4)
    assert torch.equal(teacher(inputs), module(inputs))
    assert not teacher(inputs).requires_grad
    with torch.no_grad():
        module[0].weight.fill_(7.0)
    assert not (teacher[0].weight == 7.0).any()


@pytest.mark.parametrize("chunk", [1 << 24, 1])
def test_average_over_many_steps_has_a_closed_form(chunk):
    module = make_module()
    teacher = teacher_of(module)
    first = {name: value.clone() for name, value in teacher.named_buffers()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
        module[1].running_mean.fill_(3.0)
    with mock.patch.object(trainer.methods.mean_teacher, "_CHUNK", chunk):
        for _ in range(30):
            update_teacher(teacher, module, 0.9)
    for name, weights in module.named_parameters():
        expected = 0.9**30 * first[name] + (1 - 0.9**30) * weights
        torch.testing.assert_close(teacher.get_buffer(name), expected.detach(), atol=1e-6, rtol=1e-5)
    # Running statistics are the teacher's own.
    assert torch.equal(teacher[1].running_mean, torch.zeros(6))
    update_teacher(teacher, module, 0.0)
    assert all(torch.equal(teacher.get_buffer(name), weights) for name, weights in module.named_parameters())
    update_teacher(teacher, module, 0.5)
    assert all(torch.equal(teacher.get_buffer(name), weights) for name, weights in module.named_parameters())


def test_momentum_rises_to_one():
    found = [cosine_momentum(1 + quarter * 100, 400, 0.996) for quarter in (0, 1, 2, 3, 4)]
    assert found == pytest.approx([0.996, 0.996586, 0.998, 0.999414, 1.0], abs=5e-7)
    rising = [cosine_momentum(step, 400, 0.996) for step in range(1, 401)]
    assert rising == sorted(rising)
    assert 1.0 - rising[-1] == pytest.approx(0.002 * (1 - math.cos(math.pi / 400)), rel=1e-6)
