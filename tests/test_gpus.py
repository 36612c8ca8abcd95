"""CPU tests stay CPU tests on a machine with GPUs."""

import os
from unittest import mock

import pytest
import torch


def test_a_test_without_the_mark_cannot_use_a_gpu():
    assert not torch.cuda.is_available()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    with pytest.raises(AssertionError, match="without the mark `gpu` uses CUDA"):
        torch.zeros(1, device="cuda")


@pytest.mark.gpu
def test_a_test_with_the_mark_sees_what_there_is():
    assert not isinstance(torch.cuda.is_available, mock.Mock)
