"""Muon (Jordan et al. 2024): momentum whose update is replaced by the nearest half-orthogonal matrix.

`torch.optim.Muon` does the same in bf16, which a CPU without bf16 instructions computes three times slower than fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """For the two-dimensional weights inside the layers; embeddings and norms need AdamW. Nesterov momentum,
    decoupled weight decay, fp32."""

    def __init__(self, matrices: Iterable[torch.nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95):
        super().__init__(list(matrices), {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update from the gradients; parameters without a gradient do not change."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state: dict[str, Any] = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalized(parameter.grad.lerp(state["momentum"], group["momentum"]))
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of `matrix` = U S V^T: singular values between 0.5 and 1.5, by five quintic Newton-Schulz steps."""
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
    return wide.T if tall else wide
