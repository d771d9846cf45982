"""What a function is called with: stand-ins that write down what it does with them."""

from __future__ import annotations

import inspect
import reprlib
import sys
from typing import Any, NoReturn

import numpy

from pa_compiler.score import BATCH, Input, Term
from pa_compiler.score_text import text
from pa_compiler.tracing import names
from pa_compiler.tracing import operations as ops
from pa_compiler.tracing.constants import Constants
from pa_compiler.tracing.elements import element, indices_of
from pa_compiler.tracing.operations import Operand, RefusedTypeError
from pa_compiler.tracing.types import ValueType, dtype_named

_TO_INPUTS = "arrays of NumPy are given as `inputs`, tensors of torch can be closed over"


class Call:
    """One call of a function with stand-ins.

    Attributes:
        num_heads: Query heads: heads are less.
        constants: The tensors that were indexed so far.
        uses_torch: Whether a function or a tensor of torch was met.
    """

    def __init__(self, num_heads: int) -> None:
        self.num_heads = num_heads
        self.constants = Constants()
        self.uses_torch = False

    def operand(self, value: object) -> Operand:
        """A stand-in of this call as its term, and numbers of Python, NumPy and torch as Python's."""
        if isinstance(value, StandIn):
            if value._call is not self:
                raise RefusedTypeError("a value of another call of a function, which was kept")
            return value._read()
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(value, torch.Tensor):
            self.uses_torch = True
            if value.ndim:
                raise RefusedTypeError(f"a tensor of shape {tuple(value.shape)} used whole: index it, as tensor[head]")
            value = value.item()
        if isinstance(value, numpy.ndarray) and value.ndim:
            raise RefusedTypeError(f"an array of shape {value.shape} used whole: {_TO_INPUTS}")
        if isinstance(value, numpy.generic | numpy.ndarray):
            value = value.item()
        if not isinstance(value, bool | int | float):
            raise RefusedTypeError(f"{reprlib.repr(value)} of type {type(value).__name__}, which is no number")
        return value

    def apply(self, name: str, build: names.Build | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StandIn:
        """What an operation makes of stand-ins and numbers; None and words are as they are."""
        if build is None:
            raise RefusedTypeError(f"{name}, which is not one of the functions that can be compiled")
        try:
            inspect.signature(build).bind(*args, **kwargs)
        except TypeError as error:
            raise RefusedTypeError(f"{name} called so that it cannot be compiled ({error})") from None
        taken = [value if value is None or isinstance(value, str) else self.operand(value) for value in args]
        named = {
            key: value if value is None or isinstance(value, str) else self.operand(value)
            for key, value in kwargs.items()
        }
        return StandIn(self, build(*taken, **named))

    def element(self, name: str, dtype: str, shape: tuple[int | str, ...], index: object, shown: str) -> StandIn:
        """An element of an array; shown is what an error calls that."""
        indices = tuple(map(self.operand, indices_of(shape, index, shown)))
        return StandIn(self, element(name, dtype, shape, indices, shown, self.num_heads))


def _call_in(values: object) -> Call:
    """The call whose stand-in is somewhere among arguments."""
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, StandIn):
            return value._call
        waiting.extend(value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ())
    raise RefusedTypeError("a function that was called without a value of this call")


