"""The exact filter as Pallas Mosaic GPU kernels, for Hopper GPUs."""

from .dispatch import Backend as Backend
from .dispatch import chosen as chosen
from .dispatch import device_refusal as device_refusal
from .dispatch import kernel_scan as kernel_scan
from .dispatch import refusal as refusal
