"""Reading compiled programs, the report made of them, and, where libtpu is installed, what TPU's compiler makes."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding

import bnjax
from bnjax.studies.engine import steps
from bnjax.training import _hlo
from bnjax.training.ahead_of_time import (
    Collective,
    CompileReport,
    Memory,
    collectives,
    compile_report,
    largest_activation,
    size,
    topology_devices,
    tpu_environment,
)

P = jax.P
ROOT = Path(__file__).parents[1]
LIBTPU = importlib.util.find_spec("libtpu") is not None


def tpu_compiler(test):
    """Marks a test that runs TPU's compiler: only with `pytest -m tpu_compiler`."""
    needs = pytest.mark.skipif(not LIBTPU, reason="libtpu is not installed (pip install 'bnjax[tpu]')")
    return pytest.mark.tpu_compiler(needs(test))


def mesh_of(devices, shape, names):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


def compiled_text(f, in_spec, out_spec):
    """Of a function of a float32 [64, 32] array that is mapped over a 2×4 mesh of CPU devices."""
    mesh = mesh_of(jax.devices(), (2, 4), ("a", "b"))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, in_spec))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False)
    return jax.jit(mapped).lower(x).compile().as_text()


SHARDED = P(("a", "b"))
RING = [(i, (i + 1) % 4) for i in range(4)]


# Each device holds 8 × 32 float32, 1024 bytes, or 4096 where the input is sharded over 'a' alone.
@pytest.mark.parametrize(
    ("f", "in_spec", "out_spec", "kind", "payload", "group_size", "sent"),
    [
        (lambda x: lax.psum(x, ("a", "b")), SHARDED, P(), "all-reduce", 1024, 8, 2 * 7 / 8 * 1024),
        (lambda x: lax.psum(x, "b"), SHARDED, P("a"), "all-reduce", 1024, 4, 2 * 3 / 4 * 1024),
        (lambda x: lax.psum(x, "a"), SHARDED, P("b"), "all-reduce", 1024, 2, 1024),
        (lambda x: lax.all_gather(x, "b", tiled=True), SHARDED, P("a"), "all-gather", 1024, 4, 3 / 4 * 4096),
        (lambda x: lax.psum_scatter(x, "b", tiled=True), P("a"), SHARDED, "reduce-scatter", 4096, 4, 3 / 4 * 4096),
        (lambda x: lax.all_to_all(x, "b", 1, 1, tiled=True), SHARDED, SHARDED, "all-to-all", 1024, 4, 3 / 4 * 1024),
        (lambda x: lax.ppermute(x, "b", RING), SHARDED, SHARDED, "collective-permute", 1024, 8, 1024),
    ],
)
def test_collectives_of_every_kind(f, in_spec, out_spec, kind, payload, group_size, sent):
    (found,) = collectives(compiled_text(f, in_spec, out_spec))
    assert (found.kind, found.bytes, found.group_size, found.executions) == (kind, payload, group_size, 1)
    assert found.sent == sent
    assert sum(np.prod(eval(types[3:])) for types in found.operands) * 4 == payload  # 'f32[8,32]'


def test_collectives_in_loops_and_branches():
    def turn(x, _=None):
        return lax.psum(x, "a") * 0.1, None

    (found,) = collectives(compiled_text(lambda x: lax.scan(turn, x, length=7)[0], SHARDED, SHARDED))
    assert (found.executions, found.times, found.group_size) == (7, 7, 2)
    loop = compiled_text(lambda x: lax.while_loop(lambda x: x.sum() < 1, lambda x: turn(x)[0], x), SHARDED, SHARDED)
    (found,) = collectives(loop)
    assert (found.executions, found.times) == (None, 1)
    nested = compiled_text(
        lambda x: lax.scan(lambda x, _: lax.scan(turn, x, length=3), x, length=5)[0], SHARDED, SHARDED
    )
    assert collectives(nested)[0].executions == 15
    branch = compiled_text(
        lambda x: lax.cond(lax.axis_index("b") > 1, lambda x: turn(x)[0], lambda x: x, x), SHARDED, SHARDED
    )
    (found,) = collectives(branch)
    assert found.executions == 1
    assert found.computation != _hlo.parse(branch).entry


