"""Emitted CUDA C as C++ for the emulator: inline asm becomes calls of ptx.h, shared memory is asked for by name."""

from __future__ import annotations

import dataclasses
import re

REGISTERS = {"pred": "bool", "b16": "uint16_t", "u16": "uint16_t", "b32": "uint32_t", "u32": "uint32_t"} | {
    "s32": "int32_t",
    "f32": "float",
    "b64": "uint64_t",
    "u64": "uint64_t",
}
"""C++'s type of a register that is declared in an asm statement."""

ASM = re.compile(r"\b(?:asm|__asm__)\s*(?:volatile|__volatile__)?\s*\(")
KERNEL = re.compile(
    r'extern "C" __global__ void\s*(?:__launch_bounds__\((?P<threads>\d+)[^)]*\))?\s*(?P<name>\w+)\((?P<of>[^)]*)\)\s*{'
)
SHARED = re.compile(
    r"(?P<dynamic>extern\s+)?__shared__\s+(?:(?:__align__|alignas)\(\d+\)\s+)?"
    r"(?P<type>[\w ]+?)\s+(?P<name>\w+)\s*(?:\[(?P<size>[^\]]*)\])?;"
)
STRING = re.compile(r'\s*"((?:[^"\\]|\\.)*)"')
CUDA_INCLUDE = re.compile(r"^\s*#include <(?!cstdint|type_traits).*$", re.MULTILINE)


class UnknownTextError(Exception):
    """The text has a form that is not understood: the emulator has to learn it."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: "float", is_pointer, "out_ptr"."""

    type: str
    is_pointer: bool
    name: str


@dataclasses.dataclass(frozen=True)
class Signature:
    """A kernel's name, its parameters, and the threads a block may have (None: not said)."""

    name: str
    parameters: tuple[Parameter, ...]
    max_threads: int | None


def signatures(source: str) -> list[Signature]:
    """The kernels that a text defines."""
    return [_signature(match) for match in KERNEL.finditer(source)]


def to_cpp(source: str) -> str:
    """C++ that compiles with device.h. Each kernel gets a function NAME_entry(void** values) that calls it."""
    text = SHARED.sub(_shared_array, CUDA_INCLUDE.sub("", source))
    text = _replace_asm(text)
    entries = [_entry(signature) for signature in signatures(source)]
    return "\n".join(['#include "device.h"', "#line 1", text, *entries])


def _signature(match: re.Match) -> Signature:
    parameters = [_parameter(text) for text in match["of"].split(",") if text.strip()]
    return Signature(match["name"], tuple(parameters), int(match["threads"]) if match["threads"] else None)


def _parameter(text: str) -> Parameter:
    words = re.findall(r"\w+|\*", re.sub(r"\b(__restrict__|const|volatile|__grid_constant__)\b", "", text))
    return Parameter(" ".join(word for word in words[:-1] if word != "*"), "*" in words, words[-1])


def _entry(signature: Signature) -> str:
    types = [f"{parameter.type}{'*' * parameter.is_pointer}" for parameter in signature.parameters]
    values = ", ".join(f"*static_cast<{type_}*>(values[{i}])" for i, type_ in enumerate(types))
    return (
        f'extern "C" __attribute__((no_sanitize("thread", "alignment"))) '
        f"void {signature.name}_entry(void** values) {{ {signature.name}({values}); }}"
    )


def _shared_array(match: re.Match) -> str:
    type_, name = match["type"], match["name"]
    if match["dynamic"]:
        return f"{type_}* {name} = static_cast<{type_}*>(emulator::dynamic_shared());"
    of = type_ if match["size"] is None else f"{type_}[{match['size']}]"
    return f'auto& {name} = shared_variable<{of}>("{name} at {match.start()}");'


def _replace_asm(text: str) -> str:
    parts, end = [], 0
    for match in ASM.finditer(text):
        if match.start() < end:
            continue
        parts.append(text[end : match.start()])
        end = _closing(text, match.end())
        parts.append(_statement(text[match.end() : end - 1]))
    return "".join([*parts, text[end:]])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that was opened before start is closed: the position after it."""
    depth, position = 1, start
    while depth:
        string = STRING.match(text, position)
        if string:
            position = string.end()
            continue
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        position += 1
    return position


def _statement(body: str) -> str:
    """An asm statement, from its template to its clobbers, as a C++ block."""
    template, position = "", 0
    while string := STRING.match(body, position):
        template += re.sub(r"\\[nt]", " ", string[1])
        position = string.end()
    operands = _operands(body[position:])
    template = template.strip()
    if template.startswith("{"):
        template = template[1:-1]
    instructions = [text.strip() for text in template.split(";") if text.strip()]
    return "{ " + " ".join(_instruction(text, operands) for text in instructions) + " }"


def _operands(text: str) -> list[str]:
    """The C++ expressions of outputs and inputs: what stands in parentheses after each constraint."""
    expressions, position = [], 0
    while constraint := re.compile(r'[\s:,]*"[^"]*"\s*\(').match(text, position):
        position = _closing(text, constraint.end())
        expressions.append(text[constraint.end() - 1 : position])
    if not re.fullmatch(r'[\s:]*("memory"|"cc"|,|\s)*', text[position:]):
        raise UnknownTextError(f"operands of an asm statement: {text[position:]!r}")
    return expressions


def _instruction(text: str, operands: list[str]) -> str:
    declaration = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.+)", text)
    if declaration and declaration[1] in REGISTERS:
        names = (name.strip().lstrip("%") for name in declaration[2].split(","))
        return " ".join(f"{REGISTERS[declaration[1]]} {name}_{{}};" for name in names)
    match = re.fullmatch(r"(?:@(?P<negated>!?)%*(?P<guard>\w+)\s+)?(?P<name>[a-z][\w.:]*)(?P<operands>.*)", text)
    if not match:
        raise UnknownTextError(f"an instruction: {text!r}")
    guard = f"if ({match['negated']}{match['guard']}_) " if match["guard"] else ""
    values = [_value(value.strip(), operands) for value in re.sub("[{}]", "", match["operands"]).split(",")]
    return f"{guard}ptx::{_function(match['name'])}({', '.join(filter(None, values))});"


def _function(instruction: str) -> str:
    """An instruction's function in ptx.h: without what it says to the caches, which changes no value."""
    name = re.sub(r"\.L[12]::\w+", "", instruction).replace("::cta", "")
    return re.sub(r"[.:]+", "_", name)


def _value(text: str, operands: list[str]) -> str:
    """An operand of an instruction in C++: %0, [%0], [%0+16], a register declared before, or a number."""
    if match := re.fullmatch(r"\[\s*([^+\]]+?)\s*(?:\+\s*(-?\d+)\s*)?\]", text):
        address = _value(match[1], operands)
        return f"static_cast<char*>(ptx::address({address})) + {match[2]}" if match[2] else address
    if re.fullmatch(r"%\d+", text):
        return operands[int(text[1:])]
    if re.fullmatch(r"-?(\d+|0x[0-9a-fA-F]+)", text) or not text:
        return text
    if re.fullmatch(r"%*[A-Za-z_]\w*", text):
        return f"{text.lstrip('%')}_"
    raise UnknownTextError(f"an operand: {text!r}")
