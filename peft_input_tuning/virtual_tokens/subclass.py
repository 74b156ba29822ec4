"""Giving an object a subclass of its own class, here and now: nothing can go around what the subclass does.

    class Doubled(Extension):
        def forward(self, *args, **kwargs):
            return 2 * super().forward(*args, **kwargs)

    extend(module, Doubled)          # type(module).__name__ is what it was
    unextend(module)

A subclass, because hooks can be passed by: whoever calls `module.forward` gets past a hook. Nothing is kept outside of
the object, so that it can be copied, pickled, compiled and sharded as before.
"""

from __future__ import annotations

from functools import cache, update_wrapper
from types import FunctionType, MethodType
from typing import Any


class Extension:
    """What an object has more than its class. Its methods call `super()` for what the class does.

    Attributes:
        needs_forward: whether a `forward` on the instance, which goes past the class's, is an error.
    """

    needs_forward = True
    extended_class: type
    extensions: tuple[type[Extension], ...]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """`type(model)(config)` and `type(model).from_pretrained(...)` make what they would without the extension.
        Without arguments an empty object is meant, which gets its state afterwards: DataParallel's replicas."""
        extended: Any = cls.extended_class
        return extended(*args, **kwargs) if args or kwargs else extended.__new__(cls)

    def __reduce_ex__(self, protocol: Any) -> tuple:
        """Copies and pickles name the class that was extended, since the subclass cannot be found by its name."""
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # object's, since Python 3.11
        return _empty, (self.extended_class, self.extensions), state


_OWN = ("__dict__", "__weakref__")  # of each class


@cache
def _subclass(extended: Any, extensions: tuple[type[Extension], ...]) -> type:
    members = {name: getattr(extended, name) for name in ("__module__", "__qualname__", "__doc__")}
    subclass = type(extended.__name__, (*extensions, extended), members)
    subclass.extended_class, subclass.extensions = extended, extensions  # type: ignore[attr-defined]
    for name in _methods(extensions):
        if hasattr(extended, name):
            setattr(subclass, name, _with_signature(subclass, name, getattr(extended, name)))
    return subclass


def _methods(extensions: tuple[type[Extension], ...]) -> set[str]:
    parts = {part for extension in extensions for part in extension.__mro__ if issubclass(part, Extension)}
    found = {name for part in parts for name, value in vars(part).items() if isinstance(value, FunctionType)}
    return {name for name in found if not name.startswith("__")}


def _with_signature(subclass: type, name: str, method: Any) -> Any:
    """A method of the subclass with the signature of the class's, which Trainer, `generate` and torch.export read."""

    def forwarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, subclass):  # somebody has kept the bound method of an object that has its class back
            return method(self, *args, **kwargs)
        return getattr(super(subclass, self), name)(*args, **kwargs)

    return update_wrapper(forwarded, method)


def _empty(extended: Any, extensions: tuple[type[Extension], ...]) -> Any:
    return extended.__new__(_subclass(extended, extensions))


def extend(thing: Any, extension: type[Extension]) -> None:
    """Adds an extension to an object, in front of those that it has; does nothing if it has it.

    Raises:
        ValueError: a module that has a `forward` of its own, which would go past the class's.
    """
    known = getattr(type(thing), "extensions", ())
    if extension not in known:
        check_can_be_extended(thing, extension)
        _change_class(thing, _subclass(class_of(thing), (extension, *known)))


def unextend(thing: Any) -> None:
    """Gives an object its own class back; does nothing if it has no extension."""
    if isinstance(thing, Extension):
        _change_class(thing, _without_extensions(type(thing)))


def _without_extensions(kind: Any) -> Any:
    """A class without extensions; of one that somebody has made of it since (FSDP2 does), the same of what it was."""
    if "extended_class" in vars(kind):
        return kind.extended_class
    bases = tuple(_without_extensions(base) if issubclass(base, Extension) else base for base in kind.__bases__)
    return type(kind.__name__, bases, {name: value for name, value in vars(kind).items() if name not in _OWN})


def class_of(thing: Any) -> Any:
    """An object's class, without extensions."""
    return getattr(type(thing), "extended_class", type(thing))  # of its class: a wrapper may hand its attributes on


def check_can_be_extended(thing: Any, extension: type[Extension]) -> None:
    """Raises ValueError for a module with a `forward` of its own, which would go past the extension's."""
    _, forward = _forward_of_instance(thing)
    if extension.needs_forward and forward is not None and not _is_of_class(forward, thing):
        raise ValueError(
            f"`forward` of this {type(thing).__name__} was replaced by {getattr(forward, '__qualname__', forward)}, "
            "which input-tuning cannot extend. Add the adapter first, and replace `forward` afterwards."
        )


def _forward_of_instance(thing: Any) -> tuple[str, Any]:
    """Accelerate puts a `forward` on a module, which calls the one that it kept as `_old_forward` (since 0.10)."""
    name = "_old_forward" if "_old_forward" in thing.__dict__ else "forward"
    return name, thing.__dict__.get(name)


def _is_of_class(forward: Any, thing: Any) -> bool:
    return isinstance(forward, MethodType) and forward.__func__ is type(thing).forward


def _change_class(thing: Any, new: Any) -> None:
    name, forward = _forward_of_instance(thing)
    follows = forward is not None and _is_of_class(forward, thing)
    thing.__class__ = new
    if follows:
        thing.__dict__[name] = MethodType(new.forward, thing)
