"""An unpickler that imports nothing and calls functions of ours alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, ClassVar


class Known:
    """A function of ours in the place of one that a pickle names."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class Inert:
    """What stands in the place of an object that a pickle builds."""

    def set_state(self, state: Any) -> None:
        """Takes the state that the pickle gives the object.

        Raises:
            Exception: it is not what such an object has.
        """
        raise NotImplementedError


class InertUnpickler(pickle._Unpickler):
    """The unpickler of Python's library that is written in Python: its memory grows with what it reads alone.

    It has `find_class` to be overridden, which gives a `Known`, or a value, for each name that may be in the pickle. It
    calls those alone, and the keys that it hashes are texts and numbers.
    """

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        raise NotImplementedError

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1])(*arguments)

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1])(*arguments)

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Inert):
            raise pickle.UnpicklingError(f"sets the state of a {type(target).__name__}")
        target.set_state(state)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({hashable(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][hashable(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][hashable(key)] = value

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(map(hashable, items))

    dispatch |= {
        pickle.REDUCE[0]: load_reduce,
        pickle.NEWOBJ[0]: load_newobj,
        pickle.BUILD[0]: load_build,
        pickle.DICT[0]: load_dict,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.ADDITEMS[0]: load_additems,
    }
    for _operation in (pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.FROZENSET):
        del dispatch[_operation[0]]  # other ways to call and to hash


def _called(callee: Any) -> Known:
    if not isinstance(callee, Known):
        raise pickle.UnpicklingError(f"calls a {type(callee).__name__}")
    return callee


def hashable(value: Any) -> Any:
    """The value, if it is one that a key or a member of a set can be.

    Raises:
        pickle.UnpicklingError: it is another, as a tuple of tuples, which can take for ever to hash.
    """
    if not isinstance(value, str | int | float | None):
        raise pickle.UnpicklingError(f"has a {type(value).__name__} for a key")
    return value
