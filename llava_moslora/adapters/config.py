"""``MosLoraConfig``: a PEFT LoRA configuration with a mixer, for stock PEFT on any model.

    from peft import get_peft_model
    from llava_moslora import MosLoraConfig

    model = get_peft_model(model, MosLoraConfig(r=64, lora_alpha=128, target_modules=["q_proj", "v_proj"]))

In memory the adapter is an ordinary PEFT LoRA (``peft_type`` LORA), so that all code for LoRA works with it. On disk
its configuration has ``"peft_type": "MOSLORA"``: importing this module registers that name; stock PEFT stops with a
KeyError instead of computing B·A without the mixer.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.other import get_pattern_key

from llava_moslora.config import MIXER_INITS
from llava_moslora.errors import Refusal
from llava_moslora.flags import call_of

PEFT_TYPE = "MOSLORA"  # ``peft_type`` in adapter_config.json
# Everything that replaces B·A, changes the base weight by B·A, or adds a second factor next to it is undefined (or
# means something else) with a mixer in between. PEFT's own LoRA variants are marked in their field's metadata.
NO_MEANING = ("lora_bias", "fan_in_fan_out", "use_qalora", "loftq_config", "megatron_config", "target_parameters",
              "ensure_weight_tying")  # fmt: skip
# ``start`` → what it is. All but LoRA's and FLoRA's are made from the base weight W₀.
STARTS = {
    "lora": "A random, B = 0",
    "flora": "W = 0, A and B random, all trained (FLoRA on a linear layer: ΔW = s·B·G·A)",
    "loraxs": "B·A = the first r singular triples of W₀, frozen; W ~ N(0, 10⁻⁵) is trained (LoRA-XS)",
    "nlora": "A, W, B = rows, corner and columns of W₀, all trained (NLoRA, as its authors' code)",
    "folded": "A = W·A₀ with W as mixer_init says and A₀ random, B = 0, then a plain LoRA: no mixer is kept",
    "pissa": "s·B·A = the first r singular triples of W₀, trained; ΔW = s·(B·A − B₀·A₀), no mixer (PiSSA)",
}
# setting → the field that maps module patterns to its values
PATTERN_FIELDS = {
    "r": "rank_pattern",
    "lora_alpha": "alpha_pattern",
    "lora_dropout": "dropout_pattern",
    "mixer_init": "mixer_init_pattern",
    "train_mixer": "train_mixer_pattern",
}


@dataclass
class MosLoraConfig(LoraConfig):
    """LoRA with a mixer: ΔW = s·B·W·A with s = lora_alpha / r (paper eq. 7, in PyTorch's orientation).

    All of :class:`peft.LoraConfig` (``r``, ``lora_alpha``, ``lora_dropout``, ``target_modules``, ``modules_to_save``,
    ``use_rslora`` …) and the fields below. A pattern maps a module name or a regular expression to a value, with the
    rules of PEFT's ``rank_pattern``: it is matched against the end of the module's name, the first match wins.

    Attributes:
        module_name: in a module's copy (:meth:`for_module`), the name of the module; else "".
        full_config: in a module's copy, the configuration that it was made from; else None.

    Raises:
        Refusal: C-MIXER, C-RANK, C-ALPHA, C-DROPOUT for a value out of range, C-ADAPTER for a combination without
            meaning, C-TARGET (when the adapter is put into a model) for a target or pattern that matches no module.
    """

    # Base layer → our layer; the first match wins. Set in adapters/__init__.py, because the layers need this class.
    layer_classes: ClassVar[dict[type, type]] = {}

    mixer_init: str = field(
        default="kaiming_uniform",
        metadata={
            "help": "how W (r×r) is initialised: kaiming_uniform (paper Table 3's best, a=√5 as in its code), "
            "orthogonal, identity, normal (σ=1, as torch.nn.init.normal_), butterfly (paper eq. 6)",
            # Stock PEFT layers do not know this field: marked as a variant, they refuse it instead of ignoring it.
            "is_lora_variant": True,
        },
    )
    train_mixer: bool = field(
        default=True,
        metadata={"help": "False freezes W: identity = LoRA (nothing stored), butterfly = two-subspaces mixing"},
    )
    start: str = field(
        default="lora",
        metadata={
            "help": "init of A, B and W other than LoRA's (B = 0, W by mixer_init): "
            + "; ".join(f"{name}: {what}" for name, what in STARTS.items())
        },
    )
    dropout_pattern: dict = field(default_factory=dict, metadata={"help": "module pattern → lora_dropout"})
    mixer_init_pattern: dict = field(default_factory=dict, metadata={"help": "module pattern → mixer_init"})
    train_mixer_pattern: dict = field(default_factory=dict, metadata={"help": "module pattern → train_mixer"})

    def __post_init__(self):
        if self.peft_type == PeftType.LORA:
            # Only dataclasses.replace passes the type on. PEFT's add_weighted_adapter calls it, and would then combine
            # A and B of the adapters and leave their mixers out.
            raise Refusal(
                "C-ADAPTER",
                "an adapter with a mixer cannot be combined by add_weighted_adapter, nor copied by dataclasses.replace",
                fix="fold each adapter and combine the folded ones; copy a configuration with copy.deepcopy",
            )
        super().__post_init__()
        self._register_custom_module(self.layer_classes)
        self._refuse_combinations()
        self._check_start()
        if isinstance(self.target_modules, str):
            _check_pattern("target_modules", self.target_modules)
        for setting, pattern_field in PATTERN_FIELDS.items():
            _check_setting(setting, setting, getattr(self, setting))
            patterns = getattr(self, pattern_field)
            if not isinstance(patterns, dict):
                raise Refusal("C-TARGET", "not a table", key=pattern_field, found=patterns, expected="pattern → value")
            for pattern, value in patterns.items():
                _check_pattern(pattern_field, pattern)
                _check_setting(setting, f"{pattern_field}[{pattern!r}]", value)
        if self.mixer_init == "butterfly" and not (self.rank_pattern or self.mixer_init_pattern):
            check_even_rank("r", self.r)
        self.module_name, self.full_config = "", None
        self._declared_targets = self.target_modules
        self._adapted: list[str] = []  # the modules that got this adapter, until `check_targets` was called

    def _refuse_combinations(self) -> None:
        variants = {f.name for f in dataclasses.fields(self) if f.metadata.get("is_lora_variant")} - {"mixer_init"}
        for name in sorted(variants | set(NO_MEANING)):
            if getattr(self, name, None):
                raise Refusal(
                    "C-ADAPTER", "cannot be combined with a mixer", key=name, found=getattr(self, name),
                    fix=f"omit {name}, or use peft.LoraConfig",
                )  # fmt: skip
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise Refusal(
                "C-ADAPTER", "this init assumes ΔW = B·A without a mixer", key="init_lora_weights",
                found=self.init_lora_weights, expected="True, False or 'gaussian'",
                fix="omit init_lora_weights, or use peft.LoraConfig",
            )  # fmt: skip

    def _check_start(self) -> None:
        if self.start not in STARTS:
            raise Refusal("C-ADAPTER", "unknown start", key="start", found=self.start, expected=", ".join(STARTS))
        if self.start == "lora":
            return
        mixer_init, train_mixer = ("identity", False) if self.start == "pissa" else ("kaiming_uniform", True)
        expected = {"mixer_init": mixer_init, "train_mixer": train_mixer, "init_lora_weights": True}
        if self.start == "folded":
            expected = {"train_mixer": False, "init_lora_weights": True}
        for name, value in expected.items():
            others = getattr(self, PATTERN_FIELDS.get(name, ""), {}).values()
            if any(given != value for given in (getattr(self, name), *others)):
                raise Refusal(
                    "C-ADAPTER", f"start {self.start!r} sets it itself", key=name, found=getattr(self, name),
                    expected=value, fix="omit it",
                )  # fmt: skip

    @property
    def has_mixer(self) -> bool:
        """Whether a layer with this configuration stores a W."""
        return self.start != "folded" and stores_mixer(self.mixer_init, self.train_mixer)

    def settings_of(self, module: str) -> dict:
        """The settings of one module, patterns applied: setting → value, for each of :data:`PATTERN_FIELDS`."""
        values = {}
        for setting, pattern_field in PATTERN_FIELDS.items():
            patterns = getattr(self, pattern_field)
            values[setting] = patterns.get(get_pattern_key(patterns.keys(), module), getattr(self, setting))
        return values

    def for_module(self, module: str) -> MosLoraConfig:
        """The configuration for one layer: a copy with the settings of its module. Such a copy returns itself."""
        if self.full_config is not None:
            return self
        self._adapted.append(module)
        config = copy.copy(self)
        config.full_config, config.module_name = self, module
        for setting, value in self.settings_of(module).items():
            setattr(config, setting, value)
        return config

    def check_targets(self) -> None:
        """Called by the layers once the adapter has been added: every target and pattern must have matched a module.

        PEFT raises an error only if no target at all matched.

        Raises:
            Refusal: C-TARGET, naming what matched nothing.
        """
        adapted, self._adapted = self._adapted, []
        if not adapted:  # another layer of the same adapter has called it already
            return
        for target in sorted(self._named_targets()):
            if not any(name == target or name.endswith("." + target) for name in adapted):
                self._refuse_target("target_modules", target, adapted)
        for pattern_field in PATTERN_FIELDS.values():
            for pattern in getattr(self, pattern_field):
                if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in adapted):
                    self._refuse_target(pattern_field, pattern, adapted)

    def _named_targets(self) -> set[str]:
        """The targets as given by the user. PEFT replaces "all-linear" by names, and long lists by suffixes."""
        if isinstance(self._declared_targets, str):
            return set()
        names, now = self._declared_targets or set(), self.target_modules
        shortened = all(any(name == n or name.endswith("." + n) for name in names) for n in now)
        return names if shortened else now

    def _refuse_target(self, key: str, found: str, adapted: list[str]) -> None:
        raise Refusal(
            "C-TARGET", "matches no adapted module", key=key, found=found,
            expected=f"a name or pattern of a module such as {adapted[0]!r}", fix=f"correct it or take it out of {key}",
        )  # fmt: skip

    def to_dict(self) -> dict:
        """As stored: ``peft_type`` is MOSLORA, so that nothing loads the file as a LoRA without a mixer."""
        stored = {**super().to_dict(), "peft_type": PEFT_TYPE}
        return {k: sorted(v) if isinstance(v, set) else v for k, v in stored.items()}  # sets have no order of their own

    @classmethod
    def from_peft_type(cls, **kwargs) -> MosLoraConfig:
        """Build from stored attributes.

        Raises:
            Refusal: K-ADAPTER if the attributes are those of another kind of adapter (PEFT would return that kind).
        """
        if kwargs.get("peft_type") != PEFT_TYPE:
            raise Refusal(
                "K-ADAPTER", "not the configuration of a MoSLoRA adapter in training form", key="peft_type",
                found=kwargs.get("peft_type"), expected=PEFT_TYPE,
                fix=f"convert the folder: {call_of('convert_adapter')}",
            )  # fmt: skip
        return super().from_peft_type(**kwargs)


def config_of_layers(settings: dict[str, dict], common: dict) -> MosLoraConfig:
    """The configuration with the given settings per layer: the most frequent ones, and patterns for the others.

    Args:
        settings: layer → setting → value, as of :meth:`MosLoraConfig.settings_of`.
        common: the configuration's other fields.
    """
    common = dict(common)
    for setting, pattern_field in PATTERN_FIELDS.items():
        values = {name: own[setting] for name, own in settings.items()}
        common[setting] = Counter(values.values()).most_common(1)[0][0]
        common[pattern_field] = exact_patterns({n: value for n, value in values.items() if value != common[setting]})
    return MosLoraConfig(**common, target_modules=sorted(settings))


def exact_patterns(values: Mapping[str, Any]) -> dict[str, Any]:
    """Module name → value, as patterns that match these names only: PEFT's rule puts ``(.*\\.)?`` in front of one, with
    which a bare name would match every longer one that ends in it."""
    return {f"^{re.escape(name)}": value for name, value in values.items()}


def stores_mixer(mixer_init: str, train_mixer: bool) -> bool:
    """A frozen identity is plain LoRA: no W is stored or computed."""
    return train_mixer or mixer_init != "identity"


def check_even_rank(key: str, rank: int) -> None:
    """Refuse (C-RANK) a butterfly mixer of an odd rank."""
    if rank % 2:
        raise Refusal("C-RANK", "the butterfly mixer pairs halves of the rank", key=key, found=rank, expected="even")


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise Refusal("C-TARGET", f"not a regular expression: {error}", key=key, found=pattern) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# setting → (code and text of the refusal, expected values, check)
_RULES: dict[str, tuple[str, str, str, Callable[[Any], bool]]] = {
    "r": ("C-RANK", "the rank must be a positive integer", "1 or more",
          lambda v: _is_number(v) and isinstance(v, int) and v >= 1),
    "lora_alpha": ("C-ALPHA", "lora_alpha must be a positive number", "above 0",
                   lambda v: _is_number(v) and 0 < v < math.inf),
    "lora_dropout": ("C-DROPOUT", "the dropout must be a probability below 1", "0 ≤ p < 1",
                     lambda v: _is_number(v) and 0 <= v < 1),
    "mixer_init": ("C-MIXER", "unknown mixer init", ", ".join(sorted(MIXER_INITS)), lambda v: v in MIXER_INITS),
    "train_mixer": ("C-MIXER", "train_mixer must be true or false", "true or false", lambda v: isinstance(v, bool)),
}  # fmt: skip


def _check_setting(setting: str, key: str, value: object) -> None:
    """Refuse a value that ``setting`` cannot have; ``key`` is where it was given."""
    code, what, expected, is_good = _RULES[setting]
    fix = None
    if setting == "mixer_init" and value == "zeros":
        what = "a zero mixer over a zero B gives A, W and B zero gradients, so nothing ever trains (paper, Appendix C)"
        fix = "use kaiming_uniform or orthogonal (paper, Table 3)"
    if not is_good(value):
        raise Refusal(code, what, key=key, found=value, expected=expected, fix=fix)


# A plain dict entry: PEFT's register_peft_method needs a member of its PeftType enumeration and a tuner class, and this
# adapter must stay an ordinary LORA in memory.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = MosLoraConfig
