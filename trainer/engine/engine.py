"""The DeepSpeed engine behind four verbs: forward, backward, step, project."""

import contextlib
import datetime
import importlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config.ds_config import ResolvedDeepSpeed
from trainer.config.sections import RunConfig
from trainer.engine.optimizer import build_optimizer, parameter_groups
from trainer.methods.base import BoundedParameter, Method
from trainer.methods.rules import training_rules
from trainer.ranks.launch import Place


def init_distributed(device: torch.device, place: Place, workers: int = 0, timeout_minutes: float = 30.0) -> None:
    """Start torch's process group through DeepSpeed, for NCCL or gloo.

    Args:
        device: This rank's device.
        place: This rank.
        workers: Loader processes of this rank that keep a core each on a CPU.
        timeout_minutes: How long a step may make no progress. A collective waits twice as long before it fails by
            itself, so that the watchdog, which knows who is missing, speaks first.
    """
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # A shared-memory op only inference uses; building it would need a compiler and most of a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            # Threads that share a core with a worker wait for each other at every operation: far slower than fewer.
            cores = len(os.sched_getaffinity(0)) // place.local_world_size
            torch.set_num_threads(max(1, cores - workers))
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=datetime.timedelta(minutes=2 * timeout_minutes + 1),
    )


def share_out_cores(place: Place) -> None:
    """Threads for an optimizer on the CPU under torchrun, which tells each of several ranks to use one."""
    if place.launcher == "torchrun" and place.local_world_size > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_world_size))


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which no recipe can choose, before the first backward does.

    ZeRO looks whether the optimizer is one. Its three compiled functions load all of torch's compiler: a second on
    every rank, unless compiling is off at that moment.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        # A release that has moved it loads it itself.
        with contextlib.suppress(ImportError):
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def _fit_buckets(tree: dict[str, Any], elements: int) -> None:
    """Make no bucket larger than all gradients together: DeepSpeed allocates it whole."""
    zero = tree["zero_optimization"]
    if zero["stage"]:
        # It wants a multiple of its alignment, 2.
        elements += elements % 2
        tree["zero_optimization"] = zero = dict(zero)
        for name in ("reduce_bucket_size", "allgather_bucket_size"):
            zero[name] = min(int(zero.get(name, elements)), elements)


@contextlib.contextmanager
def _gradients_in(dtype: torch.dtype, method: Method) -> Iterator[None]:
    """Under autocast, have ZeRO set up the reduction of gradients in this type.

    It asks each parameter, whose answer ZeRO 3 would later take for the gathering of weights as well.
    """
    for parameter in method.parameters():
        parameter.comm_dtype = dtype
    try:
        yield
    finally:
        for parameter in method.parameters():
            del parameter.comm_dtype


