"""Training steps compiled by TPU's own compiler for pods that are not at hand, and their costs.

Any machine with libtpu (`pip install 'bnjax[tpu]'`) compiles TPU programs ahead of time:

    mesh = jax.make_mesh((256,), ("batch",), axis_types=(AxisType.Auto,), devices=topology_devices("v6e:16x16"))
    x = jax.ShapeDtypeStruct((32768, 224, 224, 3), jnp.bfloat16, sharding=NamedSharding(mesh, P("batch")))
    report = compile_report(jax.jit(step), state, x, y, topology="v6e:16x16")

The report holds for each chip and for the very program that the compiler made, whose text is read here:

- FLOPs are the compiler's own count (`cost_analysis`), which takes the body of a loop once, however often it runs. TPU
  multiplies float32 matrices in one bfloat16 pass by default, so that the peak of bfloat16 serves for both.
- HBM traffic is what the instructions read and write of arrays in HBM. Arrays that the compiler keeps in the chip's
  vector memory cost nothing here; the compiler's 'bytes accessed' counts these too, and counts what is staged there
  twice.
- Collectives and traffic in a loop are counted as often as it runs if the program says how often, and once if it does
  not; a branch of a conditional counts as if it were taken.
- A step takes at least as long as its FLOPs, its HBM traffic or its communication at the published peaks. Latency is
  left out: a lower bound, not a prediction.
"""

import dataclasses
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bnjax._extras import MissingExtraError
from bnjax.training import _hlo
from bnjax.training._hlo import Activation, Collective, collectives, largest_activation

_GIB = 2**30


class Chip(NamedTuple):
    """Published numbers of one chip.

    Attributes:
      flops: peak bfloat16 FLOP/s.
      hbm: bytes of HBM.
      hbm_bandwidth: bytes/s of HBM.
      ici_bandwidth: bytes/s that its links to other chips send together, half of the bidirectional bandwidth.
      axes: number of dimensions of a topology.
      pod: chips in the largest slice.
      source: where these numbers are published.
    """

    flops: float
    hbm: int
    hbm_bandwidth: float
    ici_bandwidth: float
    axes: int
    pod: int
    source: str


_DOCS = "Cloud TPU documentation, page 'TPU "
CHIPS = {
    "v4": Chip(275e12, 32 * _GIB, 1200e9, 300e9, 3, 4096, _DOCS + "v4'; links: Jouppi et al., ISCA 2023"),
    "v5e": Chip(197e12, 16 * _GIB, 819e9, 200e9, 2, 256, _DOCS + "v5e'"),
    "v5p": Chip(459e12, 95 * _GIB, 2765e9, 600e9, 3, 8960, _DOCS + "v5p'"),
    "v6e": Chip(918e12, 32 * _GIB, 1640e9, 400e9, 2, 256, _DOCS + "v6e'"),
}
"""The chips by generation. HBM is documented in GB, which the compiler takes for GiB, keeping a little for itself."""

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # ask no metadata server
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # any type will do, as the topology's name decides
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # let several processes compile at once
}


def tpu_environment() -> dict[str, str]:
    """Sets the environment variables that libtpu needs on a machine without a TPU, where they are not set already.

    libtpu reads these variables when it is loaded, with the first backend or topology, not when jax is imported. Where
    a TPU is attached, compile in a process of its own, started with JAX_PLATFORMS=cpu.

    Returns:
      The variables, as they are now.
    """
    return {name: os.environ.setdefault(name, value) for name, value in _ENVIRONMENT.items()}


def _chip_and_count(topology: str) -> tuple[Chip, int]:
    generation, _, shape = topology.partition(":")
    if generation not in CHIPS:
        raise ValueError(f"topology must begin with one of {', '.join(CHIPS)}, as 'v5e:2x4' does, got {topology!r}")
    chip = CHIPS[generation]
    if not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (chip.axes - 1), shape):
        example = f"{generation}:{'x'.join('4' * chip.axes)}"
        raise ValueError(f"a topology of {generation} has {chip.axes} axes, as {example!r} has, got {topology!r}")
    chips = math.prod(int(n) for n in shape.split("x"))
    if chips > chip.pod:
        raise ValueError(f"a slice of {generation} has at most {chip.pod} chips, but {topology!r} has {chips}")
    return chip, chips


