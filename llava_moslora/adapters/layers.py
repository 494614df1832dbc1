"""MoSLoRA layers, as thin subclasses of PEFT's LoRA layers; those over quantised linear layers are in bnb.py.

A layer adds one parameter, ``lora_mixer`` (r×r, next to ``lora_A`` and ``lora_B``), and one PEFT variant that uses it;
PEFT's forward loops, merging and handling of several adapters are unchanged.

Shapes: r rank, in/out features of the layer. All weights are floating point, of one dtype.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraVariant
from torch import nn

from llava_moslora import recompute
from llava_moslora.adapters import starts
from llava_moslora.adapters.config import MosLoraConfig, check_even_rank
from llava_moslora.adapters.fold import add, delta
from llava_moslora.adapters.kernel import low_rank_update
from llava_moslora.adapters.linear import adapted_linear, frozen_dtype
from llava_moslora.adapters.shared_input import SharedInput
from llava_moslora.errors import Refusal
from llava_moslora.private_api import check_private_api

if TYPE_CHECKING:  # each subclass of MosLoraLayer also has one of PEFT's layer classes as a base
    from peft.tuners.lora import Linear as PeftLayer
else:
    PeftLayer = object

check_private_api("adapters.layers")


class MosLoraVariant(LoraVariant):
    """The PEFT variant of an adapter made from a ``MosLoraConfig``; ``module`` is one of the layers below."""

    @staticmethod
    def init(module: MosLoraLayer, adapter_name: str, config: MosLoraConfig, **kwargs) -> None:
        """Create W with the settings of ``config``, which is this module's own; a frozen identity is not stored."""
        frozen: tuple[str, ...] = ()
        if config.has_mixer or config.start == "folded":
            rank = module.r[adapter_name]
            mixer = nn.Linear(rank, rank, bias=False)
            if not mixer.weight.is_meta:
                init_mixer(mixer.weight.data, config.mixer_init)
        if config.start == "folded":  # after the same random draws as with a mixer that is kept
            starts.fold_mixer(module.lora_A[adapter_name].weight, mixer.weight)
        elif config.has_mixer:
            module.lora_mixer[adapter_name] = mixer
            module._move_adapter_to_device_of_base_layer(adapter_name)
            frozen = () if config.train_mixer else ("lora_mixer",)
        if config.start not in ("lora", "folded"):
            starts.start(module, adapter_name, config)
            frozen = starts.FROZEN.get(config.start, ())
        if frozen:
            # PEFT applies this after everything that makes adapters trainable. The class default is shared.
            module.frozen_peft_weight_names = {**module.frozen_peft_weight_names, adapter_name: frozen}

    @staticmethod
    def forward(module: MosLoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs):
        """``result + s·drop(x)·Aᵀ·Wᵀ·Bᵀ`` (paper eq. 7): x (…, in), result (…, out) → (…, out)."""
        weights = module.adapter_weights(active_adapter)
        scaling, p = module.scaling[active_adapter], module.dropout_probability(active_adapter)
        return low_rank_update(result, x, *weights, scaling, p)

    @staticmethod
    def merge_safe(module: MosLoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        if module.keep_base and not module.merged_adapters:
            module._cache_store(BASE_WEIGHT, orig_weight.clone())
        return add(orig_weight, module.get_delta_weight(active_adapter))

    @staticmethod
    def merge_unsafe(module: MosLoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data.copy_(MosLoraVariant.merge_safe(module, active_adapter, orig_weight.data))

    @staticmethod
    def unmerge(module: MosLoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        # PEFT unmerges all adapters, one after the other: the saved base weight is restored with the last.
        if BASE_WEIGHT in module._caches and not module.merged_adapters:
            return module._cache_pop(BASE_WEIGHT)
        return add(orig_weight, -module.get_delta_weight(active_adapter))


BASE_WEIGHT = "base weight before merging"


def keep_base(model: nn.Module, keep: bool = True) -> None:
    """Whether merging keeps a copy of each base weight, so that unmerging is exact instead of exact up to rounding."""
    for module in model.modules():
        if isinstance(module, MosLoraLayer):
            module.keep_base = keep


def init_mixer(weight: torch.Tensor, how: str) -> None:
    """Initialise W (r, r) in place; ``how`` is one of ``MIXER_INITS`` (paper §3.2 and eq. 6)."""
    rank = len(weight)
    if how == "kaiming_uniform":
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    elif how == "orthogonal":
        exact = torch.promote_types(weight.dtype, torch.float32)  # there is no 16-bit QR
        weight.copy_(nn.init.orthogonal_(torch.empty(rank, rank, dtype=exact)))
    elif how == "identity":
        nn.init.eye_(weight)
    elif how == "normal":
        nn.init.normal_(weight)
    elif how == "butterfly":
        weight.copy_(torch.eye(rank // 2).repeat(2, 2))
    else:
        raise AssertionError(f"MosLoraConfig accepted the mixer init {how!r}")


class MosLoraLayer(PeftLayer):
    """Base of our layers, before a LoRA layer class of PEFT among the bases."""

    adapter_layer_names = (*lora.LoraLayer.adapter_layer_names, "lora_mixer", "lora_start_A", "lora_start_B")

    keep_base = False  # see the function of that name
    _unchecked: MosLoraConfig | None = None  # of an adapter that PEFT is still adding to the model

    def __init__(self, base_layer, adapter_name, config, r=0, lora_alpha=1, target_name="", **kwargs):
        # Here because PEFT's bitsandbytes layers do not pass target_name on to update_layer.
        config = config.for_module(target_name)
        super().__init__(base_layer, adapter_name, config=config, r=r, lora_alpha=lora_alpha, **kwargs)

    def update_layer(self, adapter_name, r, lora_alpha, config, target_name="", **kwargs):
        """Add an adapter: any :class:`peft.LoraConfig`, with a mixer if it is a ``MosLoraConfig``.

        Raises:
            Refusal: C-RANK if r exceeds min(in, out), or is odd for a butterfly.
        """
        if "lora_mixer" not in self._modules:
            self.lora_mixer = nn.ModuleDict()
            self.lora_start_A, self.lora_start_B = nn.ModuleDict(), nn.ModuleDict()
        if isinstance(config, MosLoraConfig):
            config = config.for_module(target_name)
            if r > min(self.in_features, self.out_features):
                raise Refusal(
                    "C-RANK", "the rank is too large for the layer", key=config.module_name, found=r,
                    expected=f"at most min(in, out) = {min(self.in_features, self.out_features)}",
                    fix="lower r, or give this module its own rank in rank_pattern",
                )  # fmt: skip
            if config.mixer_init == "butterfly":
                check_even_rank(config.module_name, r)
        super().update_layer(adapter_name, r, lora_alpha, config, target_name=target_name, **kwargs)
        if isinstance(config, MosLoraConfig):
            self._unchecked = config.full_config

    def set_adapter(self, adapter_names, inference_mode=False):
        super().set_adapter(adapter_names, inference_mode)
        # PEFT calls this on every layer after it has visited the whole model: only now is it known which targets
        # matched nothing.
        if self._unchecked is not None:
            config, self._unchecked = self._unchecked, None
            config.check_targets()

    def resolve_lora_variant(self, *, config, **kwargs):
        if isinstance(config, MosLoraConfig):
            return MosLoraVariant()
        return super().resolve_lora_variant(config=config, **kwargs)

    def forward(self, x, *args, **kwargs):
        """As PEFT's, float[..., in] → float[..., out]; the frozen linear and a single MoSLoRA as one operation."""
        adapter = None if args or kwargs else self._only_adapter(x)
        if adapter is None:
            with recompute.save_operations():
                return super().forward(x, *args, **kwargs)
        weights = self.adapter_weights(adapter)
        scaling, p = self.scaling[adapter], self.dropout_probability(adapter)
        gradient = None if self.shared_input is None else self.shared_input.gradient_of(x)
        return adapted_linear(x, self.get_base_layer(), *weights, scaling, p, self.ends_layer, gradient)

    ends_layer = False  # see adapted_linear; set by recompute.py
    shared_input: SharedInput | None = None  # set by share_inputs
    fused_base_layers: tuple[type[nn.Module], ...] = (nn.Linear,)  # what ``adapted_linear`` computes itself

    def _only_adapter(self, x: torch.Tensor) -> str | None:
        """The adapter to fuse with the frozen linear layer into one operation: the only active one, in the layer's
        dtype, if no hook uses or moves the layer's weight (ZeRO-3, offloading); else None."""
        base = self.get_base_layer()
        if type(base) not in self.fused_base_layers or self.disable_adapters or self.merged:
            return None
        if not (self.training or torch.is_grad_enabled()):
            return None  # generation: for one token the plain formula costs less than the operation's overhead
        here = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        if len(here) != 1 or not isinstance(self.lora_variant.get(here[0]), MosLoraVariant):
            return None
        if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            return None
        if "forward" in vars(base) or base.weight.device != x.device:  # set by accelerate's offloading
            return None
        if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
            return None
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            return None
        one_dtype = x.dtype == frozen_dtype(base) == self.lora_A[here[0]].weight.dtype
        return here[0] if one_dtype else None

    def dropout_probability(self, adapter: str) -> float:
        """0 outside training."""
        dropout = self.lora_dropout[adapter]
        return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def _cast_input_dtype(self, x, dtype):
        # PEFT casts x to the adapter's dtype again for every layer. Ours casts inside the operation, so that the x
        # saved for backward is shared between layers.
        here = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        if all(isinstance(self.lora_variant.get(adapter), MosLoraVariant) for adapter in here):
            return x
        return super()._cast_input_dtype(x, dtype)

    def adapter_weights(self, adapter: str) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """A (r, in), W (r, r) or None without a mixer, B (out, r); PiSSA: with the frozen pair, at twice the rank."""
        w = self.lora_mixer[adapter].weight if adapter in self.lora_mixer else None
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        if adapter in self.lora_start_A:  # s·(B·A − B₀·A₀)
            a = torch.cat([a, self.lora_start_A[adapter].weight])
            b = torch.cat([b, -self.lora_start_B[adapter].weight], dim=1)
        return a, w, b

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """ΔW = s·B·W·A (out, in) in fp32 (fp64 for fp64 weights), for PEFT's merging."""
        if adapter not in self.lora_variant:  # a plain LoRA next to ours
            return super().get_delta_weight(adapter)
        return delta(*self.adapter_weights(adapter), self.scaling[adapter])

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        """Refuse an incomplete adapter: PEFT silently drops an unexpected mixer, and only warns of a missing one.

        Raises:
            Refusal: K-ADAPTER naming the tensors that are missing from, and unexpected in, this layer.
        """
        own = {prefix + name for name, _ in self.named_parameters()}
        unexpected = [name for name in state_dict if name.startswith(prefix + "lora_") and name not in own]
        missing = []
        for adapter in self.lora_variant:
            parts = {name for name in own if f".{adapter}." in name[len(prefix) :]}
            if not parts.isdisjoint(state_dict):  # this adapter is being loaded
                missing += sorted(parts.difference(state_dict))
        if missing or unexpected:
            raise Refusal(
                "K-ADAPTER",
                f"tensors missing: {', '.join(missing) or 'none'}, unexpected: {', '.join(unexpected[:3]) or 'none'}",
                fix="load the configuration that was saved with these weights",
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MosLoraLinear(MosLoraLayer, lora.Linear):
    """MoSLoRA over ``nn.Linear``."""


class UnsupportedModule:
    """Refuses every other kind of module: otherwise PEFT would add a plain LoRA to it."""

    def __init__(self, base_layer, adapter_name, *, target_name="", **kwargs):
        raise Refusal(
            "C-TARGET", "MoSLoRA supports nn.Linear and bitsandbytes 4-bit and 8-bit linear layers", key=target_name,
            found=type(base_layer).__name__, fix="remove it from target_modules",
        )  # fmt: skip
