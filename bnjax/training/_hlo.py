"""The text of compiled programs, read for the collectives that they run and the arrays that they move through HBM."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple


class Shape(NamedTuple):
    """An array in a compiled program.

    Attributes:
      dtype: HLO's name, such as 'bf16'.
      dims: sizes of the axes.
      hbm: whether it is in the device's main memory rather than in a memory on the chip.
    """

    dtype: str
    dims: tuple[int, ...]
    hbm: bool

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """The bytes of the elements, without padding."""
        bits = re.search(r"\d+", self.dtype)
        return math.ceil(self.size * (int(bits[0]) if bits else 8 if self.dtype == "pred" else 0) / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """An instruction `name = outputs opcode(literal), attributes`, where the literal names the operands."""

    name: str
    outputs: tuple[Shape, ...]
    opcode: str
    literal: str
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, role: str) -> list[str]:
        """Returns the names of the computations that the instruction calls in a role, such as 'body'."""
        match = re.search(rf"\b{role}=\{{?((?:%[\w.\-]+(?:, )?)+)", self.attributes)
        return re.findall(r"%([\w.\-]+)", match[1]) if match else []


Computation = dict[str, Instruction]


class Program(NamedTuple):
    """A compiled program.

    Attributes:
      computations: computations by name, each a dict of its instructions by name.
      entry: name of the computation where it begins.
      devices: number of devices that run it.
    """

    computations: dict[str, Computation]
    entry: str
    devices: int


_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")  # bf16[8,128]{1,0:T(8,128)(2,1)S(1)}
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)")


def _shape(dtype: str, dims: str, layout: str) -> Shape:
    sizes = tuple(int(size.strip("<=")) for size in dims.split(",") if size)
    return Shape(dtype, sizes, not re.search(r"S\([1-9]", layout))  # memory space 0 is HBM


def _closing(text: str) -> int:
    """Returns the index just after the parenthesis that closes the one at which the text begins."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    return len(text)


def parse(hlo: str) -> Program:
    """Parses the text that `as_text()` of a compiled function returns."""
    computations, entry, current = {}, "", {}
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations[match[2]] = {}
            entry = match[2] if match[1] else entry
        elif match := _INSTRUCTION.match(line):
            root, name, rest = match.groups()
            end = _closing(rest) if rest.startswith("(") else rest.find(" ")
            outputs = tuple(_shape(*match) for match in _SHAPE.findall(rest[:end]))
            opcode, _, rest = rest[end:].strip().partition("(")
            end = _closing("(" + rest) - 1
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
            current[name] = Instruction(name, outputs, opcode, rest[: end - 1], operands, rest[end:], bool(root))
    header = hlo.partition("\n")[0]
    devices = math.prod(int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header))
    return Program(computations, entry, devices)


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.root)


def _source(computation: Computation, name: str) -> Instruction:
    """Returns the instruction of a name, or the one that it is a copy of."""
    instruction = computation[name]
    while instruction.opcode in ("copy", "bitcast"):
        instruction = computation[instruction.operands[0]]
    return instruction


def _constant(computation: Computation, name: str) -> int | None:
    """Returns the value of an instruction that is a whole constant, None for any other."""
    source = _source(computation, name)
    whole = source.opcode == "constant" and re.fullmatch(r"-?\d+", source.literal)
    return int(source.literal) if whole else None


