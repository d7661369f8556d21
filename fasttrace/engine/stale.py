"""What a traced graph takes for granted about a denoiser."""

from __future__ import annotations

from typing import Any

from torch import nn

_PLAIN = (int, float, str, bool, type(None))


def structure_of(denoiser: nn.Module) -> Any:
    """Compares unequal once a graph traced before must be traced again.

    Seen: which modules there are and which tensors they own, where those lie, their shapes and
    dtypes, plain attributes (FreeU's factors, an adapter's scale), hooks, attention processors,
    training mode. Not part of it: the tensors' values. A graph reads them anew at every call, and
    everything computed from them beforehand is computed again at the start of every run, so an edit
    in place needs no new trace.

    Objects are compared by identity and held here, so that no other takes a dead one's address;
    hooks by their handles' numbers, which are never given twice.
    """
    found: list[Any] = []
    for name, module in denoiser.named_modules():
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        processor = getattr(module, "processor", None)
        found.append(
            (
                name,
                _Same(module),
                _Same(processor),
                _Same(vars(module).get("forward")),
                _plain(vars(module)),
                _plain(getattr(processor, "__dict__", {})),
                tuple(
                    (n, id(t), t.data_ptr() if not t.is_meta else 0, tuple(t.shape), t.dtype)
                    for n, t in tensors
                ),
                tuple(module._forward_hooks),
                tuple(module._forward_pre_hooks),
            )
        )
    return found


class _Same:
    """Equal to another one of the same object, which it keeps alive."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held

    __hash__ = None  # type: ignore[assignment]


def _plain(attributes: dict[str, Any]) -> dict[str, Any]:
    """Numbers, words, and copies of simple containers of them."""
    return {name: _copy(v) for name, v in attributes.items() if _is_plain(v)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(v, _PLAIN) for v in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return all(isinstance(v, _PLAIN) for v in value)
    return isinstance(value, _PLAIN)


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | list | set) else value
