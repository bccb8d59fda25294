"""What both trainings share: a rate for every step, Muon for the matrices of the layers, AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Schedule:
    steps: int
    seed: int = 0
    tokens_per_step: int = 2048
    peak_lr: float = 2e-3
    muon_scale: float = 2.0
    """Muon's rate over AdamW's."""
    warmup_steps: int = 150
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0

    def lr(self, step: int) -> float:
        """Linear warmup, then a cosine down to zero."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * progress))


class Optimizers:
    """Muon with steps as large as AdamW's, and AdamW for embedding and norms.

    Liu et al., Muon is Scalable for LLM Training, 2025, https://arxiv.org/abs/2502.16982
    """

    def __init__(self, layers: nn.Module, embedding: nn.Parameter, others: Iterable[nn.Parameter], plan: Schedule):
        matrices = [p for p in layers.parameters() if p.dim() > 1]
        norms = [p for p in (*layers.parameters(), *others) if p.dim() == 1]
        self.plan = plan
        self.parameters = [*matrices, embedding, *norms]
        self.each: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [{"params": [embedding]}, {"params": norms, "weight_decay": 0.0}],
                betas=plan.betas,
                weight_decay=plan.weight_decay,
                fused=True,
            ),
        ]

    def step(self, step: int) -> None:
        """Clip the gradients, go one step with the rate of ``step``, and forget them."""
        nn.utils.clip_grad_norm_(self.parameters, self.plan.max_grad_norm)
        for optimizer, scale in zip(self.each, (self.plan.muon_scale, 1.0), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = self.plan.lr(step) * scale
            optimizer.step()
            optimizer.zero_grad()