def test_collectives_of_automatic_partitioning():
    mesh = mesh_of(jax.devices(), (2, 4), ("a", "b"))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, P("a", "b")))
    found = collectives(jax.jit(lambda x: x - x.mean(0, keepdims=True)).lower(x).compile().as_text())
    assert [(c.kind, c.operands, c.group_size) for c in found] == [("all-reduce", ("f32[8]",), 2)]


# As TPU's compiler writes it: tuples, layouts with tiles and memory spaces, and every notation for groups.
TPU = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[64]{0:T(128)})->f32[64]{0:T(128)}}, \
num_partitions=256

FileNames
1 "step.py"

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%x, %y)
}

%piece (p.0: f32[512]) -> f32[2048] {
  %p.0 = f32[512]{0:T(512)S(1)} parameter(0)
  ROOT %gather.1 = f32[2048]{0:T(512)} all-gather(%p.0), channel_id=8, replica_groups=[64,4]<=[4,64]T(1,0), \
dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
}

%other_piece (p.1: f32[512]) -> f32[2048] {
  %p.1 = f32[512]{0:T(512)S(1)} parameter(0)
  ROOT %gather.2 = f32[2048]{0:T(512)} all-gather(%p.1), channel_id=8, replica_groups=[64,4]<=[4,64]T(1,0), \
dimensions={0}, use_global_device_ids=true, frontend_attributes={chain_id="0"}
}

