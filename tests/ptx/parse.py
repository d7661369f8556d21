"""PTX text to instructions: an entry function, its parameters, registers and labels.

Grammar: PTX ISA, "Syntax", "Instruction Operands" and "State Spaces, Types, and Variables".
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

from .faults import Fault, UnknownInstruction
from .values import KINDS, width


@dataclass(frozen=True)
class Register:
    name: str
    width: int  # bits; 1 is a predicate


@dataclass(frozen=True)
class Special:
    """%tid.x and its like."""

    name: str


@dataclass(frozen=True)
class Immediate:
    bits: int  # of a float, its pattern; an integer may be negative


@dataclass(frozen=True)
class Symbol:
    """A label, a parameter or the array in shared memory."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Symbol
    offset: int


@dataclass(frozen=True)
class Vector:
    """{a, b}, or a|b, the two results of `setp` and `shfl`."""

    items: tuple[Operand, ...]


Operand = Register | Special | Immediate | Symbol | Address | Vector


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    kinds: tuple[str, ...] = field(init=False)  # the types the opcode ends in
    flags: tuple[str, ...] = field(init=False)  # every part of the opcode but its types

    def __post_init__(self) -> None:
        parts = self.opcode.split(".")
        count = next((n for n, part in enumerate(reversed(parts)) if part not in KINDS), len(parts))
        cut = len(parts) - count
        object.__setattr__(self, "flags", tuple(parts[:cut]))
        object.__setattr__(self, "kinds", tuple(parts[cut:]))

    @property
    def kind(self) -> str:
        return self.kinds[-1]

    def __str__(self) -> str:
        return f"line {self.line}: `{self.text}`"


@dataclass(frozen=True)
class Program:
    name: str
    parameters: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


_ENTRY = re.compile(r"\.entry\s+(?P<name>[\w$]+)\s*\((?P<parameters>[^)]*)\)[^{]*\{")
_LABEL = re.compile(r"([\w$]+):(?!:)")
_GUARD = re.compile(r"@(!?)([%\w]+)\s+")
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?")
_FLOAT = re.compile(r"0([fFdD])([0-9a-fA-F]+)")
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]")
_SPECIAL = re.compile(r"%(n?tid|n?ctaid)\.[xyz]|%laneid")


def parse(text: str, entry_name: str | None = None) -> Program:
    """An entry function of a PTX module, by name, or the only one."""
    # Blanks instead of nothing, so that lines keep their numbers.
    text = re.sub(r"/\*.*?\*/", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.S)
    text = re.sub(r"//.*|^[ \t]*\.(loc|file)\b.*", "", text, flags=re.M)
    entries = [e for e in _ENTRY.finditer(text) if entry_name in (None, e["name"])]
    if len(entries) != 1:
        of_name = f" of the name {entry_name}" if entry_name else ""
        raise Fault(f"expected one entry function{of_name} in the PTX, got {len(entries)}")
    entry = entries[0]
    # A struct is an array of bytes: `.param .align 8 .b8 name[128]`.
    parts = [part.partition("[")[0] for part in entry["parameters"].split(",") if part.strip()]
    parameters = [part.split()[-1] for part in parts]
    body = _Body(text, entry.end())
    return Program(entry["name"], tuple(parameters), tuple(body.instructions), body.labels)


class _Body:
    """Reads statements up to the function's closing brace."""

    def __init__(self, text: str, position: int) -> None:
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        # Innermost last: the name a register has in the text -> the one it has here, and its width.
        self._scopes: list[dict[str, Register]] = [{}]
        self._scopes_seen = 1
        self._text, self._position = text, position
        self._line, self._counted = 1, 0  # of the last statement, and where it began
        while self._scopes:
            self._statement()

    def _statement(self) -> None:
        text = self._text
        while text[self._position].isspace():
            self._position += 1
        if text[self._position] == "{":
            self._scopes.append({})
            self._scopes_seen += 1
            self._position += 1
        elif text[self._position] == "}":
            self._scopes.pop()
            self._position += 1
        elif label := _LABEL.match(text, self._position):
            self.labels[label[1]] = len(self.instructions)
            self._position = label.end()
        else:
            end = text.index(";", self._position)
            statement = " ".join(text[self._position : end].split())
            self._line += text.count("\n", self._counted, self._position)
            line, self._counted = self._line, self._position
            self._position = end + 1
            if statement.startswith(".reg "):
                self._declare(statement)
            elif statement and not statement.startswith(".pragma"):
                self.instructions.append(self._instruction(statement, line))

    def _declare(self, statement: str) -> None:
        _, kind, names = statement.split(maxsplit=2)
        bits = width(kind[1:])
        scope = "" if len(self._scopes) == 1 else f"@{self._scopes_seen}"
        for name in names.replace(" ", "").split(","):
            stem, _, count = name.partition("<")
            numbered = range(int(count[:-1])) if count else ("",)
            for number in numbered:
                self._scopes[-1][f"{stem}{number}"] = Register(f"{stem}{number}{scope}", bits)

    def _instruction(self, statement: str, line: int) -> Instruction:
        if statement.startswith("."):
            raise UnknownInstruction(f"line {line}: the directive `{statement}` is not known")
        guard = _GUARD.match(statement)
        opcode, _, rest = statement[guard.end() if guard else 0 :].partition(" ")
        register = self._register(guard[2]) if guard else None
        try:
            operands = tuple(self._operand(part) for part in _split(rest))
        except ValueError as error:
            raise UnknownInstruction(f"line {line}: `{statement}`: {error}") from None
        negated = guard is not None and guard[1] == "!"
        return Instruction(line, statement, opcode, operands, register, negated)

    def _register(self, name: str) -> Register | None:
        return next((scope[name] for scope in reversed(self._scopes) if name in scope), None)

    def _operand(self, text: str) -> Operand:
        register = self._register(text)
        if register is not None:
            return register
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if "|" in text:
            return Vector(tuple(self._operand(part.strip()) for part in text.split("|")))
        if _NUMBER.fullmatch(text):
            return Immediate(int(text.removesuffix("U"), 0))
        if pattern := _FLOAT.fullmatch(text):
            return Immediate(int(pattern[2], 16))
        if address := _ADDRESS.fullmatch(text):
            base = self._register(address[1]) or Symbol(address[1])
            return Address(base, int(address[2] or "0", 0))
        if _SPECIAL.fullmatch(text):
            return Special(text)
        if re.fullmatch(r"-?\d+\.\d+", text):
            return Immediate(struct.unpack("<q", struct.pack("<d", float(text)))[0])
        if re.fullmatch(r"[\w$]+", text):
            return Symbol(text)
        raise ValueError(f"the operand `{text}` is not known")


def _split(text: str) -> list[str]:
    """At the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]
