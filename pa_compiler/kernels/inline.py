"""inline: T.inline, which lets a stage's body be written once and used in several PrimFuncs, without its slow search.

Each use of a T.inline has to find the parser that it is used in. TVM's own search has inspect.getouterframes describe
every frame of the stack, source lines included, before it looks at one: a sixth of the time that parsing takes, and
more, the deeper the stack of whoever compiles.
"""

import sys
from collections.abc import Callable
from types import FrameType

from tvm.script.parser.core.entry import scan_macro
from tvm.script.parser.core.parser import Parser
from tvm.script.parser.core.utils import inspect_function_capture
from tvm.tirx.script.parser.entry import TIRInline


class _Inline(TIRInline):
    def _find_parser_def(self) -> Parser:
        """The innermost parser on the stack, which names itself in the globals of the code that it evaluates."""
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            parser = frame.f_globals.get(self.parser_object_name)
            if parser is not None:
                return parser
            frame = frame.f_back
        raise RuntimeError(f"{self.func.__qualname__}: used outside of a T.prim_func")


def inline(body: Callable[..., None]) -> Callable[..., None]:
    """As T.inline: body, TVMScript, becomes part of each T.prim_func that calls it."""
    expansion = _Inline(*scan_macro(body, inspect_function_capture(body)), body)

    def expand(*args: object, **kwargs: object) -> None:
        expansion(*args, **kwargs)

    return expand
