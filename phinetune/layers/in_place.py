"""Subclasses that an object's class can be changed to, under the name of its base."""

from importlib import import_module
from typing import Any, ClassVar

from torch import nn

from phinetune.layers import attention


class InPlace(nn.Module):
    """Goes before a class of transformers' among the bases of one of ours, which then has its name: others know a model
    by it (the `architectures` of a config, PEFT's `base_model_class`, FSDP's layers to wrap, outputs to record)."""

    made: ClassVar[dict[type[nn.Module], Any]] = {}
    """{transformers' class: ours}"""
    home: ClassVar[str]
    """The module that one of ours is written in."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base = cls.__bases__[-1]
        if len(cls.__bases__) == 2:
            cls.home = cls.__module__
            cls.__name__, cls.__qualname__, cls.__module__ = base.__name__, base.__qualname__, base.__module__
            InPlace.made[base] = cls

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (type(self).__bases__[-1], self.home), self.__dict__


def _empty(base: type[nn.Module], home: str) -> nn.Module:
    """An object of our subclass of a class, whose state is to be set: what copies and pickles begin with."""
    import_module(home)  # in a process that has just begun
    attention.register()
    subclass: type[nn.Module] = InPlace.made[base]
    return subclass.__new__(subclass)
