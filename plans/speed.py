"""How fast a device trains networks of this kind, and so how long a training takes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import psutil
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from masksam_nnunet.config import MaskSAMConfig
from masksam_nnunet.cost import Precision, training_cost
from masksam_nnunet.errors import DataError
from masksam_nnunet.gpu import automatic_device
from masksam_nnunet.metering import Meter
from masksam_nnunet.modeling import MaskSAM
from masksam_nnunet.modeling.compute import autocast

from .architecture import config_for

ITERATIONS = 250  # of an epoch
FULL_EPOCHS = 1000  # nnU-Net's
FEW_EPOCHS = 500  # the paper's for ACDC: fewer are taken only where SAM would not finish at all
LEAST_EPOCHS = 100

UTILISATION = 0.35
"""Share of the peak that a training reaches: ours, not measured on a GPU yet. It gives the 60 TFLOP/s with which this
project reckons on a consumer card of 24 GB, and the 100 that is common on an A100."""
# Memory in GB, and the dense peak of the tensor cores in bfloat16 with float32 sums in TFLOP/s, from NVIDIA's data
# sheets and architecture white papers (Ampere GA102, Ada, Blackwell RTX; A100, H100 SXM, H200, L40S, RTX A6000).
GPUS = {
    "rtx3090": (24, 71),
    "rtx4090": (24, 165),
    "rtx5090": (32, 210),
    "a6000": (48, 155),
    "l40s": (48, 362),
    "a100": (80, 312),
    "h100": (80, 989),
    "h200": (141, 989),
}
CPU = "cpu"
ASSUMED = "rtx4090"
CPU_CORE = 0.06  # TFLOP/s in float32: trainings of docs/results.md on one core reach 0.06 to 0.08


@dataclass(frozen=True)
class Device:
    """What a training runs on."""

    name: str
    memory_gb: float
    tflops: float
    """Sustained, in 10^12 operations a second."""
    source: str
    """Where that number comes from."""

    @property
    def precision(self) -> Precision:
        """Of a training on it."""
        return "float32" if self.name == CPU else "bfloat16"

    def hours(self, tflop: float, epochs: float) -> float:
        """Of a training whose steps take so many operations."""
        return tflop * ITERATIONS * epochs / self.tflops / 3600

    def most_tflop(self, hours: float, epochs: int) -> float:
        """Of a step of a training that takes so many hours."""
        return hours * 3600 * self.tflops / (ITERATIONS * epochs)

    def epochs(self, tflop: float, hours: float) -> int:
        """As many as the hours allow, in tens, from :data:`LEAST_EPOCHS` to :data:`FULL_EPOCHS`."""
        possible = hours / self.hours(tflop, 1)
        return max(LEAST_EPOCHS, min(FULL_EPOCHS, math.floor(possible / 10) * 10))


def find_device(name: str | None) -> Device:
    """The named one; else the GPU at hand, which is measured, or :data:`ASSUMED` where there is none.

    A CPU is not measured: a few seconds say more of what else runs on it.

    Raises:
        DataError: no such name, or the GPU at hand is too busy to be measured.
    """
    name = name and name.lower()
    if name in GPUS:
        return _from_table(name, "as asked")
    if name == CPU:
        return _cpu()
    if name is not None:
        raise DataError(f"--gpu {name}: choose one of {', '.join((*GPUS, CPU))}")
    if automatic_device() == CPU:  # it says why a GPU that is there is not used
        return _from_table(ASSUMED, "no GPU here")
    properties = torch.cuda.get_device_properties(0)
    try:
        config = config_for("vit_b", (2, 256, 256), regions=False, resolution=4, checkpointing=True)
        tflops = measure(torch.device("cuda", 0), config, 10.0)
    except torch.OutOfMemoryError as error:
        busy = f"{properties.name} has no memory free for a measurement"
        raise DataError(f"{busy}; wait, or name it with --gpu") from error
    return Device(properties.name, properties.total_memory / 2**30, tflops, "measured")


def expected_device(device: torch.device) -> Device | None:
    """What a training on this device can expect without a measurement; None for a GPU that the table lacks."""
    if device.type == "cpu":
        return _cpu()
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower().replace(" ", "")
    of_desktops = () if "laptop" in name else GPUS
    return next((_from_table(known, name) for known in of_desktops if known in name), None)


def _cpu() -> Device:
    # A training takes all logical cores, which do no more than the physical ones.
    threads = min(torch.get_num_threads(), psutil.cpu_count(logical=False) or torch.get_num_threads())
    return Device(CPU, psutil.virtual_memory().total / 2**30, CPU_CORE * threads, f"{threads} threads")


def _from_table(name: str, why: str) -> Device:
    memory, peak = GPUS[name]
    return Device(name, memory, UTILISATION * peak, f"{why}; {UTILISATION:.0%} of {peak} TFLOP/s")


def measure(device: torch.device, config: MaskSAMConfig, seconds: float) -> float:
    """Operations a second of a network's training steps, in 10^12."""
    with device:
        network = MaskSAM(config, 1, 4).train()
        x = torch.randn(2, 1, *config.patch_size)

    def step() -> None:
        with autocast(device):
            output = network(x)
        torch.stack([part.float().square().mean() for part in output[:4]]).sum().backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()  # warm-up
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step()
        steps += 1
    taken = time.perf_counter() - start
    precision: Precision = "bfloat16" if device.type == "cuda" else "float32"
    return steps * training_cost(config, 1, 4, 2, precision=precision).tflop / taken


def unet_tflop(configuration: ConfigurationManager, channels: int, classes: int) -> float:
    """Operations of a training step of the network of nnU-Net's plans, in 10^12."""
    with Meter() as meter:
        network = get_network_from_plans(
            configuration.network_arch_class_name,
            configuration.network_arch_init_kwargs,
            configuration.network_arch_init_kwargs_req_import,
            channels,
            classes,
        )
        outputs = network(torch.zeros(configuration.batch_size, channels, *configuration.patch_size))
        torch.stack([x.mean() for x in (outputs if isinstance(outputs, list | tuple) else [outputs])]).sum().backward()
    return meter.flops / 1e12
