"""Reads a pickle as data: its opcodes are interpreted here, and call nothing but what the reader has named beforehand.

Neither pickle's own unpickler nor torch's bounds what it builds, and both look up in modules what a file names.
"""

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from core.untrusted import Untrusted, beyond, bound

MAX_BYTES = 32 << 20
MAX_OPCODES = 4_000_000  # some ten seconds
MAX_VALUES = 2_000_000
MAX_DEPTH = 100
MAX_TUPLE_KEYS = 1_000  # so many could be made to have one hash
MAX_KEY_PARTS = 64
LETTERS_IN_A_VALUE = 16
WEIGHTS = {"EMPTY_LIST": 1, "EMPTY_DICT": 1, "EMPTY_SET": 3}
CALL_WEIGHT = 3
"""In values: an instruction of one byte makes a set of 216, and a call that takes three makes a tensor of some 600."""


class Maker:
    """Stands for what a pickle may call under a name: a function that has to check its arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function


class Record:
    """An object of which only its class' name, its arguments and its state are kept."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None


def read(content: bytes, known: Mapping[str, Any], persistent: Callable[[Any], Any] | None = None) -> Any:
    """Return the value that was pickled.

    Args:
        content: the pickle; what follows its end is ignored.
        known: by dotted name, the plain values and Makers that it may name.
        persistent: makes a value of a persistent id.

    Raises:
        Untrusted: it is none, it names something else, it refers to itself, or it is more than MAX_BYTES,
            MAX_OPCODES, MAX_DEPTH levels or, where what is shared is counted as often as it is met, MAX_VALUES.
    """
    if len(content) > bound(MAX_BYTES):
        raise Untrusted(beyond("its pickle has too many bytes", MAX_BYTES))
    try:
        value = _Machine(known, persistent).run(content)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError) as error:
        raise Untrusted(f"it is no pickle ({type(error).__name__}: {error})") from error
    _measure(value)
    return value


