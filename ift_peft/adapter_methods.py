"""The methods of adapting: what each is called, which settings it takes, and which bases it works over."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

Method = Literal["lora", "rslora", "dora", "pissa", "olora", "loftq", "eva", "vera", "ia3", "adalora"]

NAMES: dict[Method, str] = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "loftq": "LoftQ",
    "eva": "EVA",
    "vera": "VeRA",
    "ia3": "(IA)³",
    "adalora": "AdaLoRA",
}
# Saved as PEFT's LoRA; the others are PEFT types of their own.
RANKED: tuple[Method, ...] = ("lora", "rslora", "dora", "pissa", "olora", "loftq", "eva")
# What they add to a weight adds up, and is all that they change.
COMBINES: tuple[Method, ...] = ("lora", "rslora", "pissa", "olora", "eva")
# Begun as a part of the base's weights, which a second, frozen half takes away again.
SUBTRACTS_ITS_START: tuple[Method, ...] = ("pissa", "olora")

# Settings that not every method takes: by which it is taken, and why by no other.
TAKEN_BY: dict[str, tuple[tuple[Method, ...], str]] = {
    "r": ((*RANKED, "vera", "adalora"), "it has no rank"),
    "lora_alpha": ((*RANKED, "adalora"), "its vectors are learnt without a scale"),
    "lora_dropout": (
        ("lora", "rslora", "dora", "loftq", "eva", "vera", "adalora"),
        "pissa and olora would drop parts of the base's own weights, ia3 has no place for it",
    ),
    "bias": (RANKED, "it trains what is its own, and no biases"),
    "embeddings": (
        ("lora", "rslora", "dora"),
        "it is made for linear modules only; name the embedding in modules_to_save",
    ),
    "use_rslora": (RANKED, "its scale does not depend on a rank"),
    "rank_pattern": (RANKED, "it has no rank of its own for each module, or finds it itself"),
    "alpha_pattern": (RANKED, "it has one scale for all modules, or none"),
    "loraplus_lr_ratio": (RANKED, "LoRA+ is about the matrices A and B of LoRA"),
    "pissa_niter": (("pissa",), "only pissa has it"),
    "eva_rho": (("eva",), "only eva has it"),
    "feedforward_modules": (("ia3",), "only ia3 has it"),
    "init_r": (("adalora",), "only adalora has it"),
    "tinit": (("adalora",), "only adalora has it"),
    "tfinal": (("adalora",), "only adalora has it"),
    "orth_reg_weight": (("adalora",), "only adalora has it"),
}


def article(method: Method) -> str:
    return "An" if NAMES[method][0] in "AEIO(" or method == "rslora" else "A"


def unused_settings(method: Method, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """What is set, though the method has no use for it: `expected` of an error for each."""
    return [
        f"{name} left at {defaults[name]!r} with {method} ({why})"
        for name, (methods, why) in TAKEN_BY.items()
        if method not in methods and given[name] != defaults[name]
    ]


def why_not_over(method: Any, quantization: Any) -> str | None:
    """Why the method does not work over a base so quantised; None where it does."""
    if method == "loftq" and quantization not in ("nf4", "fp4"):
        return "loftq begins as what 4 bits took from the base: base.quantization nf4 or fp4"
    if method == "dora" and quantization == "int8":
        return (
            "dora unpacks weights in each step, by which bitsandbytes loses the scales of int8 on a CPU: "
            "base.quantization none, nf4 or fp4"
        )
    return None


def conflicts(adapter: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What the method and `training` as written ask of each other: expected, the setting of `training`, and a fix."""
    method = adapter.get("method", "lora")
    if method in SUBTRACTS_ITS_START and training.get("weight_decay"):
        expected = f"training.weight_decay=0 with adapter.method {method}, whose frozen half must not decay"
        yield expected, "weight_decay", "remove it, or set adapter.method=lora"
    steps, kept = training.get("max_steps"), [adapter.get(name, 0) for name in ("tinit", "tfinal")]
    numbers = all(isinstance(one, int) for one in (steps, *kept))
    if method == "adalora" and numbers and 0 < steps <= sum(kept):  # type: ignore[operator]
        yield "adapter.tinit and adapter.tfinal to leave steps in which ranks are reduced", "max_steps", "train longer"
    optimizer = str(training.get("optim", ""))
    if adapter.get("loraplus_lr_ratio") is not None and optimizer.startswith(("galore", "apollo", "lomo", "adalomo")):
        yield "adapter.loraplus_lr_ratio with an optimizer that takes groups of weights", "optim", "remove it"
