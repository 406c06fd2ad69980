"""Classes by their names: methods, and strategies of forget sets."""

from __future__ import annotations

from typing import Any, TypeVar

from engine.errors import UserError, nearest

C = TypeVar("C")
Registered = TypeVar("Registered", bound=type[Any])


class Registry(dict[str, type[C]]):
    """Classes by their attribute `name`, in the order of registration. what: what they are, for messages."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def register(self, cls: Registered) -> Registered:
        """Adds a class; a name that is taken is an error."""
        if cls.name in self:
            raise ValueError(f"register: {self.what} {cls.name!r} is already {self[cls.name].__qualname__}")
        self[cls.name] = cls
        return cls

    def find(self, name: str) -> type[C]:
        """The class of a name. Raises UserError, with the nearest name, where there is none."""
        if name not in self:
            raise UserError(f"unknown {self.what} {name!r}{nearest(name, self)}")
        return self[name]