class _Machine:
    """Those opcodes that pickles of protocol 2 to 4 of plain values and tensors are made of."""

    def __init__(self, known: Mapping[str, Any], persistent: Callable[[Any], Any] | None) -> None:
        self.known, self.persistent = known, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}
        self.tuple_keys = 0
        self.made = 0  # values that instructions and calls have made

    def run(self, content: bytes) -> Any:
        argument: Any
        most = bound(MAX_OPCODES)
        for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
            if count > most:
                raise Untrusted(beyond("its pickle has too many instructions", MAX_OPCODES))
            name = opcode.name
            if name == "STOP":
                return self.stack[-1]
            if name in _CONSTANTS:
                self.count(WEIGHTS.get(name, 0))
                self.stack.append(_CONSTANTS[name]())
            elif name in _VALUES:
                self.stack.append(argument)
            elif name in _PUTS:
                self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
            elif name in _GETS:
                self.stack.append(self.memo[argument])
            elif name == "GLOBAL":
                self.push_named(argument.replace(" ", ".", 1))
            elif name not in _IGNORED:
                if name not in _STEPS:
                    raise Untrusted(f"its pickle has an instruction {name}, which no checkpoint needs")
                getattr(self, f"op_{name.lower()}")()
        raise Untrusted("its pickle has no end")

    def op_mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def op_tuple(self) -> None:
        items = self.to_mark()
        self.stack.append(tuple(items))

    def op_tuple1(self) -> None:
        self.stack[-1:] = [(self.stack[-1],)]

    def op_tuple2(self) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def op_tuple3(self) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def op_append(self) -> None:
        item = self.stack.pop()
        self.of(list).append(item)

    def op_appends(self) -> None:
        items = self.to_mark()
        self.of(list).extend(items)

    def op_additems(self) -> None:
        items = self.to_mark()
        self.of(set).update(map(self.key, items))

    def op_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.of(dict)[self.key(key)] = value

    def op_setitems(self) -> None:
        items = self.to_mark()
        target = self.of(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[self.key(key)] = value

    def of(self, kind: type) -> Any:
        """Return what lies on top, which has to be of this kind."""
        if not isinstance(self.stack[-1], kind):
            raise Untrusted(f"its pickle fills a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}")
        return self.stack[-1]

    def key(self, value: Any) -> Any:
        """Return the keys, unless so many could share one hash that a dictionary of them would take hours."""
        check_key(value)
        if isinstance(value, tuple):
            self.tuple_keys += 1
            if self.tuple_keys > bound(MAX_TUPLE_KEYS):
                raise Untrusted(beyond("it has too many tuples as keys", MAX_TUPLE_KEYS))
        return value

    def op_stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push_named(f"{module}.{name}")

    def push_named(self, name: str) -> None:
        if name not in self.known:
            raise Untrusted(f"it names {name[:100]}, which no checkpoint needs")
        self.stack.append(self.known[name])

    def op_reduce(self) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        if not isinstance(maker, Maker) or not isinstance(arguments, tuple):
            raise Untrusted("its pickle calls what is no function")
        made = maker.function(*arguments)
        # Counted here and not only by _measure: a text of 1 MB is a few bytes where it is called upon again.
        self.count(CALL_WEIGHT + (len(made) // LETTERS_IN_A_VALUE if isinstance(made, _TEXTS) else _length(made)))
        self.stack.append(made)

    op_newobj = op_reduce

    def count(self, values: int) -> None:
        self.made += values
        if self.made > bound(MAX_VALUES):
            raise Untrusted(beyond("its pickle makes too many values", MAX_VALUES))

    def op_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif isinstance(target, OrderedDict) and isinstance(state, dict) and state.keys() <= {"_metadata"}:
            vars(target).update(state)  # of a module's state_dict: versions of its parts
        else:
            raise Untrusted(f"its pickle gives a state to a {type(target).__name__}")

    def op_binpersid(self) -> None:
        if self.persistent is None:
            raise Untrusted("its pickle refers to something outside of it")
        self.stack.append(self.persistent(self.stack.pop()))

    def op_pop(self) -> None:
        self.stack.pop()


def check_key(value: Any) -> None:
    """Refuse what should be no key of a dictionary and no member of a set: many such could be made to have one hash, as
    complex numbers, or its hash alone would take years, as that of a tuple in which each half is the same tuple again.

    Raises:
        Untrusted: it is neither a text, a number of at most 60 bits, a type, nothing, nor a tuple of these.
    """
    parts = value if isinstance(value, tuple) else (value,)
    if len(parts) > MAX_KEY_PARTS:
        raise Untrusted(f"it has a tuple of more than {MAX_KEY_PARTS} values as a key")
    for part in parts:
        if isinstance(part, int) and abs(part) >= 1 << 60:
            raise Untrusted("it has a number of more than 60 bits as a key")
        if isinstance(part, tuple | complex):
            raise Untrusted(f"it has a {type(part).__name__} {'in' if parts is value else 'as'} a key")


def _length(made: Any) -> int:
    return len(made) if isinstance(made, dict | list | tuple | set) else 0


_TEXTS = (str, bytes, bytearray)
_STEPS = {
    "MARK",
    "TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
    "APPEND",
    "APPENDS",
    "ADDITEMS",
    "SETITEM",
    "SETITEMS",
    "STACK_GLOBAL",
    "REDUCE",
    "NEWOBJ",
    "BUILD",
    "BINPERSID",
    "POP",
}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_VALUES = {
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
}
_PUTS, _GETS, _IGNORED = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"BINGET", "LONG_BINGET"}, {"PROTO", "FRAME"}


def _measure(root: Any) -> None:
    """Refuse what refers to itself, is too deep, or would be too much for whoever goes through it."""
    found: dict[int, tuple[int, int]] = {}  # by id, of containers: values in it, and levels
    inside: set[int] = set()
    pending = [(root, False)]
    while pending:
        node, leaving = pending.pop()
        if leaving:
            parts = [found.get(id(child)) or (_weight(child), 0) for child in _children(node)]
            values, depth = 1 + sum(size for size, _ in parts), 1 + max((levels for _, levels in parts), default=0)
            if values > bound(MAX_VALUES):
                raise Untrusted(beyond("it unfolds to too many values", MAX_VALUES))
            if depth > MAX_DEPTH:
                raise Untrusted(f"it is nested more than {MAX_DEPTH} levels deep")
            found[id(node)] = values, depth
            inside.discard(id(node))
        elif isinstance(node, _CONTAINERS) and id(node) not in found:
            if id(node) in inside:
                raise Untrusted("it contains itself")
            if _length(node) > bound(MAX_VALUES):  # before a list of them is made here
                raise Untrusted(beyond("it unfolds to too many values", MAX_VALUES))
            inside.add(id(node))
            pending.append((node, True))
            pending.extend((child, False) for child in _children(node))


_CONTAINERS = (dict, list, tuple, set, Record)


def _children(node: Any) -> Iterator[Any]:
    if isinstance(node, dict):
        yield from node
        yield from node.values()
        yield from vars(node).values() if isinstance(node, OrderedDict) else ()
    elif isinstance(node, Record):
        yield from (node.arguments, node.state)
    else:
        yield from node


def _weight(value: Any) -> int:
    if isinstance(value, int):
        return 1 + value.bit_length() // 64
    return 1 + len(value) // LETTERS_IN_A_VALUE if isinstance(value, str | bytes | bytearray) else 1
