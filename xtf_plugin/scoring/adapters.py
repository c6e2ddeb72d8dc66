"""Which PEFT adapters leave the base model as it was, so that the model with its adapters off is the base model.

Known ones are named and the unknown is refused: an adapter may change base weights, and nothing would show it. Imports
neither torch nor PEFT, so that `xtf check` can read it.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..errors import XTFUserError

# Types of adapters that leave the base weights unchanged, as TestAdapters in tests/scoring/test_engine.py shows.
ADAPTERS = frozenset(
    "ADALORA ADAPTION_PROMPT BEFT BOFT C3A CARTRIDGE CPT DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LILY "
    "LN_TUNING LOHA LOKR LORA MISS MULTITASK_PROMPT_TUNING OFT OSF PEANUT POLY PREFIX_TUNING PROMPT_TUNING PSOFT PVERA "
    "P_TUNING RANDLORA ROAD SHADOW SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT".split()
)
ADAPTER_INITS: dict[str, tuple[Any, ...]] = {
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "layer_replication": (None,),  # rebuilds the stack of layers, and turning the adapter off does not undo it
    "init_weights": (
        *(True, False, None),
        *("gaussian", "kaiming_uniform", "xavier_uniform", "lycoris", "bat", "mini", "zero"),
    ),
}
# Options of LoRA that PEFT marks as variants, and that leave the base weights unchanged. Others do not: KaSA cuts the
# smallest singular values off.
VARIANTS = frozenset(("use_dora", "alora_invocation_tokens", "monteclora_config", "velora_config", "use_bdlora"))


def check_adapter(adapter: Any) -> None:
    """Refuse a PEFT config whose type, initialisation or variant is not known to leave the base weights unchanged."""
    kind = str(getattr(adapter.peft_type, "value", adapter.peft_type))
    found: list[tuple[str, Any, tuple[Any, ...]]] = [("peft_type", kind, tuple(sorted(ADAPTERS)))]
    found += [(name, getattr(adapter, name), legal) for name, legal in ADAPTER_INITS.items() if hasattr(adapter, name)]
    for option in fields(adapter):
        if option.metadata.get("is_lora_variant") and option.name not in VARIANTS:
            found.append((option.name, getattr(adapter, option.name) or None, (None,)))
    for name, value, legal in found:
        if value not in legal:
            raise XTFUserError(
                f"xtf: an adapter with {name}={value!r} may change the base model: the model with its adapter off is "
                f"then not the base model. Legal: {', '.join(map(str, legal))}. Use one of them, or name the base "
                "model under xtf `reference.model`."
            )
