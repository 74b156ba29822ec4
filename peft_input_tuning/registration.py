"""Makes PEFT know the method: a member of the enum `PeftType`, then `register_peft_method`.

PEFT has no entry point for methods that live in other packages, and `register_peft_method` wants a real member of
`PeftType`. So one is inserted into the enum, once, on import. From then on JSON, pickle, `PeftType("INPUT_TUNING")`,
`PeftConfig.from_pretrained` and `AutoPeftModel*` treat the method like one of PEFT's own.
"""

from __future__ import annotations

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import PeftType, register_peft_method


def add_peft_type(name: str) -> PeftType:
    """Returns the member `name` of `PeftType`; adds it where it is missing.

    Leans on the private tables of `enum` (`_member_map_`, `_value2member_map_`, `_member_names_`; Python >= 3.10),
    because a finished enum cannot be extended in public.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python >= 3.12 answers `value in PeftType` from this list
        PeftType._hashable_values_.append(name)
    # Python >= 3.12 looks `PeftType.NAME` up as a class attribute, and EnumType.__setattr__ refuses members.
    type.__setattr__(PeftType, name, member)
    return member


def register(name: str, config_cls: type, model_cls: type) -> PeftType:
    """Registers a method with PEFT. Calling it again (a reload of the package) replaces the classes.

    Args:
        name: the method's name in lower case, for example "input_tuning".
        config_cls: its configuration, a `peft.PeftConfig`.
        model_cls: its tuner, a `peft.tuners.tuners_utils.BaseTuner`.
    """
    peft_type = add_peft_type(name.upper())
    tables = (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
        PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
    )
    for table in tables:
        table.pop(peft_type, None)
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    return peft_type
