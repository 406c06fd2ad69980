"""Classes by name: unlearning methods, and strategies for choosing forget sets."""

from __future__ import annotations

from typing import Any, TypeVar

from engine.errors import UserError, nearest

C = TypeVar("C")
Registered = TypeVar("Registered", bound=type[Any])


class Registry(dict[str, type[C]]):
    """Classes by their attribute `name`, in the order of registration.

    Attributes:
        what: Kind of the classes, for messages.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def register(self, cls: Registered) -> Registered:
        """Add a class; usable as a decorator.

        Raises:
            ValueError: The name is taken.
        """
        if cls.name in self:
            raise ValueError(f"register: {self.what} {cls.name!r} is already {self[cls.name].__qualname__}")
        self[cls.name] = cls
        return cls

    def find(self, name: str) -> type[C]:
        """Return the class of a name.

        Raises:
            UserError: There is none; the message has the nearest name.
        """
        if name not in self:
            raise UserError(f"unknown {self.what} {name!r}{nearest(name, self)}")
        return self[name]