%body (state: (s32[], f32[64])) -> (s32[], f32[64]) {
  %two = s32[]{:T(128)} constant(2)
  %state = (s32[]{:T(128)}, f32[64]{0:T(128)S(1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %i.copy = s32[]{:T(128)S(6)} copy(%i)
  %next = s32[]{:T(128)} add(%i.copy, %two)
  %v = f32[64]{0:T(128)S(1)} get-tuple-element(%state), index=1
  %reduced.1 = f32[64]{0:T(128)S(1)} all-reduce(%v), channel_id=3, \
replica_groups=mesh['axis_0'=32,'axis_1'=8] {'axis_0':(2)4,'axis_1'}, use_global_device_ids=true, to_apply=%add
  ROOT %state.1 = (s32[]{:T(128)}, f32[64]{0:T(128)S(1)}) tuple(%next, %reduced.1)
}

%condition (state.2: (s32[], f32[64])) -> pred[] {
  %state.2 = (s32[]{:T(128)}, f32[64]{0:T(128)S(1)}) parameter(0)
  %i.2 = s32[]{:T(128)} get-tuple-element(%state.2), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %more = pred[]{:T(512)} compare(%i.2, %five), direction=LT
}

ENTRY %main (w: f32[64], k: bf16[3,3,64,64], g: f32[512]) -> f32[64] {
  %w = f32[64]{0:T(128)} parameter(0), sharding={replicated}
  %k = bf16[3,3,64,64]{3,2,1,0:T(8,128)(2,1)} parameter(1), sharding={replicated}
  %g = f32[512]{0:T(512)} parameter(2), sharding={devices=[256]<=[256]}
  %both = (f32[64]{0:T(128)S(1)}, /*index=1*/bf16[3,3,64,64]{3,2,1,0:T(8,128)(2,1)}) all-reduce(%w, /*index=1*/%k), \
channel_id=2, replica_groups=mesh['axis_0'=64,'axis_1'=4] {'axis_0'}, use_global_device_ids=true, to_apply=%add, \
metadata={op_name="jit(step)/all-reduce(x)"}
  %w.1 = f32[64]{0:T(128)S(1)} get-tuple-element(%both), index=0
  %zero = s32[]{:T(128)} constant(0)
  %begin = s32[]{:T(128)} copy(%zero)
  %state.3 = (s32[]{:T(128)}, f32[64]{0:T(128)S(1)}) tuple(%begin, %w.1)
  %loop = (s32[]{:T(128)}, f32[64]{0:T(128)S(1)}) while(%state.3), condition=%condition, body=%body
  %reduced = f32[64]{0:T(128)S(1)} get-tuple-element(%loop), index=1
  %g.1 = f32[512]{0:T(512)S(1)} copy(%g)
  %started = f32[2048]{0:T(512)} fusion(%g.1), kind=kCustom, calls=%piece
  %done = f32[2048]{0:T(512)} fusion(%g.1), kind=kCustom, calls=%other_piece
  %moving = (f32[64]{0:T(128)S(1)}, f32[64]{0:T(128)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%reduced), channel_id=4, source_target_pairs={{0,1},{1,2},{2,0}}
  %moved = f32[64]{0:T(128)} collective-permute-done(%moving)
  ROOT %last = f32[64]{0:T(128)} all-reduce(%moved), replica_groups={}, to_apply=%add
}
"""


def test_collectives_of_a_tpu_program():
    found = collectives(TPU)
    assert found == [
        Collective("all-reduce", ("f32[64]", "bf16[3,3,64,64]"), 256 + 73728, 64, 1, "main"),
        Collective("collective-permute", ("f32[64]",), 256, 3, 1, "main"),  # started and finished
        Collective("all-reduce", ("f32[64]",), 256, 256, 1, "main"),
        Collective("all-reduce", ("f32[64]",), 256, 4 * 8, 3, "body"),  # i = 0, 2, 4
        Collective("all-gather", ("f32[512]",), 2048, 4, 1, "piece"),  # in two pieces
    ]
    assert found[-1].sent == 3 * 2048


# x and y have 1 MiB.
TRAFFIC = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%slices (p0: f32[8,32768], p1: f32[8,32768]) -> (f32[8,32768], bf16[8,32768]) {
  %p0 = f32[8,32768]{1,0} parameter(0)
  %p1 = f32[8,32768]{1,0} parameter(1)
  %s = f32[1,32768]{1,0} slice(%p0), slice={[0:1], [0:32768]}
  %z = s32[] constant(0)
  %u = f32[8,32768]{1,0} dynamic-update-slice(%p1, %s, %z, %z)
  %b = f32[8,32768]{1,0} broadcast(%s), dimensions={0,1}
  %c = bf16[8,32768]{1,0} convert(%b)
  ROOT %t = (f32[8,32768]{1,0}, bf16[8,32768]{1,0}) tuple(%u, %c)
}

ENTRY %main (w: f32[16,32768], x: f32[8,32768]) -> f32[8,32768] {
  %w = f32[16,32768]{1,0} parameter(0), sharding={replicated}
  %x = f32[8,32768]{1,0} parameter(1), sharding={devices=[8,1]<=[8]}
  %w.2 = f32[16,32768]{1,0} negate(%w)
  %start = (f32[8,32768]{1,0:S(1)}, f32[8,32768]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %staged = f32[8,32768]{1,0:S(1)} copy-done(%start)
  %half = ((f32[8,32768]{1,0}), f32[4,32768]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%x), slice={[0:4], [0:32768]}
  %half.1 = f32[4,32768]{1,0:S(1)} slice-done(%half)
  %y = f32[8,32768]{1,0} negate(%staged)
  %view = f32[262144]{0} bitcast(%y)
  %f = (f32[8,32768]{1,0}, bf16[8,32768]{1,0}) fusion(%x, %y), kind=kLoop, calls=%slices
  ROOT %f.0 = f32[8,32768]{1,0} get-tuple-element(%f), index=0
}
"""


def test_traffic_and_passes():
    mib = 2**20
    moved = list(_hlo.traffic(_hlo.parse(TRAFFIC)))
    by_shape = {}
    for shape, count in moved:
        by_shape[str(shape)] = by_shape.get(str(shape), 0) + count
    # x: staged in full (1), half of it (1/2), a slice of it (1/8); y: written (1), updated in place (1/8).
    assert by_shape == {"f32[16,32768]": 4 * mib, "f32[8,32768]": 2.75 * mib, "bf16[8,32768]": mib / 2}
    activation = largest_activation(TRAFFIC)  # not w, which all devices hold alike
    assert activation == ("f32[8,32768]", mib, 2.75 + 1)  # the bfloat16 array has as many elements
    assert largest_activation(TRAFFIC.replace("num_partitions=8", "num_partitions=1")).shape == "f32[16,32768]"


@pytest.mark.parametrize(
    ("dtype", "dims", "expected"),
    [
        ("bf16", (3, 5), 30),
        ("pred", (7,), 7),
        ("s4", (3,), 2),
        ("f8e4m3fn", (2, 2), 4),
        ("c128", (), 16),
        ("token", (), 0),
    ],
)
def test_bytes_of_shapes(dtype, dims, expected):
    assert _hlo.Shape(dtype, dims, True).bytes == expected


def report(**changes):
    memory = Memory(arguments=3 * 2**30, outputs=2**30, aliased=2**29, temporaries=2**30, code=0)
    gather = Collective("all-gather", ("f32[8]",), 32, 8, None, "body")
    reduce = Collective("all-reduce", ("f32[1000000]",), 4_000_000, 8, 10, "main")
    costs = {"flops": 197e9, "hbm_bytes": 8.19e8, "bytes_accessed": 1e9, "collectives": (gather, reduce)}
    return CompileReport("step", "v5e:2x4", 1.0, **{"memory": memory, **costs, **changes})


def test_bounds_by_hand():
    # 197 GFLOP at 197 TFLOP/s, 819 MB at 819 GB/s, and ten all-reduces of 4 MB and one gather among 8 at 200 GB/s.
    measured = report()
    assert measured.memory.total == 4.5 * 2**30
    assert measured.chips == 8
    assert measured.sent == 10 * 2 * 7 / 8 * 4_000_000 + 7 * 32
    assert measured.times == pytest.approx({"compute": 1e-3, "HBM": 1e-3, "interconnect": 3.5000112e-4})
    assert measured.intensity == pytest.approx(197e9 / 8.19e8)
    assert (report(flops=197e10).binding, report(hbm_bytes=8.19e9).binding) == ("compute", "HBM")
    assert report(hbm_bytes=8.19e9).bound == pytest.approx(1e-2)
    assert report(flops=0.0, hbm_bytes=1.0).binding == "interconnect"


def test_report_as_rows_and_json():
    measured = report(activation=_hlo.Activation("bf16[8]", 16, 3.0))
    rows = dict(measured.rows())
    assert rows["memory a chip"].startswith("4.5 GiB of 16 GiB (arguments 3 GiB, ")
    assert rows["step time"].startswith("at least 1 ms, bound by")
    header, (gather, reduce) = measured.collective_rows()
    assert len(header) == len(gather) == len(reduce)
    assert gather[:3] == ["all-gather", "8", "1, 1 in loops of unknown length"]
    assert reduce[2:] == ["10", size(4e7), size(7e7)]
    document = json.loads(json.dumps(measured.to_json(), allow_nan=False))
    assert (document["compiles"], document["chips"], document["chip"]["hbm"]) == (True, 8, 16 * 2**30)
    assert document["collectives"][1]["executions"] == 10


TEMPORARIES = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (43.41G)"


@pytest.mark.parametrize(
    ("message", "needed", "compiles"),
    [
        (f"{TEMPORARIES} exceeds available HBM (15.75G).", 43.41, "no: needs 43.4 GiB or more of 16 GiB a chip"),
        (
            "Ran out of memory in memory space hbm. Used 20.5G of 15.75G hbm.",
            20.5,
            "no: needs 20.5 GiB or more of 16 GiB a chip",
        ),
        ("INTERNAL: something else", None, "no"),
    ],
)
def test_step_that_does_not_compile(message, needed, compiles):
    def fail():
        raise jax.errors.JaxRuntimeError(message)

    step = SimpleNamespace(lower=lambda: SimpleNamespace(compile=fail))
    failed = compile_report(step, topology="v5e:2x4")
    assert failed.error == message
    assert failed.needed == (needed and round(needed * 2**30))
    assert dict(failed.rows())["compiles"] == compiles
    assert not json.loads(json.dumps(failed.to_json(), allow_nan=False))["compiles"]


def sync_batch_norm(devices, per_device, dtype=jnp.float32):
    """A batch norm over all devices, its gradient, and the shapes of its arguments."""
    mesh = mesh_of(devices, (len(devices),), ("batch",))

    def shape(dims, dtype, *spec):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P(*spec)))

    def normalize(x, params, stats):
        return bnjax.batch_norm(x, params, stats, training=True, axis_name="batch")

    def gradient(x, params, stats, g):
        return jax.vjp(lambda x: normalize(x, params, stats)[0], x)[1](g)[0]

    x = shape((per_device[0] * len(devices), *per_device[1:]), dtype, "batch")
    state = jax.tree.map(lambda v: shape(v.shape, v.dtype), bnjax.init_batch_norm(per_device[-1]))
    specs = (P("batch"), P(), P())
    forward = jax.shard_map(normalize, mesh=mesh, in_specs=specs, out_specs=(P("batch"), P()))
    both = jax.shard_map(gradient, mesh=mesh, in_specs=(*specs, P("batch")), out_specs=P("batch"))
    return jax.jit(forward), jax.jit(both), (x, *state), x


def test_report_of_a_step():
    """CPU devices stand in for TPU's."""
    forward, _, args, _ = sync_batch_norm(jax.devices(), (4, 6, 6, 5))
    measured = compile_report(forward, *args, topology="v5e:2x4", name="sync")
    assert (measured.name, measured.chips, measured.error) == ("sync", 8, None)
    assert {(c.kind, c.group_size) for c in measured.collectives} == {("all-reduce", 8)}
    assert measured.activation.shape == "f32[4,6,6,5]"
    assert measured.hbm_bytes >= 3 * measured.activation.bytes
    assert min(measured.flops, measured.bytes_accessed, measured.memory.arguments) > 0
    with pytest.raises(ValueError, match="was compiled for 8 of the 16 chips of 'v5e:4x4'"):
        compile_report(forward, *args, topology="v5e:4x4")


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "topology must begin with one of v4, v5e, v5p, v6e"),
        ("v5e", "a topology of v5e has 2 axes"),
        ("v5e:2x2x2", "a topology of v5e has 2 axes, as 'v5e:4x4' has"),
        ("v5p:4x4", "a topology of v5p has 3 axes, as 'v5p:4x4x4' has"),
        ("v5e:0x4", "a topology of v5e has 2 axes"),
        ("v5e:2xa", "a topology of v5e has 2 axes"),
        ("v6e:32x32", "a slice of v6e has at most 256 chips, but 'v6e:32x32' has 1024"),
    ],
)
def test_topologies_that_are_none(topology, message):
    with pytest.raises(ValueError, match=message):
        topology_devices(topology)


