"""How the adapters begin that do not begin as PEFT's default; the base's own weights are never changed.

PEFT's PiSSA and OLoRA take what the adapter begins with out of the base. The base is then another: switched off, the
adapter leaves a model that nobody has measured, and a saved adapter fits no base on disk. Here the adapter has twice
the rank: the first half begins as PEFT's would, the second is its negative and frozen. Both begin as nothing, and
    W + s (B A - B0 A0)    is the same function as    (W - s B0 A0) + s B A.
It is what PEFT itself makes of these adapters with `path_initial_model_for_weight_conversion`, from the first step on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, initialize_lora_eva_weights
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ift_peft.errors import ModelError
from ift_peft.model.precision import wide_inside
from ift_peft.sections import Adapter, Head

NAME = "default"  # of a run's adapter, in PEFT
MOST_EVA_BATCHES = 500


def base_weight(module: nn.Module) -> Tensor:
    """The weight of a linear module as its forward takes it, dequantised: float32 of shape (outputs, inputs)."""
    weight: Tensor = dequantize_module_weight(module).detach().float()
    return weight.T.contiguous() if isinstance(module, Conv1D) else weight


def _lora_linears(model: Any) -> Iterator[tuple[str, Any]]:
    """Names in the base, and modules, that LoRA's matrices lie on."""
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and NAME in module.lora_A:
            yield name, module


@torch.no_grad()
def begin_with_base(model: Any, adapter: Adapter) -> None:
    """pissa: the first half begins as the base's principal singular directions; olora: as its first QR directions.

    The decompositions are PEFT's, of a copy of each weight. `model` is a `PeftModel` whose LoRA has twice the rank.
    """
    kind = {"pissa": f"pissa_niter_{adapter.pissa_niter}" if adapter.pissa_niter else "pissa"}
    for _, module in _lora_linears(model):
        weight = base_weight(module.get_base_layer())
        copied = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        copied.weight.copy_(weight)
        rank = module.r[NAME] // 2
        alpha = module.scaling[NAME] * rank
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=kind.get(adapter.method, adapter.method))
        begun = Linear(copied, NAME, config=config, r=rank, lora_alpha=alpha)
        down, up = begun.lora_A[NAME].weight, begun.lora_B[NAME].weight
        module.lora_A[NAME].weight.copy_(torch.cat([down, down]))
        module.lora_B[NAME].weight.copy_(torch.cat([up, -up], dim=1))


def freeze_second_half(model: Any) -> int:
    """Give the second half of each matrix no gradient, and return how many weights these are.

    An optimizer leaves weights alone whose gradient was always 0, unless it decays them, which the recipe rules out.
    """
    frozen = 0
    for _, module in _lora_linears(model):
        rank = module.r[NAME] // 2
        for weight, dimension in ((module.lora_A[NAME].weight, 0), (module.lora_B[NAME].weight, 1)):
            weight.register_hook(lambda gradient, d=dimension, r=rank: _without_second(gradient, d, r))
            frozen += weight.numel() // 2
    return frozen


def _without_second(gradient: Tensor, dimension: int, rank: int) -> Tensor:
    kept = gradient.clone()
    kept.narrow(dimension, rank, rank).zero_()
    return kept


@torch.no_grad()
def begin_with_residual(model: Any, full: PreTrainedModel) -> None:
    """loftq: the adapter begins as the best approximation of rank r to what quantisation took from the base.

    LoftQ with one iteration (Li et al. 2023, arXiv:2310.08659, algorithm 1): more would quantise another base. `full`
    is the base unquantised. PEFT's own leaves lora_alpha / r out, so that it begins elsewhere unless that is 1.
    """
    for name, module in _lora_linears(model):
        weight = base_weight(module.get_base_layer())
        lost = base_weight(full.get_submodule(name)).to(weight.device) - weight
        rank = module.r[NAME]
        left, values, right = torch.linalg.svd(lost, full_matrices=False)
        root = (values[:rank] / module.scaling[NAME]).sqrt()
        module.lora_A[NAME].weight.copy_(root[:, None] * right[:rank])
        module.lora_B[NAME].weight.copy_(left[:, :rank] * root)


def begin_with_activations(model: Any, adapter: Adapter, batches: Iterable[dict[str, Tensor]], *, head: Head) -> None:
    """eva: A begins as the principal directions of each module's inputs, with ranks by how much they explain.

    PEFT's `initialize_lora_eva_weights` over `batches` of `input_ids` and `attention_mask`, again from the first until
    the directions stand still. All tokens count, not only the supervised: of a classified text these are too few. The
    configuration then holds the ranks found, and is that of a plain LoRA, so that the adapter opens without data.
    Raises `ModelError` where they do not stand still.
    """
    done = 0
    last = {"logits_to_keep": 1} if head == "causal-lm" else {}  # nobody looks at logits

    def forward(model: Any, batch: dict[str, Tensor]) -> None:
        nonlocal done
        done += 1
        if done > MOST_EVA_BATCHES:
            raise ModelError(
                expected=f"directions of the inputs that stand still within {MOST_EVA_BATCHES} batches",
                found="some that do not",
                fix="lower adapter.r, or set adapter.method=lora",
            )
        model(**batch, **last)

    config = model.peft_config[NAME]
    config.init_lora_weights, config.eva_config = "eva", EvaConfig(rho=adapter.eva_rho, use_label_mask=False)
    initialize_lora_eva_weights(model, batches, forward_fn=forward, show_progress_bar=False)
    config.init_lora_weights, config.eva_config = True, None


def in_float32(model: Any) -> None:
    """Keep what is trained in float32, as PEFT opens it again.

    TRL rounds it to bfloat16 over packed weights. Then the model that is measured after training is not the one that
    PEFT makes of the saved adapter, and what begins at a size of its own, as (IA)3's vectors at 1, rounds most steps
    away.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def whole_in_float32(model: Any, name: str = NAME) -> bool:
    """Let the modules that the adapter `name` trains whole be float32 over a base of 16 bits; whether there are any.

    PEFT casts what goes into its own layers, not what goes into these, and opens them in the type of the base. Called
    once for each adapter; what was loaded into them before was rounded.
    """
    found = False
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and name in wrapper.modules_to_save:
            outside = next(wrapper.original_module.parameters()).dtype
            if outside in (torch.bfloat16, torch.float16):
                wide_inside(wrapper.modules_to_save[name], outside=outside)
                found = True
    return found
