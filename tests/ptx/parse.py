"""PTX text to entries of instructions: statements are split, names are bound to scopes, operands stay text.

Only what the interpreter needs is understood; debug sections, pragmas and performance hints are passed over.
"""

import re
from dataclasses import dataclass, field

from .report import Fault

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_SPACE = re.compile(r"\s*")
_ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{")
_LINE_DIRECTIVE = re.compile(r"\.(version|target|address_size|file|loc)\b([^\n]*)")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)")
_DECLARED = re.compile(r"\.reg\s*\.(pred|[bufs](?:8|16|32|64)|f16x2)\s+(.*)", re.DOTALL)
_REGISTERS = re.compile(r"([\w$%]+)(?:<(\d+)>)?$")
_VARIABLE = re.compile(
    r"(?P<link>(?:\.(?:visible|extern|weak|common)\s+)*)\.(?P<space>shared|global|const|local)\s+"
    r"(?:\.align\s+(?P<align>\d+)\s+)?(?:\.v(?P<vector>[24])\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$]+)\s*"
    r"(?P<dims>(?:\[\d*\]\s*)*)(?:=\s*(?P<values>.*))?$",
    re.DOTALL,
)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[^%]*?\s)?([\w$]+)\s*(?:\[(\d+)\])?\s*$")
_GUARD = re.compile(r"@(!?)\s*([\w$%]+)\s+")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_EXTENT = re.compile(r"\.(maxntid|reqntid|reqnctapercluster)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")


def type_size(name: str) -> int:
    """Bytes of a fundamental type: ``u64`` is 8, ``bf16x2`` is 4, ``pred`` is 1."""
    if name == "pred":
        return 1
    if name.endswith("x2"):
        return 2 * type_size(name[:-2])
    return SIZES[name.lstrip("abcdefghijklmnopqrstuvwxyz")]


@dataclass(frozen=True)
class Register:
    """One register of an entry; ``bits`` is 1 for a predicate."""

    index: int
    bits: int
    name: str


@dataclass(frozen=True)
class Variable:
    """A variable of a state space; ``offset`` is its place in shared memory, ``None`` for what is sized at launch."""

    name: str
    space: str
    align: int
    size: int
    values: bytes | None = None
    dynamic: bool = False
    offset: int = 0


class Scope:
    """Names of one pair of braces; an outer name is found if no inner one hides it."""

    def __init__(self, outer: "Scope | None") -> None:
        self.outer = outer
        self.names: dict[str, Register | Variable] = {}

    def find(self, name: str) -> Register | Variable | None:
        """The register or variable of that name, innermost scope first."""
        scope: Scope | None = self
        while scope is not None:
            found = scope.names.get(name)
            if found is not None:
                return found
            scope = scope.outer
        return None


@dataclass(slots=True)
class Instruction:
    """One instruction as it stands in the text; ``guard`` is (negated, predicate)."""

    pc: int
    line: int
    text: str
    parts: list[str]
    operands: list[str]
    guard: tuple[bool, str] | None
    scope: Scope

    def fault(self, what: str) -> Fault:
        """A fault at this instruction."""
        return Fault(f"{what}; PTX line {self.line}: {self.text}")

    def unsupported(self, why: str = "is not known to this interpreter") -> NotImplementedError:
        """The error for an instruction that the interpreter has no rule for."""
        return NotImplementedError(f"{'.'.join(self.parts)} {why}; PTX line {self.line}: {self.text}")


@dataclass
class Entry:
    """A kernel.

    Attributes:
        parameters: (name, type, bytes) in order; a struct by value has the type ``b8``.
        max_threads: of ``.maxntid`` or ``.reqntid``, else ``None``.
        cluster: CTAs along x that run together and reach each other's shared memory; 1: none do.
        shared_bytes: static shared memory, that of the module included if the text declares it there.
    """

    name: str
    parameters: list[tuple[str, str, int]]
    max_threads: int | None
    exact_block: tuple[int, int, int] | None = None
    cluster: int = 1
    shared_bytes: int = 0
    instructions: list[Instruction] = field(default_factory=list, repr=False)
    labels: dict[str, int] = field(default_factory=dict, repr=False)
    targets: dict[str, list[str]] = field(default_factory=dict, repr=False)
    registers: list[Register] = field(default_factory=list, repr=False)
    local_bytes: int = 0

    def declare(self, scope: Scope, name: str, bits: int) -> None:
        """A new register of this entry, known as ``name`` in ``scope``."""
        register = Register(len(self.registers), bits, name)
        self.registers.append(register)
        scope.names[name] = register