@pytest.mark.skipif(LIBTPU, reason="libtpu is installed")
def test_without_libtpu():
    with pytest.raises(ImportError, match=r"pip install 'bnjax\[tpu\]'"):
        topology_devices("v5e:2x4")


def test_environment(monkeypatch):
    for name in tpu_environment():
        monkeypatch.setenv(name, "mine")
    assert set(tpu_environment().values()) == {"mine"}


def test_importing_bnjax_leaves_it_out():
    code = "import sys, bnjax; print('bnjax.training.ahead_of_time' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


@tpu_compiler
@pytest.mark.parametrize(
    ("topology", "kind"),
    [
        ("v5e:1x1", "TPU v5 lite"),
        ("v5e:2x4", "TPU v5 lite"),
        ("v6e:16x16", "TPU v6 lite"),
        ("v4:2x2x4", "TPU v4"),
        ("v5p:16x16x16", "TPU v5"),
    ],
)
def test_devices_of_topologies(topology, kind):
    devices = topology_devices(topology)
    assert len(devices) == np.prod([int(n) for n in topology.split(":")[1].split("x")])
    assert {device.device_kind for device in devices} == {kind}


@tpu_compiler
def test_topology_that_libtpu_refuses():
    with pytest.raises(ValueError, match="libtpu does not know the topology 'v5e:3x5'"):
        topology_devices("v5e:3x5")