def topology_devices(topology: str) -> list[Any]:
    """Returns devices of a TPU slice that need not exist, one for each chip, to make a mesh of and compile for.

    Args:
      topology: generation and shape, such as 'v5e:2x4', 'v6e:16x16' or 'v5p:16x16x16'.

    Returns:
      The devices; `jax.make_mesh` arranges them along their links.

    Raises:
      MissingExtraError: libtpu is not installed.
      ValueError: there is no such slice.
    """
    chips = _chip_and_count(topology)[1]
    if importlib.util.find_spec("libtpu") is None:
        raise MissingExtraError("libtpu is not installed: pip install 'bnjax[tpu]'", name="libtpu")
    from jax.experimental import topologies

    tpu_environment()
    options: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if chips == 1 else {}
    if topology.startswith("v4"):
        options["chip_config_name"] = "megacore"  # one device for both cores, as later generations have it
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"libtpu does not know the topology {topology!r}: {error}") from error


class Memory(NamedTuple):
    """The bytes of HBM that a program needs, padding included.

    Attributes:
      arguments: bytes of the program's arguments.
      outputs: bytes of its outputs.
      aliased: bytes of the outputs that take the place of donated arguments.
      temporaries: bytes that it needs beside arguments and outputs.
      code: bytes of the program itself.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """The bytes of all uses together."""
        return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """The results of compiling a step for a topology; all numbers are of one chip and one step.

    Attributes:
      name: name of the step.
      topology: generation and shape of the slice.
      seconds: time that the compiler took.
      error: why the step did not compile, such as for want of memory.
      needed: bytes of HBM that the step needs at least, according to the error.
      memory: bytes of HBM by use.
      flops: floating-point operations, with one turn of each loop.
      loops: number of loops.
      bytes_accessed: bytes accessed by the compiler's count.
      hbm_bytes: bytes read from and written to HBM.
      activation: largest activation, and the passes over arrays of its size.
      collectives: collectives in the order of the program.
    """

    name: str
    topology: str
    seconds: float
    error: str | None = None
    needed: int | None = None
    memory: Memory | None = None
    flops: float = math.nan
    loops: int = 0
    bytes_accessed: float = math.nan
    hbm_bytes: float = math.nan
    activation: Activation | None = None
    collectives: tuple[Collective, ...] = ()

    @property
    def chip(self) -> Chip:
        """The published numbers of the chip."""
        return _chip_and_count(self.topology)[0]

    @property
    def chips(self) -> int:
        """The number of chips."""
        return _chip_and_count(self.topology)[1]

    @property
    def sent(self) -> float:
        """The bytes that each chip sends, by the ring algorithms."""
        return sum(collective.times * collective.sent for collective in self.collectives)

    @property
    def intensity(self) -> float:
        """The arithmetic intensity: FLOPs for each byte of HBM traffic."""
        return self.flops / max(self.hbm_bytes, 1)

    @property
    def times(self) -> dict[str, float]:
        """The seconds that a step needs for FLOPs, HBM traffic and communication, each at its published peak."""
        return {
            "compute": self.flops / self.chip.flops,
            "HBM": self.hbm_bytes / self.chip.hbm_bandwidth,
            "interconnect": self.sent / self.chip.ici_bandwidth,
        }

    @property
    def binding(self) -> str:
        """The resource in `times` that takes longest."""
        return max(self.times, key=self.times.__getitem__)

    @property
    def bound(self) -> float:
        """The least seconds of a step: `max(FLOPs / peak, HBM bytes / HBM bandwidth, bytes sent / ICI bandwidth)`."""
        return self.times[self.binding]

    def rows(self) -> list[tuple[str, str]]:
        """Returns quantities and their values as text."""
        rows = [("topology", f"{self.topology}, {self.chips} chip{'s' * (self.chips > 1)}")]
        if self.memory is None:
            needed = f": needs {size(self.needed)} or more of {size(self.chip.hbm)} a chip" if self.needed else ""
            return [*rows, ("compiles", f"no{needed}"), ("error", (self.error or "").strip().partition("\n")[0])]
        memory, activation = self.memory, self.activation
        uses = {"arguments": memory.arguments, "temporaries": memory.temporaries, "code": memory.code}
        uses |= {"outputs not in place": memory.outputs - memory.aliased}
        loops = f" (one turn of each of {self.loops} loops)" if self.loops else ""
        rows += [
            ("compiles", f"yes, in {self.seconds:.0f} s"),
            ("memory a chip", f"{size(memory.total)} of {size(self.chip.hbm)}{_listed(uses, size)}"),
            ("FLOPs", f"{self.flops:.4g}{loops}"),
            ("HBM traffic", f"{size(self.hbm_bytes)} (compiler's bytes accessed: {size(self.bytes_accessed)})"),
        ]
        if activation:
            ratio = self.hbm_bytes / activation.bytes
            rows += [
                ("largest activation", f"{activation.shape}, {size(activation.bytes)}"),
                ("passes over it", f"{activation.passes:.2f} over arrays of its size; all HBM traffic: {ratio:.2f}"),
            ]
        ridge = self.chip.flops / self.chip.hbm_bandwidth
        times = _listed(self.times, lambda seconds: f"{1e3 * seconds:.3g} ms")
        return [
            *rows,
            ("intensity", f"{self.intensity:.1f} FLOPs a byte ({ridge:.0f} where compute begins to bind)"),
            ("step time", f"at least {1e3 * self.bound:.3g} ms, bound by {self.binding}{times}"),
        ]

    def collective_rows(self) -> tuple[list[str], list[list[str]]]:
        """Returns header and rows of a table of the collectives, with a row for each kind and group size."""
        groups: dict[tuple[str, int], list[Collective]] = {}
        for collective in self.collectives:
            groups.setdefault((collective.kind, collective.group_size), []).append(collective)
        rows = []
        for (kind, group_size), group in groups.items():
            unknown = sum(c.executions is None for c in group)
            count = f"{sum(c.times for c in group)}" + (f", {unknown} in loops of unknown length" if unknown else "")
            payload, sent = sum(c.times * c.bytes for c in group), sum(c.times * c.sent for c in group)
            rows.append([kind, str(group_size), count, size(payload), size(sent)])
        return ["collective", "chips in a group", "count", "payload of a chip", "sent by a chip"], rows

    def to_json(self) -> dict[str, Any]:
        """Returns the report as plain data, without costs where the step did not compile."""
        report = {"name": self.name, "topology": self.topology, "chips": self.chips, "chip": self.chip._asdict()}
        report |= {"seconds": self.seconds, "compiles": self.memory is not None}
        if self.memory is None:
            return report | {"error": self.error, "needed": self.needed}
        costs = ("flops", "loops", "hbm_bytes", "bytes_accessed", "sent", "intensity", "times", "bound", "binding")
        return report | {
            **{key: getattr(self, key) for key in costs},
            "memory": {**self.memory._asdict(), "total": self.memory.total},
            "activation": self.activation and self.activation._asdict(),
            "collectives": [{**c._asdict(), "sent": c.sent} for c in self.collectives],
        }


def _listed(values: dict[str, Any], text: Callable[[float], str]) -> str:
    return " (" + ", ".join(f"{name} {text(value)}" for name, value in values.items()) + ")"


def size(count: float) -> str:
    """Formats a number of bytes as text.

    >>> size(205_520_896)
    '196 MiB'
    """
    power = min(int(math.log2(max(count, 1)) // 10), 4)
    return f"{count / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def compile_report(step: Any, *args: Any, topology: str, name: str | None = None) -> CompileReport:
    """Compiles a step for a TPU slice, which need not exist, and says whether it fits and what it costs.

    Args:
      step: a function under `jax.jit` (or anything with `lower`), which may map over devices inside.
      *args: arguments of the step; `jax.ShapeDtypeStruct`s with shardings over `topology_devices(topology)` stand for
        arrays.
      topology: generation and shape of the slice.
      name: name of the step in the report; the function's name by default.

    Returns:
      The report; where the compiler gives up, such as for want of memory, the report says so.

    Raises:
      ValueError: the arguments are not distributed over all chips of the topology.
    """
    chips = _chip_and_count(topology)[1]
    name = name or str(getattr(step, "__name__", "step"))
    lowered = step.lower(*args)
    start = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return CompileReport(name, topology, time.perf_counter() - start, str(error), _needed(str(error)))
    seconds = time.perf_counter() - start
    program = _hlo.parse(compiled.as_text())
    if program.devices != chips:
        raise ValueError(
            f"{name} was compiled for {program.devices} of the {chips} chips of {topology!r}: "
            "give its arguments shardings over a mesh of topology_devices(topology)"
        )
    cost, stats = compiled.cost_analysis(), compiled.memory_analysis()
    uses = ("argument", "output", "alias", "temp", "generated_code")  # the fields of Memory
    return CompileReport(
        name,
        topology,
        seconds,
        memory=Memory(*(getattr(stats, f"{use}_size_in_bytes") for use in uses)),
        flops=cost.get("flops", 0.0),
        loops=sum(i.opcode == "while" for v in _hlo.visits(program) for i in program.computations[v.name].values()),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        hbm_bytes=sum(count for _, count in _hlo.traffic(program)),
        activation=largest_activation(program),
        collectives=tuple(collectives(program)),
    )


def _needed(error: str) -> int | None:
    """Returns the bytes of HBM that a program would need according to a compiler's error, None if it names none."""
    match = re.search(r"Used ([\d.]+)([KMGT]) of .* hbm|\(([\d.]+)([KMGT])\) exceeds available HBM", error)
    if not match:
        return None
    number, unit = filter(None, match.groups())
    return round(float(number) * 1024 ** " KMGT".index(unit))