class StandIn:
    """A number that is not known yet. What is done with it is written down as a Term.

    It has Python's operators, the methods of tensors that can be compiled, and NumPy's and torch's protocols for
    functions. All else that Python asks of a number is refused.
    """

    def __init__(self, call: Call, term: Term | None) -> None:
        self._call = call
        self._term = term

    def _read(self) -> Term:
        assert self._term is not None
        return self._term

    @property
    def dtype(self) -> ValueType:
        """What a cast takes."""
        return ValueType(self._read().dtype)

    def to(self, dtype: object) -> StandIn:
        """A cast, to what dtype or another value is."""
        self._call.uses_torch = True
        return self.astype(dtype.dtype if isinstance(dtype, StandIn) else dtype)

    type = type_as = to

    def astype(self, dtype: object) -> StandIn:
        """A cast, as arrays of NumPy have it."""
        return StandIn(self._call, ops.cast(self._read(), dtype_named(dtype)))

    def new_full(self, size: object, fill_value: object, *, dtype: object = None, device: object = None) -> StandIn:
        """A number as torch makes one that has the type of another where none is named."""
        self._call.uses_torch = True
        if size != ():
            raise RefusedTypeError(f"a tensor of size {size!r} made of a value: only () is one number")
        wanted = self.dtype.name if dtype is None else dtype_named(dtype)
        return StandIn(self._call, ops.cast(self._call.operand(fill_value), wanted))

    def new_ones(self, size: object, *, dtype: object = None, device: object = None) -> StandIn:
        """The number 1, or True, as functions of torch.nn.attention.flex_attention begin with."""
        return self.new_full(size, 1, dtype=dtype)

    def new_zeros(self, size: object, *, dtype: object = None, device: object = None) -> StandIn:
        """The number 0, or False."""
        return self.new_full(size, 0, dtype=dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "device":
            return getattr(sys.modules.get("torch"), "device", str)("cpu")
        if name in _CASTS:
            return lambda: self.to(_CASTS[name])
        if name in names.METHODS:
            self._call.uses_torch |= name not in names.NUMPY_METHODS
            return lambda *args, **kwargs: self._call.apply(f".{name}()", names.METHODS[name], (self, *args), kwargs)
        raise RefusedTypeError(f".{name} of a value, which is not known when a function is compiled")

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> StandIn:
        if method != "__call__":
            raise RefusedTypeError(f"numpy.{ufunc.__name__}.{method}")
        return self._call.apply(f"numpy.{ufunc.__name__}", names.NUMPY.get(ufunc.__name__), inputs, kwargs)

    def __array_function__(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StandIn:
        return self._call.apply(f"numpy.{func.__name__}", names.NUMPY.get(func.__name__), args, kwargs)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> StandIn:
        call = _call_in((args, kwargs))
        call.uses_torch = True
        name = func.__name__
        if name == "__getitem__":
            tensor, index = args
            constant = call.constants.add(tensor)
            return call.element(constant.name, constant.dtype, constant.shape, index, "an index into a tensor")
        plain = name[2:-2] if name.startswith("__") and name.endswith("__") else name
        return call.apply(f"torch.{plain}", names.TORCH.get(plain), args, kwargs or {})

    def __repr__(self) -> str:
        return f"<{text(self._term)}>" if self._term is not None else "<an array>"

    def __getitem__(self, index: object) -> StandIn:
        raise RefusedTypeError("an index into a value, which is one number")

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RefusedTypeError(f"a value made into an array or used as an index into one: {_TO_INPUTS}")

    def __bool__(self) -> NoReturn:
        raise RefusedTypeError(
            "a value asked whether it is true, by if, and, or, not, in, min(), max() or a chain as 0 <= x < 5: "
            "it is known at run time alone; where(), &, | and ~ do that, as (0 <= x) & (x < 5)"
        )


class ArrayStandIn(StandIn):
    """The stand-in of one of `inputs`: indexed with brackets it gives an element."""

    def __init__(self, call: Call, array: Input) -> None:
        super().__init__(call, None)
        self._array = array

    def _read(self) -> Term:
        if self._array.shape:
            raise RefusedTypeError(f"input {self._array.name} used whole: index it with brackets, all axes at once")
        return self[()]._read()

    def __getitem__(self, index: object) -> StandIn:
        name, dtype, shape = self._array
        return self._call.element(name, dtype, shape, index, f"an index into input {name}")

    @property
    def dtype(self) -> ValueType:
        """Of its elements, as they are to a function."""
        return ValueType(self._array.dtype if self._array.dtype in ("int32", "bool") else "float32")

    @property
    def shape(self) -> tuple[int, ...]:
        """As it was declared, where it has no BATCH."""
        if BATCH in self._array.shape:
            raise RefusedTypeError(
                f"the shape of input {self._array.name}, whose sequences are known at run time alone"
            )
        return tuple(int(extent) for extent in self._array.shape)

    @property
    def ndim(self) -> int:
        """Its axes."""
        return len(self._array.shape)

    def __len__(self) -> int:
        if not self._array.shape:
            raise RefusedTypeError(f"len() of input {self._array.name}, which is one number")
        return self.shape[0]


_CASTS = {"float": "float32", "double": "float64", "int": "int32", "long": "int64", "bool": "bool"}


def _operator(name: str) -> Any:
    def method(self: StandIn, *others: object) -> StandIn:
        return self._call.apply(f"__{name}__", names.PYTHON[name], (self, *others), {})

    return method


def _refused(what: str) -> Any:
    def method(self: StandIn, *args: object) -> NoReturn:
        raise RefusedTypeError(what)

    return method


for _name in names.PYTHON:
    setattr(StandIn, f"__{_name}__", _operator(_name))

_ASKED = "a value made into a {} of Python: it is known at run time alone"
for _name, _what in {
    "float": _ASKED.format("float") + "; .to(torch.float32) and .astype(numpy.float32) make a float32, and functions "
    "of numpy or torch are for values where those of math are not",
    "int": _ASKED.format("int") + "; .to(torch.int32) and .astype(numpy.int32) make an int32",
    "complex": _ASKED.format("complex number"),
    "index": "a value where Python needs a whole number, as an index or in range(): it is known at run time alone; "
    f"{_TO_INPUTS}",
    "len": "len() of a value, which is one number",
    "iter": "a value taken apart or gone through, which is one number",
    "hash": "a value as the key of a dict or in a set: it is known at run time alone",
    "round": "round() of a value: numpy.rint or torch.round",
    "floor": "math.floor of a value: numpy.floor or torch.floor",
    "ceil": "math.ceil of a value: numpy.ceil or torch.ceil",
    "trunc": "math.trunc of a value: numpy.trunc or torch.trunc",
    "divmod": "divmod() of a value: // and %",
    "matmul": "@ of a value, which is one number",
    "setitem": "a value written to",
    "contains": "a value looked into, which is one number",
}.items():
    setattr(StandIn, f"__{_name}__", _refused(_what))
