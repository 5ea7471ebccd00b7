"""Training at one bit (Liu et al. 2022, "BiT"), convolutions included: quantisers, binary layers, policies, `binarize`."""

from __future__ import annotations

from .convert import binarize
from .modules import BinaryConv1d, BinaryLinear, Codes, Quantizer
from .packing import pack
from .policy import POLICIES, Policy, read_policy
from .report import quant_report

__all__ = ["POLICIES", "BinaryConv1d", "BinaryLinear", "Codes", "Policy", "Quantizer", "binarize", "pack", "quant_report", "read_policy"]