def _trip_count(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often a loop runs, if the program says so or it counts up from one constant to another, else None."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = (program.computations[loop.called(role)[0]] for role in ("condition", "body"))
    start, test, end = computation[loop.operands[0]], _root(condition), _root(body)
    counts_up = test.opcode == "compare" and "direction=LT" in test.attributes
    if not counts_up or not start.opcode == end.opcode == "tuple":
        return None
    counter = re.search(r"index=(\d+)", condition[test.operands[0]].attributes)
    if not counter:
        return None
    first, stop = _constant(computation, start.operands[int(counter[1])]), _constant(condition, test.operands[1])
    advance = _source(body, end.operands[int(counter[1])])
    steps = [step for name in advance.operands if (step := _constant(body, name))]
    if first is None or stop is None or advance.opcode != "add" or not steps:
        return None
    return max(math.ceil((stop - first) / steps[0]), 0)


class Visit(NamedTuple):
    """A computation that runs.

    Attributes:
      name: name of the computation.
      times: how often it runs; a loop of unknown length is taken to run once.
      known: whether no loop of unknown length is around it.
      fused: whether it is the inside of an instruction.
    """

    name: str
    times: int
    known: bool
    fused: bool


_CALLED = {
    "while": ("condition", "body"),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "call": ("to_apply",),
    "fusion": ("calls",),
    "async-start": ("calls",),
}


def visits(program: Program, visit: Visit | None = None) -> Iterator[Visit]:
    """Yields every computation that runs, beginning with the entry."""
    visit = visit or Visit(program.entry, 1, True, False)
    yield visit
    computation = program.computations[visit.name]
    for instruction in computation.values():
        trips = _trip_count(program, computation, instruction) if instruction.opcode == "while" else 1
        times, known = visit.times * (1 if trips is None else trips), visit.known and trips is not None
        for role in _CALLED.get(instruction.opcode, ()):
            for name in instruction.called(role):
                yield from visits(program, Visit(name, times, known, visit.fused or instruction.opcode == "fusion"))


_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}


class Collective(NamedTuple):
    """A collective operation of a compiled program.

    Attributes:
      kind: HLO's name of the operation, such as 'all-reduce'.
      operands: types of what each device puts in, such as 'f32[256]'.
      bytes: bytes of all operands together.
      group_size: number of devices that exchange; the number of pairs of a 'collective-permute'.
      executions: number of executions in one run of the program; None in a loop of unknown length.
      computation: name of the computation that holds it: the entry, the body of a loop, a branch, or a fusion.
    """

    kind: str
    operands: tuple[str, ...]
    bytes: int
    group_size: int
    executions: int | None
    computation: str

    @property
    def times(self) -> int:
        """The number of executions, taken to be one where it is unknown."""
        return 1 if self.executions is None else self.executions

    @property
    def sent(self) -> float:
        """The bytes that each device sends in one execution, by the ring algorithms.

        With `b` operand bytes in groups of `n`: all-reduce `2(n − 1)/n · b`; reduce-scatter and all-to-all
        `(n − 1)/n · b`; all-gather `(n − 1) · b`, which is `(n − 1)/n` of its output; permute and broadcast `b`.
        """
        return _SENT[self.kind](self.group_size) * self.bytes


