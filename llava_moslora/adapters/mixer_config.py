"""The fields of :class:`~llava_moslora.adapters.config.MosLoraConfig`, their checks, and their values per module.

Apart from config.py because the layers need this class, and config.py needs the layers.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from dataclasses import dataclass, field

from peft import LoraConfig, PeftType
from peft.utils.other import get_pattern_key

from llava_moslora.adapters.settings import (
    NO_MEANING,
    PATTERN_FIELDS,
    check_even_rank,
    check_pattern,
    check_setting,
    stores_mixer,
)
from llava_moslora.errors import Refusal


@dataclass
class MixerConfig(LoraConfig):
    """All of :class:`peft.LoraConfig` and the fields of the mixer, for one model or for one module of it.

    Attributes:
        module_name: in a module's copy (:meth:`for_module`), the name of the module; else "".
        full_config: in a module's copy, the configuration that it was made from; else None.
    """

    mixer_init: str = field(
        default="kaiming_uniform",
        metadata={
            "help": "how W (r×r) starts: kaiming_uniform (a=√5, paper Table 3's best), orthogonal, identity, "
            "normal (σ=1, as torch.nn.init.normal_), butterfly (paper eq. 6)",
            # Stock PEFT layers do not know this field: marked as a variant, they refuse it instead of ignoring it.
            "is_lora_variant": True,
        },
    )
    train_mixer: bool = field(
        default=True,
        metadata={"help": "False freezes W: identity = LoRA (nothing stored), butterfly = two-subspaces mixing"},
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
        self._refuse_combinations()
        if isinstance(self.target_modules, str):
            check_pattern("target_modules", self.target_modules)
        for setting, pattern_field in PATTERN_FIELDS.items():
            check_setting(setting, setting, getattr(self, setting))
            patterns = getattr(self, pattern_field)
            if not isinstance(patterns, dict):
                raise Refusal("C-TARGET", "not a table", key=pattern_field, found=patterns, expected="pattern → value")
            for pattern, value in patterns.items():
                check_pattern(pattern_field, pattern)
                check_setting(setting, f"{pattern_field}[{pattern!r}]", value)
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
                    "C-ADAPTER",
                    "has no meaning together with a mixer",
                    key=name,
                    found=getattr(self, name),
                    fix=f"leave {name} out, or use peft.LoraConfig",
                )
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise Refusal(
                "C-ADAPTER",
                "this init assumes ΔW = B·A without a mixer",
                key="init_lora_weights",
                found=self.init_lora_weights,
                expected="True, False or 'gaussian'",
                fix="leave init_lora_weights out, or use peft.LoraConfig",
            )

    @property
    def has_mixer(self) -> bool:
        """Whether a layer with this configuration stores a W."""
        return stores_mixer(self.mixer_init, self.train_mixer)

    def settings_of(self, module: str) -> dict:
        """The settings of one module, patterns applied: setting → value, for each of :data:`PATTERN_FIELDS`."""
        values = {}
        for setting, pattern_field in PATTERN_FIELDS.items():
            patterns = getattr(self, pattern_field)
            values[setting] = patterns.get(get_pattern_key(patterns.keys(), module), getattr(self, setting))
        return values

    def for_module(self, module: str) -> MixerConfig:
        """The configuration that a layer gets: a copy with the settings of its module. Such a copy returns itself."""
        if self.full_config is not None:
            return self
        self._adapted.append(module)
        config = copy.copy(self)
        config.full_config, config.module_name = self, module
        for setting, value in self.settings_of(module).items():
            setattr(config, setting, value)
        return config

    def check_targets(self) -> None:
        """Called by the layers once the adapter is in place: every target and pattern must have matched a module.

        PEFT raises an error only where no target at all matched, and otherwise warns, or says nothing.

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
        """The targets that the user named. PEFT replaces "all-linear" by names, and long lists by suffixes of them."""
        if isinstance(self._declared_targets, str):
            return set()
        names, now = self._declared_targets or set(), self.target_modules
        shortened = all(any(name == n or name.endswith("." + n) for name in names) for n in now)
        return names if shortened else now

    def _refuse_target(self, key: str, found: str, adapted: list[str]) -> None:
        raise Refusal(
            "C-TARGET",
            "matches no adapted module",
            key=key,
            found=found,
            expected=f"a name or pattern of a module such as {adapted[0]!r}",
            fix=f"correct it or take it out of {key}",
        )