class Engine:
    """One method under DeepSpeed, with the same behaviour at ZeRO 0 to 3.

    Attributes:
        deepspeed: The wrapped DeepSpeedEngine.
        method: The module inside it.
        stage: ZeRO stage.
        parameter_names: Names of the trained parameters by optimizer group, in the optimizer's order.
        parameter_shapes: Their full shapes.
        decides_on_device: Whether `step` runs without waiting for the device.
        ema_decay: Decay of the moving average of the weights (`trainer.engine.ema`), or None.
    """

    def __init__(self, method: Method, config: RunConfig, resolved: ResolvedDeepSpeed, device: torch.device) -> None:
        import deepspeed

        self.device = device
        self.stage = resolved.stage
        self.offload = resolved.offload_optimizer
        self.clip = config.optimizer.gradient_clipping
        self.ema_decay = config.train.ema_decay
        groups = parameter_groups(method, config.optimizer, training_rules(method, config.optimizer))
        names = {id(parameter): name for name, parameter in method.named_parameters()}
        self.parameter_names = [[names[id(p)] for p in group["params"]] for group in groups]
        self.parameter_shapes = {name: tuple(p.shape) for name, p in method.named_parameters() if p.requires_grad}
        optimizer = build_optimizer(groups, config.optimizer, device, self.offload)
        tree = dict(resolved.config)
        if self.offload and config.optimizer.name == "adamw":
            tree["zero_force_ds_cpu_optimizer"] = False
        self.decides_on_device = self._takes_over_the_check(tree, optimizer)
        if self.stage:
            _import_muon()
        _fit_buckets(tree, sum(math.prod(shape) for shape in self.parameter_shapes.values()))
        lowered = self.stage and "torch_autocast" in tree and config.train.gradient_dtype == "bf16"
        with _gradients_in(torch.bfloat16, method) if lowered else contextlib.nullcontext():
            self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(model=method, optimizer=optimizer, config=tree)
        if lowered:
            self.optimizer.get_param_comm_dtype = lambda parameter: torch.bfloat16
        self.method: Method = self.deepspeed.module

    def _takes_over_the_check(self, tree: dict[str, Any], optimizer: torch.optim.Optimizer) -> bool:
        """Whether the finite check, the norm and the clipping are done here, on the device, instead of in DeepSpeed.

        DeepSpeed reads the norm on the host in each step. ZeRO 1 and 2 can be told not to compute it; ZeRO 3 cannot,
        offloaded gradients are on the host anyway, and fp16's loss scale lives there.
        """
        autocast = tree.get("torch_autocast", {})
        lossy = autocast.get("enabled", False) and autocast.get("dtype") == "float16"
        if self.stage == 3 or self.offload or lossy or not isinstance(optimizer, torch.optim.AdamW):
            return False
        tree["gradient_clipping"] = 0.0
        if self.stage:
            tree["zero_optimization"] = {**tree["zero_optimization"], "compute_grad_norm": False}
        return True

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        """The torch-style optimizer that holds the moments."""
        return self.optimizer.optimizer if self.stage else self.optimizer

    def __call__(self, phase: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Run one phase of the method's forward."""
        return self.deepspeed(phase, inputs)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode for the duration of a block."""
        self.deepspeed.eval()
        yield
        self.deepspeed.train()

    def backward(self, loss: Tensor) -> None:
        """Backward pass; gradients come out averaged over ranks.

        A loss that is not finite on one rank becomes gradients that are not finite on all, so that `step` skips.
        """
        # Times one, exactly, or times NaN: the reduction of the gradients then carries the news, without a collective.
        detached = loss.detach()
        self.deepspeed.backward(loss * (1.0 + (detached - detached)))

    def grad_scaler(self) -> torch.amp.GradScaler | None:
        """The fp16 gradient scaler, wherever the stage keeps it."""
        if self.stage == 0:
            return self.deepspeed.torch_autocast_z0_gradscaler
        return self.optimizer.torch_autocast_gradscaler

    def set_learning_rate(self, rate: Callable[[int | None], float]) -> None:
        """Set every group's rate for the next step: `rate` of its `last_step`, times its factor (`TrainingRule`)."""
        for group in self.base_optimizer.param_groups:
            group["lr"] = rate(group["last_step"]) * group["lr_factor"]

    def step(self) -> tuple[Tensor, Tensor]:
        """Take the optimizer step unless a gradient is not finite; every rank decides the same. Collective.

        Returns:
            Two scalars on the device: whether the step was skipped (bool), and the global gradient norm before
            clipping (float32). Where `decides_on_device`, nothing here waited for the device.
        """
        if self.decides_on_device:
            return self._step_on_device()
        if self.stage == 0:
            return self._step_unsharded()
        scaler = self.grad_scaler()
        scale = 1.0 if scaler is None else scaler.get_scale()
        self.deepspeed.step()
        applied = self.deepspeed.was_step_applied()
        if scaler is not None and not applied:
            # ZeRO leaves before it has told the scaler of an overflow; without this the scale would never come down.
            scaler.update(scale * scaler.get_backoff_factor())
        norm = self.deepspeed.get_global_grad_norm()
        return self._on_device(not applied, math.nan if norm is None else norm / scale)

    @torch.no_grad()
    def _step_on_device(self) -> tuple[Tensor, Tensor]:
        # torch's fused kernels leave parameters, moments and step counter alone where `found_inf` is 1, and divide the
        # gradients by `grad_scale`: the check and the clipping cost one pass for the norm and no word to the host.
        norm = self._gradient_norm()
        skipped = ~norm.isfinite()
        optimizer = self.base_optimizer
        optimizer.found_inf = skipped.float()
        if self.clip:
            optimizer.grad_scale = ((norm + 1e-6) / self.clip).clamp(min=1.0)
        self.deepspeed.step()
        return skipped, norm

    def _gradient_norm(self) -> Tensor:
        """Norm of the averaged gradients of all ranks, the same on every rank."""
        if self.stage == 0:
            return torch.nn.utils.get_total_norm([p.grad for p in self.method.parameters() if p.grad is not None])
        # Each rank holds the gradients of its own partition of every group.
        pieces = [piece for group in self.optimizer.averaged_gradients.values() for piece in group]
        squared = torch.nn.utils.get_total_norm(pieces).float().square()
        dist.all_reduce(squared)
        return squared.sqrt()

    def _on_device(self, skipped: bool, norm: float | Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor(skipped, device=self.device), torch.as_tensor(norm, device=self.device)

    def _step_unsharded(self) -> tuple[Tensor, Tensor]:
        # ZeRO 0 has no finite check of its own. The gradients are already averaged, so all ranks see the same norm.
        scaler = self.grad_scaler()
        norm = float(self._gradient_norm()) / (1.0 if scaler is None else scaler.get_scale())
        skipped = not math.isfinite(norm)
        if not skipped or scaler is not None:
            self.deepspeed.step()
            return self._on_device(skipped, norm)
        self.deepspeed.zero_grad()
        self.deepspeed.micro_steps += 1
        self.deepspeed.global_steps += 1
        self.deepspeed.skipped_steps += 1
        return self._on_device(skipped, norm)

    @torch.no_grad()
    def project(self, bounded: list[BoundedParameter]) -> None:
        """Project temperatures onto their bounds, in the fp32 master and in the working copy, on all ranks.

        Clamping only the parameter is undone by the next step, which starts from the master.
        """
        for entry in bounded:
            parameter, low, high = entry.parameter, entry.low, entry.high
            if self.stage == 3:
                self._project_partitioned(parameter, low, high)
                continue
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                mapping.get_hp_fragment().clamp_(low, high)
            parameter.data.clamp_(low, high)

    def _project_partitioned(self, parameter: torch.nn.Parameter, low: float, high: float) -> None:
        import deepspeed
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        safe_set_local_fp32_param(parameter, safe_get_local_fp32_param(parameter).clamp(low, high))
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.clamp_(low, high)

    def broadcast_buffers(self) -> None:
        """Give every rank rank 0's buffers; DeepSpeed broadcasts parameters only."""
        if dist.get_world_size() > 1:
            for buffer in self.method.buffers():
                dist.broadcast(buffer, src=0)