@tpu_compiler
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:16x16", "v5p:16x16x16"])
def test_passes_of_synced_batch_norm(topology):
    """Forward reads twice and writes once; with the gradient the input is read thrice more, its cotangent twice."""
    devices = topology_devices(topology)
    forward, gradient, args, g = sync_batch_norm(devices, (256, 56, 56, 128), jnp.bfloat16)
    for step, step_args, passes in ((forward, args, 3), (gradient, (*args, g), 6)):
        measured = compile_report(step, *step_args, topology=topology)
        assert measured.activation.shape == "bf16[256,56,56,128]"
        assert measured.activation.passes == pytest.approx(passes, abs=0.01)
        assert measured.bytes_accessed == pytest.approx(measured.hbm_bytes, rel=0.01)
        assert {(c.kind, c.group_size) for c in measured.collectives} == {("all-reduce", len(devices))}
        moments = len(devices) if len(devices) <= 256 else 1  # whose mean and variance a sum holds
        assert max(c.bytes for c in measured.collectives) <= 4 * 2 * 128 * moments
        assert measured.binding == "HBM"
        assert measured.memory.total < measured.chip.hbm


@pytest.fixture
def count_tpu(monkeypatch):
    """The benchmark, whose numbers are in docs/performance/tpu.json."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("count_tpu")


@tpu_compiler
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("topology", ["v5e:1x1", "v5e:2x2"])
def test_passes_of_both_directions(count_tpu, topology, dtype, masked):
    found = count_tpu.passes("bnjax", dtype, masked, topology)
    assert found["forward"] == pytest.approx(3, abs=0.01)
    assert found["backward"] == pytest.approx(5, abs=0.01)
    assert found["kept"] == pytest.approx(1, abs=0.01)
    if topology == "v5e:2x2":
        assert found["both"] <= 6.02


@tpu_compiler
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "both"), [(jnp.float32, 7), (jnp.bfloat16, 8)])
def test_passes_over_an_input_that_fast_memory_cannot_hold(count_tpu, masked, dtype, both):
    """The rows of a part of the width, 14, are no whole tiles: the width must not be split by a copy."""
    found = count_tpu.passes("bnjax", dtype, masked, "v5e:2x2", count_tpu.LARGE)
    assert found["forward"] == pytest.approx(3, abs=0.01)
    assert found["both"] == pytest.approx(both, abs=0.01)


@tpu_compiler
@pytest.mark.parametrize(
    ("step", "norm", "topology"),
    [(step, norm, "v5e:1x1") for step in ("cifar", "resnet50") for norm in ("bnjax", "bnjax, by the policy")]
    + [("resnet50", "bnjax, folded", topology) for topology in ("v5e:1x1", "v5e:2x4", "v5e:16x16")],
)
def test_whole_steps_need_no_more_than_was_published(count_tpu, step, norm, topology):
    published = json.loads((ROOT / "docs" / "performance" / "tpu.json").read_text())["steps"]
    (expected,) = (r for r in published if (r["step"], r["norm"], r["topology"]) == (step, norm, topology))
    found = count_tpu.step(step, norm, topology)
    for unit in ("GiB", "memory"):
        assert found[unit] <= 1.01 * expected[unit]
    of_flax = next(r for r in published if (r["step"], r["norm"], r["topology"]) == (step, "flax", topology))
    most = {"bnjax": (1, 1.01), "bnjax, folded": (0.85, 0.78)}.get(norm) if step == "resnet50" else None
    if most is not None:
        assert found["GiB"] <= most[0] * of_flax["GiB"] and found["memory"] <= most[1] * of_flax["memory"]


@tpu_compiler
def test_loop_that_tpu_compiles():
    mesh = mesh_of(topology_devices("v5e:2x4"), (2, 4), ("a", "b"))
    x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32, sharding=NamedSharding(mesh, P("a", "b")))

    def step(x):
        return lax.scan(lambda x, _: (jnp.tanh(x @ x), x.mean()), x, length=10)

    measured = compile_report(jax.jit(step), x, topology="v5e:2x4")
    assert measured.loops == 1
    assert {c.executions for c in measured.collectives if c.computation != "main"} >= {10}
    assert {c.group_size for c in measured.collectives} >= {2, 4}
    assert measured.flops == pytest.approx(2 * 1024**3 / 8, rel=0.1)  # one turn, one chip


@tpu_compiler
def test_step_that_does_not_fit():
    mesh = mesh_of(topology_devices("v5e:2x4"), (8,), ("batch",))
    x = jax.ShapeDtypeStruct((8 * 2**17, 2**16), jnp.bfloat16, sharding=NamedSharding(mesh, P("batch")))
    measured = compile_report(jax.jit(lambda x: x * 2), x, topology="v5e:2x4")
    assert measured.memory is None
    assert measured.needed == 32 * 2**30
    assert dict(measured.rows())["compiles"] == "no: needs 32 GiB or more of 16 GiB a chip"


@tpu_compiler
@pytest.mark.parametrize("parallel", ["jit", "shard_map"])
@pytest.mark.parametrize("name", steps.COMPILABLE)
def test_every_step_compiles_for_eight_chips(name, parallel):
    report = steps.compile_step(name, "v5e:2x4", parallel_by=parallel)
    assert report.error is None
    assert report.memory.total < report.chip.hbm
    batch_norms = {
        "circles": 1,
        "blobs": 11,
        "mnist": 2,
        "activations": 3,
        "smoothness": 8,
        "cifar": 10,
        "sensitivity": 8,
        "recurrent": 2,  # in the loop over time
        "accelerating": 8,
        "resnet18": 20,
        "resnet50": 53,
    }[name]
    kinds = {c.kind for c in report.collectives}
    assert kinds == {"all-reduce"}
    assert all(c.executions for c in report.collectives)  # none under a condition, on which devices might not agree
    # Each batch norm's forward and backward, and the gradients: the compiler may join some.
    assert 2 < len(report.collectives) <= 2 * batch_norms + 1