@dataclass
class Module:
    """A parsed text; ``variables`` are those of module scope that live in global or constant memory."""

    version: str = ""
    target: str = ""
    entries: dict[str, Entry] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)


class Parser:
    """One pass over a text, statement by statement."""

    def __init__(self, text: str) -> None:
        self.text = _COMMENT.sub(lambda found: re.sub(r"[^\n]", " ", found.group()), text)
        self.at = 0
        self.line = 1
        self.counted = 0
        self.module = Module()
        self.scope = Scope(None)
        self.shared_end = 0

    def line_at(self, position: int) -> int:
        """Line of a position; positions are asked for in rising order."""
        self.line += self.text.count("\n", self.counted, position)
        self.counted = position
        return self.line

    def error(self, what: str) -> SyntaxError:
        """The error for a text that is no PTX, or PTX of a form that is not understood."""
        line = self.text.count("\n", 0, self.at) + 1
        return SyntaxError(f"{what}; PTX line {line}: {self.text[self.at : self.at + 80].splitlines()[0]}")

    def statement(self) -> str:
        """The text up to the next semicolon, which is passed."""
        end = self.text.find(";", self.at)
        if end < 0:
            raise self.error("no semicolon after this")
        found = self.text[self.at : end]
        self.at = end + 1
        return found

    def skip_braces(self) -> None:
        """Pass the block that opens at or after this position."""
        depth = 0
        for brace in re.compile(r"[{}]").finditer(self.text, self.at):
            depth += 1 if brace.group() == "{" else -1
            if depth == 0:
                self.at = brace.end()
                return
        raise self.error("an open brace is never closed")

    def parse(self) -> Module:
        """The whole text."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at >= len(self.text):
                return self.module
            if entry := _ENTRY.match(self.text, self.at):
                self.parse_entry(entry)
            elif directive := _LINE_DIRECTIVE.match(self.text, self.at):
                self.at = directive.end()
                if directive.group(1) == "version":
                    self.module.version = directive.group(2).strip()
                elif directive.group(1) == "target":
                    self.module.target = directive.group(2).split(",")[0].strip()
            elif self.text.startswith(".section", self.at):
                self.skip_braces()
            elif re.compile(r"(?:\.(?:visible|extern|weak)\s+)*\.func\b").match(self.text, self.at):
                brace, semicolon = self.text.find("{", self.at), self.text.find(";", self.at)
                if 0 <= semicolon < brace or brace < 0:
                    self.at = semicolon + 1
                else:
                    self.skip_braces()
            else:
                self.parse_variable(None)

    def parse_variable(self, entry: Entry | None) -> None:
        """A declaration of shared, global, constant or local memory; what is in no known form is an error."""
        found = _VARIABLE.match(self.statement().strip())
        if found is None:
            self.at -= 1
            raise self.error("a declaration that is not understood")
        space, name = found["space"], found["name"]
        element = type_size(found["type"])
        size = element * int(found["vector"] or 1)
        align = int(found["align"] or size)
        dims = re.findall(r"\[(\d*)\]", found["dims"])
        dynamic = dims == [""] and space == "shared"
        for dim in dims:
            size *= int(dim or 0)
        values = self.initial_bytes(found["values"], element, size) if found["values"] else None
        offset = 0
        if dynamic:
            align = max(align, 16)
        elif space == "shared":
            offset = -(-self.shared_end // align) * align
            self.shared_end = offset + size
        elif space == "local":
            if entry is None:
                raise self.error("local memory outside an entry")
            offset = -(-entry.local_bytes // align) * align
            entry.local_bytes = offset + size
        variable = Variable(name, space, align, size, values, dynamic, offset)
        self.scope.names[name] = variable
        if space in ("global", "const"):
            self.module.variables.append(variable)

    def initial_bytes(self, text: str, element: int, size: int) -> bytes:
        """Bytes of an initialiser, the rest zero."""
        data = b""
        for word in re.findall(r"[\w.$+-]+", text):
            try:
                data += (immediate(word) & ((1 << 8 * element) - 1)).to_bytes(element, "little")
            except ValueError:
                raise self.error(f"the initial value {word} is not a number") from None
        return data.ljust(size, b"\0")

    def parse_entry(self, header: re.Match[str]) -> None:
        """A kernel with its body."""
        name, parameters, hints = header.groups()
        entry = Entry(name, [], None)
        for parameter in filter(str.strip, (parameters or "").split(",")):
            found = _PARAMETER.match(parameter.strip())
            if found is None:
                raise self.error(f"a parameter that is not understood: {parameter.strip()}")
            size = type_size(found[2]) * int(found[4] or 1)
            entry.parameters.append((found[3], found[2], size))
        for kind, *extents in _EXTENT.findall(hints):
            x, y, z = (int(extent or 1) for extent in extents)
            if kind == "reqnctapercluster":
                if (y, z) != (1, 1):
                    raise self.error("a cluster that extends elsewhere than along x")
                entry.cluster = x
                continue
            entry.max_threads = x * y * z
            if kind == "reqntid":
                entry.exact_block = (x, y, z)
        outside, module_end = self.scope, self.shared_end
        self.scope = Scope(outside)
        self.at = header.end()
        self.parse_body(entry)
        entry.shared_bytes = self.shared_end
        self.scope, self.shared_end = outside, module_end
        self.module.entries[name] = entry

    def parse_body(self, entry: Entry) -> None:
        """Statements up to the brace that closes the entry."""
        depth = 1
        text = self.text
        while depth:
            self.at = _SPACE.match(text, self.at).end()  # type: ignore[union-attr]
            if self.at >= len(text):
                raise self.error(f"{entry.name} is never closed")
            first = text[self.at]
            if first == "{":
                depth += 1
                self.scope = Scope(self.scope)
                self.at += 1
            elif first == "}":
                depth -= 1
                self.scope = self.scope.outer or self.scope
                self.at += 1
            elif first == ";":
                self.at += 1
            elif first == ".":
                self.parse_directive(entry)
            elif label := _LABEL.match(text, self.at):
                self.at = label.end()
                after = _SPACE.match(text, self.at).end()  # type: ignore[union-attr]
                if text.startswith(".branchtargets", after):
                    self.at = after
                    entry.targets[label[1]] = re.findall(r"[\w$]+", self.statement())[1:]
                else:
                    entry.labels[label[1]] = len(entry.instructions)
            else:
                self.parse_instruction(entry)

    def parse_directive(self, entry: Entry) -> None:
        """A directive inside an entry."""
        if directive := _LINE_DIRECTIVE.match(self.text, self.at):
            self.at = directive.end()
        elif self.text.startswith(".reg", self.at):
            declared = _DECLARED.match(self.statement())
            if declared is None:
                raise self.error("registers of a kind that is not understood, before")
            bits = 1 if declared[1] == "pred" else 8 * type_size(declared[1])
            for name in declared[2].split(","):
                found = _REGISTERS.match(name.strip())
                if found is None:
                    raise self.error(f"a register that is not understood: {name}")
                if found[2] is None:
                    entry.declare(self.scope, found[1], bits)
                else:
                    for number in range(int(found[2])):
                        entry.declare(self.scope, f"{found[1]}{number}", bits)
        elif re.compile(r"\.(pragma|param)\b").match(self.text, self.at):
            self.statement()
        else:
            self.parse_variable(entry)

    def parse_instruction(self, entry: Entry) -> None:
        """One instruction, its guard and operands as text."""
        line = self.line_at(self.at)
        text = " ".join(self.statement().split())
        body, guard = text, None
        if found := _GUARD.match(text):
            guard = (bool(found[1]), found[2])
            body = text[found.end() :]
        opcode, _, rest = body.partition(" ")
        operands = [operand.strip() for operand in _OPERAND.findall(rest)]
        entry.instructions.append(
            Instruction(len(entry.instructions), line, text, opcode.split("."), operands, guard, self.scope)
        )


def immediate(text: str) -> int:
    """Value of an integer literal, bit pattern of a float literal (``0f3F800000``, ``0d...``).

    Raises:
        ValueError: if it is neither.
    """
    sign, digits = (-1, text[1:]) if text.startswith("-") else (1, text)
    if not digits[:1].isdigit():
        raise ValueError(text)
    digits = digits.rstrip("U")
    if digits[:2] in ("0f", "0F", "0d", "0D"):
        return int(digits[2:], 16)
    if len(digits) > 1 and digits[0] == "0" and digits[1].isdigit():
        return sign * int(digits, 8)
    return sign * int(digits, 0)


def parse(text: str) -> Module:
    """The module that a PTX text describes.

    Raises:
        SyntaxError: at what is not understood, with its line.
    """
    return Parser(text).parse()