def _group_size(attributes: str, devices: int) -> int:
    """Returns the number of devices in each group, from any of HLO's notations."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        return pairs[1].count("{")
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):  # {{0,1},{2,3}}
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):  # [2,4]<=[8]: 2 groups of 4
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\].*?\{(.*?)\}", attributes):  # mesh['a'=2,'b'=4] {'b'}
        sizes = dict(re.findall(r"('[^']*')=(\d+)", mesh[1]))
        axes = re.findall(r"('[^']*'|\w+)(?::\(\d+\)(\d+))?", mesh[2])  # 'b':(2)2 is a part of an axis
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices


def collectives(hlo: str | Program) -> list[Collective]:
    """Lists the collectives of all computations of a compiled program that run, each once.

    A collective that is started and finished apart, or that runs in pieces beside other work, counts as one.

    Args:
      hlo: the program, or what `as_text()` of the compiled function returns, for TPU or any other platform.

    Returns:
      The collectives.
    """
    program = parse(hlo) if isinstance(hlo, str) else hlo
    operations, chains = [], set()
    for visit in visits(program):
        computation = program.computations[visit.name]
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in _SENT:
                continue
            if chain := re.search(r'chain_id="\d+"', instruction.attributes):  # shared by the pieces
                if chain[0] in chains:
                    continue
                chains.add(chain[0])
            shapes = [shape for name in instruction.operands for shape in computation[name].outputs]
            types, total = tuple(map(str, shapes)), sum(shape.bytes for shape in shapes)
            group_size = _group_size(instruction.attributes, program.devices)
            executions = visit.times if visit.known else None
            operations.append(Collective(kind, types, total, group_size, executions, visit.name))
    return operations


_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"while", "conditional", "call", "async-start", "async-update", "async-done", "opt-barrier"}
_SLICES = {"slice", "dynamic-slice", "gather", "slice-start", "dynamic-slice-start"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that is written into the first, in place


def _read(user: Instruction, operand: str, shape: Shape) -> int:
    """Returns the bytes of an operand that an instruction reads."""
    first = user.operands[0] == operand
    if user.opcode == "tuple" or (first and user.opcode in _UPDATES):
        return 0
    if re.search("chain_id=|AsyncCollective", user.attributes):
        return 0  # this is a piece of a collective, of which what it writes in the end is counted
    if first and user.opcode in _SLICES:
        return user.outputs[user.opcode.endswith("-start")].bytes
    return shape.bytes


def _written(computation: Computation, name: str, shape: Shape) -> int:
    """Returns the bytes that an instruction writes of an output of a shape."""
    instruction = computation[name]
    while instruction.opcode == "bitcast":
        instruction = computation[instruction.operands[0]]
    if instruction.opcode == "parameter" or re.search("chain_id=|AsyncCollectiveStart", instruction.attributes):
        return 0
    if instruction.opcode in _UPDATES:
        return computation[instruction.operands[_UPDATES[instruction.opcode]]].outputs[0].bytes
    return shape.bytes


def traffic(program: Program) -> Iterator[tuple[Shape, int]]:
    """Yields the arrays in HBM that instructions read and write, each with the bytes moved over all executions.

    A fusion is one instruction: it reads its operands (only the slices where it slices them) and writes its outputs
    (only the update where it changes them in place). Starting an asynchronous operation reads, finishing it writes.
    """
    for visit in visits(program):
        if visit.fused:
            continue
        computation = program.computations[visit.name]
        for instruction in computation.values():
            if instruction.opcode in _FREE or re.search('"(AllocateBuffer|ConcatBitcast)"', instruction.attributes):
                continue
            inside, users, root, names = computation, [instruction], instruction, instruction.operands
            if instruction.opcode == "fusion":
                inside = program.computations[instruction.called("calls")[0]]
                users, root = list(inside.values()), _root(inside)
                parameters = {user.literal: user.name for user in users if user.opcode == "parameter"}
                names = [parameters[str(i)] for i in range(len(names))]
            if not instruction.opcode.endswith("-done"):
                for operand, name in zip(instruction.operands, names, strict=True):
                    for shape in filter(lambda shape: shape.hbm, computation[operand].outputs):
                        read = sum(_read(user, name, shape) for user in users if name in user.operands)
                        yield shape, visit.times * min(read, shape.bytes)
            if not instruction.opcode.endswith("-start"):
                results = root.operands if root.opcode == "tuple" else (root.name,)
                results = [name for name in results for _ in inside[name].outputs]
                for shape, name in zip(instruction.outputs, results, strict=True):
                    if shape.hbm:
                        yield shape, visit.times * _written(inside, name, shape)


class Activation(NamedTuple):
    """The largest array that a program reads or writes in HBM, other than weights.

    Arrays of the shape of an argument that every device holds whole count as weights; a single device has none.

    Attributes:
      shape: dtype and shape on one chip, such as 'bf16[128,112,112,64]'.
      bytes: bytes of one such array.
      passes: how many times over the program reads or writes arrays of as many elements.
    """

    shape: str
    bytes: int
    passes: float


def largest_activation(hlo: str | Program) -> Activation | None:
    """Finds the largest array other than weights that a program reads or writes in HBM, and the passes over it.

    A pass is one reading or writing of all elements. Passes are the sum, over arrays of as many elements and of any
    dtype, of the bytes that `traffic` gives over the array's own size. Half of an array read is half a pass.

    Args:
      hlo: the program, or what `as_text()` of the compiled function returns, for TPU or any other platform.

    Returns:
      The array and the passes; None where there is no such array.
    """
    program = parse(hlo) if isinstance(hlo, str) else hlo
    entry = program.computations[program.entry].values() if program.devices > 1 else ()
    replicated = [i for i in entry if i.opcode == "parameter" and "sharding={replicated}" in i.attributes]
    weights = {shape.dims for argument in replicated for shape in argument.outputs}
    moved = list(traffic(program))
    largest = max((s for s, _ in moved if s.dims not in weights and s.bytes), key=lambda s: s.bytes, default=None)
    if largest is None:
        return None
    passes = sum(count / shape.bytes for shape, count in moved if shape.size == largest.size)
    return Activation(str(largest), largest.bytes, passes)
