"""Modules in float32 amid others of a narrower type: what goes in is cast, and what comes out where it must be."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn


def widen(module: nn.Module) -> None:
    """Make `module` float32; what goes in is cast to it, what comes out stays as it is."""
    module.float()
    module.register_forward_pre_hook(_in_its_type, with_kwargs=True)


def wide_inside(module: nn.Module, *, outside: torch.dtype) -> None:
    """`widen`, amid others of the type `outside`, to which what comes out is cast back.

    Autocast would do so in training alone; measurements, and a CPU, have none.
    """

    def back(_: nn.Module, __: Any, given: Any) -> Any:
        return _cast(given, outside)

    widen(module)
    module.register_forward_hook(back)


def _in_its_type(
    module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dtype = next(module.parameters()).dtype
    return _cast(arguments, dtype), _cast(named, dtype)


def _cast(values: Any, dtype: torch.dtype) -> Any:
    """Every tensor of floats in `values` in this type; what else is in there as it is."""
    return recursively_apply(lambda one: one.to(dtype) if one.is_floating_point() else one, values)
