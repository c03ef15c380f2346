"""Pickles of strangers, read as data: nothing named in one is imported, called or built.

A pickle is a program for a small machine, and Python's own machine calls whatever it names. This one keeps names as
names: what `torch._utils._rebuild_tensor_v2` is asked to build becomes a `TensorRef`, what an `OrderedDict` would have
been is a dict, and any other object of a module that writes checkpoints (Megatron's arguments, DeepSpeed's loss
scaler) is a `Record` of its name, arguments and state. A name outside these lists is refused.

It is built on the pure-Python machine of the standard library: the one in C lets a ten-byte file allocate 64 GiB (an
index of the memo is the size of a table) and runs out of stack in hashing nested tuples. It reads about 100,000
tensors' worth of metadata in some seconds.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from megatron_ext.checkpoint.convert.tensors import Shape
from megatron_ext.config.errors import CheckpointError

STORAGES = {"Float": "F32", "Double": "F64", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
            "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "Untyped": ""}
"""`torch.<key>Storage` -> dtype of its numbers as safetensors names it; an untyped one leaves that to the tensor."""
DTYPES = {"float32": "F32", "float": "F32", "float64": "F64", "double": "F64", "float16": "F16", "half": "F16",
          "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int64": "I64", "long": "I64",
          "int32": "I32", "int": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
         "U8": 1, "BOOL": 1}
"""Bytes of a number, of every dtype that a `TensorRef` may have."""
_MODULES = ("argparse", "deepspeed", "megatron", "megatron_ext", "numpy", "torch.distributed.checkpoint",
            "torchtitan", "transformer_engine", "transformers", "apex", "enum", "signal", "pathlib")
"""Modules whose objects are kept as records."""
_PLAIN = (str, int, float, bytes, bool, type(None))


class Name(str):
    """`module.attribute`, where the pickle has what that names."""


class Record:
    """An object as its pickle describes it.

    Attributes:
        name: `module.Class`.
        args: what it would have been called with.
        state: what it would have been given after that; usually a dict of its attributes.
    """

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]):
        self.name, self.args, self.state = name, args, None  # type: tuple[str, tuple[Any, ...], Any]

    def get(self, key: str, default: Any = None) -> Any:
        """An attribute."""
        return self.state.get(key, default) if isinstance(self.state, dict) else default

    def __repr__(self) -> str:
        return f"Record({self.name})"


class Storage(NamedTuple):
    """A storage by what the pickle says: dtype ("" for untyped), key of its bytes, numbers in it."""

    dtype: str
    key: str
    numel: int


class TensorRef(NamedTuple):
    """A tensor in a file.

    Attributes:
        file: relative to the folder.
        offset: of its first number, in bytes from the start of the file.
        dtype: a key of `SIZES`.
        shape, stride: as in torch, in numbers.
    """

    file: str
    offset: int
    dtype: str
    shape: Shape
    stride: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * SIZES[self.dtype]

    @property
    def dense(self) -> bool:
        """Whether its numbers lie row-major side by side."""
        due = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != due:
                return self.numel == 0
            due *= size
        return True


class PickleError(Exception):
    """What is wrong with a pickle."""


Tensor = Callable[[Storage, int, Shape, Shape, str], TensorRef]
"""Makes a tensor of a storage, an offset in numbers, shape, strides and dtype."""


def load(content: bytes, where: Path, tensor: Tensor | None = None) -> Any:
    """The objects of a pickle.

    Args:
        content: the pickle.
        where: for messages.
        tensor: makes tensors; None if there can be none.

    Raises:
        CheckpointError: it is damaged, or names what is not on the lists.
    """
    try:
        return _Machine(content, tensor).load()
    except PickleError as error:
        raise CheckpointError(where, str(error)) from None
    except Exception as error:  # the machine runs a stranger's program: all that can happen is its fault
        said = f"{type(error).__name__}: {error}"[:120].encode("unicode_escape").decode()
        raise CheckpointError(where, f"is no pickle that can be read ({said})") from None


_Standard: Any = pickle._Unpickler


class _Machine(_Standard):
    """The standard machine, with every instruction that calls or changes an object replaced."""

    def __init__(self, content: bytes, tensor: Tensor | None):
        super().__init__(io.BytesIO(content))
        self._tensor = tensor

    dispatch: ClassVar[dict[int, Any]] = {code: instruction for code, instruction in _Standard.dispatch.items()
                                          if code not in b"io\x82\x83\x84\x96\x97\x98"}
    """Without INST, OBJ, EXT1/2/4, BYTEARRAY8 (allocates what it is told to) and buffers: torch writes none of them."""

    # -- names and calls

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if full in _CALLS or full in _VALUES or any(module == known or module.startswith(known + ".")
                                                    for known in _MODULES):
            return Name(full)
        if module in ("torch", "torch.storage") and name.removesuffix("Storage") in STORAGES:
            return Name(full)
        raise PickleError(f"names {full[:100]!a}, which no checkpoint needs")

    def persistent_load(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], Name) \
                or not isinstance(pid[2], str) or type(pid[4]) is not int or pid[4] < 0:
            raise PickleError("refers to something that is no storage")
        kind = pid[1].rpartition(".")[2].removesuffix("Storage")
        if kind not in STORAGES:
            raise PickleError(f"has a storage of type {pid[1][:80]!a}")
        return Storage(STORAGES[kind], pid[2], pid[4])

    def call(self, function: Any, args: Any) -> Any:
        """What the pickle gets for calling something."""
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise PickleError("calls something that is no function")
        if function in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
            return self._rebuild(args, typed=function.endswith("v3"))
        handler = _CALLS.get(function)
        return Record(str(function), args) if handler is None else handler(*args)

    def _rebuild(self, args: tuple[Any, ...], typed: bool) -> TensorRef:
        storage, offset, shape, stride = args[:4]
        dtype = args[6] if typed else storage.dtype
        numbers = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride) <= 16 and \
            all(type(n) is int and 0 <= n < 1 << 48 for n in (offset, *shape, *stride))
        if not isinstance(storage, Storage) or not numbers or dtype not in SIZES or self._tensor is None:
            raise PickleError("has a tensor that makes no sense")
        return self._tensor(storage, offset, shape, stride, dtype)

    def load_reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_newobj(self) -> None:
        self.load_reduce()

    dispatch[pickle.NEWOBJ[0]] = load_newobj

    def load_newobj_ex(self) -> None:
        if self.stack.pop():
            raise PickleError("makes an object by keywords")
        self.load_reduce()

    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict | TensorRef):  # attributes of a state dict (`_metadata`) are of no use
            raise PickleError(f"changes a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build

    # -- what is hashed must be flat

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _target(self.stack[-1], dict)[_key(key)] = value

    dispatch[pickle.SETITEM[0]] = load_setitem

    def load_setitems(self) -> None:
        items = self.pop_mark()
        target = _target(self.stack[-1], dict)
        for i in range(0, len(items), 2):
            target[_key(items[i])] = items[i + 1]

    dispatch[pickle.SETITEMS[0]] = load_setitems

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({_key(items[i]): items[i + 1] for i in range(0, len(items), 2)})

    dispatch[pickle.DICT[0]] = load_dict

    def load_additems(self) -> None:
        items = self.pop_mark()
        _target(self.stack[-1], set).update(_key(item) for item in items)

    dispatch[pickle.ADDITEMS[0]] = load_additems

    def load_frozenset(self) -> None:
        self.append(frozenset(_key(item) for item in self.pop_mark()))

    dispatch[pickle.FROZENSET[0]] = load_frozenset

    def load_append(self) -> None:
        value = self.stack.pop()
        _target(self.stack[-1], list).append(value)

    dispatch[pickle.APPEND[0]] = load_append

    def load_appends(self) -> None:
        items = self.pop_mark()
        _target(self.stack[-1], list).extend(items)

    dispatch[pickle.APPENDS[0]] = load_appends


def _target(found: Any, kind: type) -> Any:
    if not isinstance(found, kind):
        raise PickleError(f"fills a {type(found).__name__} as if it were a {kind.__name__}")
    return found


def _key(key: Any) -> Any:
    """A key of a dict, if hashing it goes no deeper than one tuple."""
    flat = key if type(key) is tuple else (key,)
    if not all(isinstance(part, (*_PLAIN, Record)) for part in flat):
        raise PickleError(f"has a {type(key).__name__} as the key of a dict")
    return key


def _pairs(*args: Any) -> dict[Any, Any]:
    pairs = args[-1] if args and not isinstance(args[-1], Name) else ()
    if isinstance(pairs, dict):
        return dict(pairs)
    return {_key(key): value for key, value in pairs}


def _ints(values: Any = ()) -> Shape:
    if not isinstance(values, tuple | list) or not all(type(value) is int for value in values):
        raise PickleError("has a torch.Size that is no tuple of sizes")
    return tuple(values)


def _device(kind: Any, index: Any = None) -> str:
    """Never longer than its arguments together would be: what calls give can be given to calls again."""
    if not isinstance(kind, str) or len(kind) > 32 or not (index is None or type(index) is int):
        raise PickleError("has a device that is none")
    return kind if index is None else f"{kind}:{index & 0xFFFF}"


def _named(name: Any) -> str:
    if not isinstance(name, str):
        raise PickleError("has a layout that is none")
    return name


def _attribute(owner: Any, name: Any) -> Record:
    """Members of enumerations are pickled by name since Python 3.12."""
    if not isinstance(owner, Name) or not owner.startswith(_MODULES) or not isinstance(name, str):
        raise PickleError("calls getattr")
    return Record(str(owner), (name,))


def _encoded(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise PickleError("calls encode")
    return text.encode("latin1")


def _items(*args: Any) -> set[Any]:
    return {_key(item) for item in (args[0] if args else ())}


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _pairs, "collections.defaultdict": _pairs, "collections.Counter": _pairs,
    "builtins.dict": _pairs, "__builtin__.dict": _pairs,
    "torch.Size": _ints, "torch.device": _device,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
    "torch._utils._rebuild_tensor_v2": _pairs, "torch._utils._rebuild_tensor_v3": _pairs,  # see `_Machine.call`
    "torch.serialization._get_layout": _named,
    "builtins.set": _items, "__builtin__.set": _items, "builtins.frozenset": _items,
    "builtins.bytearray": lambda *args: b"", "builtins.getattr": _attribute, "__builtin__.getattr": _attribute,
    "_codecs.encode": _encoded,
    "builtins.complex": lambda *args: Record("builtins.complex", args),
    "builtins.slice": lambda *args: Record("builtins.slice", args),
}
_VALUES = frozenset(("builtins.int", "builtins.float", "builtins.list", "builtins.str", "builtins.bool",
                     "torch.strided", "torch.contiguous_format", "torch.nn.functional.gelu",
                     "torch.nn.functional.silu", "torch._C._nn.gelu", "torch.nn.init.xavier_uniform_"))
"""Names that checkpoints hold as values (what an argument was set to) and never call."""
