"""What the stages share: a timed loop, an average of the weights, checkpoints, a record."""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

WORK = Path(__file__).parent / "work"
PROGRESS = Path(__file__).parent / "progress.json"
EMBEDDED = Path(__file__).parent.parent / "fasttrace" / "embedded"
# without instructions for it, bf16 is ten times slower than fp32
FAST_BF16 = torch.cpu.get_capabilities().get("avx512_bf16", False)


def arguments(minutes: float, batch: int, lr: float) -> argparse.Namespace:
    """The flags every stage takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=minutes, help="wall time to train for")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-decay", action="store_true", help="keep the rate; more will follow")
    return parser.parse_args()


def plain_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
    """Same numbers as torch's fused attention, whose CPU backward is a third slower here."""
    if attn_mask is not None or is_causal or scale is not None:  # the text encoder's
        return _fused(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **more)
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), -1) @ v


_fused = F.scaled_dot_product_attention


def use_plain_attention() -> None:
    """For this process, which only trains."""
    F.scaled_dot_product_attention = plain_attention


def save_state(path: Path, module: nn.Module, views: int) -> None:
    """Atomic, so that a kill leaves the previous checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous().clone() for k, v in module.state_dict().items()}
    temporary = path.with_suffix(".tmp")
    save_file(state, temporary, metadata={"views": str(views)})
    os.replace(temporary, path)


def load_state(path: Path, module: nn.Module) -> int:
    """Load weights if `path` exists; returns the pictures seen so far."""
    if not path.exists():
        return 0
    module.load_state_dict(load_file(path))
    with safe_open(path, "pt") as file:
        return int((file.metadata() or {}).get("views", 0))


def seen_so_far(name: str) -> int:
    """Pictures a stage has been trained on in all sessions."""
    record = json.loads(PROGRESS.read_text()) if PROGRESS.exists() else {}
    return int(record.get(name, {}).get("views", 0))


def record_progress(name: str, views: int, minutes: float, evaluation: str) -> None:
    """Keep `progress.json`, which the model card quotes, true."""
    record = json.loads(PROGRESS.read_text()) if PROGRESS.exists() else {}
    before = record.get(name, {}).get("minutes", 0)
    record[name] = {
        "views": views,
        "minutes": round(before + minutes, 1),
        "evaluation": evaluation,
    }
    PROGRESS.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def train(
    name: str,
    module: nn.Module,
    loss_of_batch: Callable[[int], torch.Tensor],
    args: argparse.Namespace,
    evaluate: Callable[[nn.Module], str],
    evaluate_every: float = 300,
    ema_decay: float = 0.999,
    views: int = 0,
) -> nn.Module:
    """Train for `args.minutes`, in bf16 where that is fast; returns the average, saved in WORK.

    loss_of_batch(batch size) draws a batch and returns the scalar loss.
    """
    torch.manual_seed(1000 + views)  # a continued run must not draw the same noise again
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=args.lr, weight_decay=0.01, betas=(0.9, 0.99)
    )
    average = copy.deepcopy(module).requires_grad_(False).eval()
    start, last_log, last_evaluation = time.time(), time.time(), time.time()
    step, running, since = 0, 0.0, 0
    while (elapsed := time.time() - start) < args.minutes * 60:
        progress = elapsed / (args.minutes * 60)
        rate = min(1.0, (step + 1) / 200)
        if not args.no_decay:
            rate *= min(1.0, max(0.02, (1 - progress) / 0.4))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        module.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=FAST_BF16):
            loss = loss_of_batch(args.batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        step, views, since = step + 1, views + args.batch, since + 1
        running += loss.item()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            held_state = average.state_dict()
            for key, current in module.state_dict().items():
                held = held_state[key]
                if held.is_floating_point():
                    held.lerp_(current, 1 - decay)
                else:
                    held.copy_(current)
        now = time.time()
        if now - last_log > 30:
            pictures = since * args.batch / (now - last_log)
            print(
                f"{name} {elapsed / 60:5.1f} min, {views} views, loss {running / since:.4f}, "
                f"{pictures:.0f} pictures/s",
                flush=True,
            )
            running, since, last_log = 0.0, 0, now
        if now - last_evaluation > evaluate_every:
            save_state(WORK / f"{name}.safetensors", average, views)
            print(f"{name} {elapsed / 60:5.1f} min: {evaluate(average)}", flush=True)
            last_log = last_evaluation = time.time()
            running, since = 0.0, 0
    save_state(WORK / f"{name}.safetensors", average, views)
    evaluation = evaluate(average)
    record_progress(name, views, args.minutes, evaluation)
    print(f"{name} done after {views} views: {evaluation}", flush=True)
    return average
