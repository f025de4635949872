"""The same GPT as a bare PyTorch loop, for comparison: no logging, no evaluation, no checkpoints."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from altgrad_jax.model import GPTConfig


class Block(nn.Module):
    """Pre-LayerNorm block without biases."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        width = config.n_embd
        self.n_head = config.n_head
        self.norm_1 = nn.LayerNorm(width, bias=config.bias)
        self.qkv = nn.Linear(width, 3 * width, bias=config.bias)
        self.proj = nn.Linear(width, width, bias=config.bias)
        self.norm_2 = nn.LayerNorm(width, bias=config.bias)
        self.up = nn.Linear(width, 4 * width, bias=config.bias)
        self.down = nn.Linear(4 * width, width, bias=config.bias)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        """One block over whole sequences."""
        batch, time_, width = x_BTC.shape
        q, k, v = self.qkv(self.norm_1(x_BTC)).view(batch, time_, 3 * self.n_head, -1).transpose(1, 2).chunk(3, dim=1)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.proj(attended.transpose(1, 2).reshape(batch, time_, width))
        return x_BTC + self.down(F.gelu(self.up(self.norm_2(x_BTC)), approximate="tanh"))


class GPT(nn.Module):
    """Tied embeddings, learned positions."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02)

    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy."""
        x_BTC = self.wte(tokens_BT) + self.wpe(torch.arange(tokens_BT.shape[1], device=tokens_BT.device))
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits = self.norm_f(x_BTC) @ self.wte.weight.T
        return F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())


def make_step(
    config: GPTConfig,
    batch_size: int,
    *,
    device: str = "cpu",
    autocast: bool = False,
    compiled: bool = False,
    convert: Callable[[GPT], Any] = lambda model: model,
) -> Callable[[], torch.Tensor]:
    """A function that takes one more training step on random tokens and gives the loss; AdamW, gradients clipped.

    Args:
      config: the network's shape.
      batch_size: windows a step.
      device: where it runs.
      autocast: multiply in bfloat16, not float32.
      compiled: through `torch.compile`.
      convert: changes the model before it is compiled, to quantise its layers.
    """
    torch.manual_seed(0)
    model = GPT(config).to(device)
    model = convert(model)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(0, config.vocab_size, (batch_size, config.block_size + 1), device=device)
    run = torch.compile(model) if compiled else model

    def step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = run(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return step


def seconds_per_step(config: GPTConfig, batch_size: int, steps: int) -> list[float]:
    """Wall time of each of `steps` training steps, after one that is not counted; float32 on the CPU."""
    step, times = make_step(config, batch_size), []
    for _ in range(steps + 1):
        began = time.perf_counter()
        step().item()
        times.append(time.perf_counter() - began)
    return times[1:]
