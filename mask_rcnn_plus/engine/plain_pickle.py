"""Reads a pickle as data: containers, strings, numbers, and the few calls that a caller names.

Python's own unpickler calls whatever a pickle names, lets a few bytes claim any amount of memory,
and takes exponential time to hash a small nest of tuples. Here a name only selects one of the
caller's functions, no more is read than the file has, dictionary keys are strings and numbers, and
the number of steps is bounded.
"""

import pickle
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, ClassVar

# About 40 for each tensor: an R-CNN with its optimiser has 50 000.
_MOST_STEPS = 1_000_000


class PlainPickleError(Exception):
    """What the pickle asks for and does not get."""


class NotPlainError(PlainPickleError):
    """It names a class or function that no weights need."""


class Built(ABC):
    """What stands for an object whose state follows after it (pickle's BUILD)."""

    @abstractmethod
    def build(self, state: Any) -> None:
        """Takes the state, which may be anything that a plain pickle may hold."""


class _Callable:
    """A name that the pickle may call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


class _Steps(dict):
    """pickle's table of opcodes, which counts how often it is asked."""

    left = _MOST_STEPS

    def __getitem__(self, opcode: int) -> Callable[..., None]:
        self.left -= 1
        if self.left < 0:
            raise PlainPickleError(f"it has more than {_MOST_STEPS} steps")
        try:
            return super().__getitem__(opcode)
        except KeyError:
            raise PlainPickleError(f"it is no plain pickle (code {opcode})") from None


class _Bounded:
    """A file that refuses to read what it does not have, before any memory is set aside."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def read(self, count: int) -> bytes:
        if count > self._size - self._file.tell():
            raise PlainPickleError("it ends too soon")
        return self._file.read(count)

    def readline(self) -> bytes:
        return self._file.readline(4096)


class PlainUnpickler(pickle._Unpickler):  # type: ignore[name-defined]
    """An unpickler that runs nothing but what it is given.

    Args:
        file: at the start of the pickle.
        size: length of the whole file in bytes.
        names: from "module.name" to what stands for it: a function, or any other object as it is.
        persistent: what gives the object of a persistent id (tensors' storages).
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        names: Mapping[str, Any],
        persistent: Callable[[Any], Any] | None = None,
    ) -> None:
        # latin1 is how NumPy's arrays come out of a pickle that Python 2 wrote.
        super().__init__(_Bounded(file, size), encoding="latin1")
        self._names = names
        self._persistent = persistent
        self.dispatch = _Steps(self._opcodes)

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}".replace("numpy._core.", "numpy.core.")  # NumPy 2 renamed it
        if full not in self._names:
            raise NotPlainError(f"it names {full[:100]!r}, and may run code")
        value = self._names[full]
        return _Callable(value) if callable(value) else value

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise PlainPickleError("it refers to objects outside itself")
        return self._persistent(pid)

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        made = self.stack[-1]
        if not isinstance(made, _Callable) or not isinstance(arguments, tuple):
            raise NotPlainError("it calls what it has made, and may run code")
        self.stack[-1] = made.function(*arguments)

    def _build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Built):
            made.build(state)
        # An OrderedDict's state is what PyTorch notes about module versions; nothing reads it.
        elif not isinstance(made, dict):
            raise NotPlainError("it changes what it has made, and may run code")

    def _append(self) -> None:
        self._extend([self.stack.pop()])

    def _appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise PlainPickleError("it appends to what is no list")
        self.stack[-1].extend(items)

    def _setitem(self) -> None:
        value = self.stack.pop()
        self._update([self.stack.pop(), value])

    def _setitems(self) -> None:
        self._update(self.pop_mark())

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._update(items)

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise PlainPickleError("it sets items of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, float, bool, type(None)):
                raise PlainPickleError(f"it has a dictionary key of the type {type(key).__name__}")
            target[key] = value

    def _bytearray(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(self.read(length))

    _own: ClassVar[dict[bytes, Callable[..., None]]] = {
        pickle.REDUCE: _reduce,
        pickle.NEWOBJ: _reduce,
        pickle.BUILD: _build,
        pickle.APPEND: _append,
        pickle.APPENDS: _appends,
        pickle.SETITEM: _setitem,
        pickle.SETITEMS: _setitems,
        pickle.DICT: _dict,
        pickle.BYTEARRAY8: _bytearray,
    }
    # No sets, no NEWOBJ_EX, INST and OBJ, no extension registry, no buffers from elsewhere.
    _kept = (
        b"PROTO FRAME STOP MARK POP POP_MARK DUP GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT "
        b"MEMOIZE NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
        b"STRING BINSTRING SHORT_BINSTRING BINBYTES BINBYTES8 SHORT_BINBYTES UNICODE BINUNICODE "
        b"BINUNICODE8 SHORT_BINUNICODE TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST "
        b"EMPTY_DICT GLOBAL STACK_GLOBAL BINPERSID"
    )
    _opcodes: ClassVar[dict[int, Callable[..., None]]] = {}
    for _name in _kept.decode().split():
        _code = getattr(pickle, _name)[0]
        _opcodes[_code] = pickle._Unpickler.dispatch[_code]  # type: ignore[attr-defined]
    _opcodes.update({code[0]: function for code, function in _own.items()})
    del _name, _code
