import json

import jax
import jax.numpy as jnp
import pytest

from experiments import described_devices
from experiments.benchmark.workloads import EXPERIMENT_STEPS
from experiments.described_devices import Kernel
from experiments.lab.described import DEVICES

PROGRAM = """HloModule jit_run, is_scheduled=true

%part (param_0: f32[28,10], param_1: s32[], param_2: f32[10]) -> f32[10] {
  %param_0 = f32[28,10]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,10]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,10}
  %row = f32[10]{0} bitcast(%slice)
  %next = f32[1,10]{1,0} slice(%param_0), slice={[1:2], [0:10]}
  %next_row = f32[10]{0} bitcast(%next)
  %param_2 = f32[10]{0} parameter(2)
  %seen = f32[1,10]{1,0} bitcast(%param_2)
  %first = f32[1,5]{1,0} slice(%seen), slice={[0:1], [0:5]}
  %five = f32[5]{0} bitcast(%first)
  %ten = f32[10]{0} concatenate(%five, %five), dimensions={0}
  %rows = f32[10]{0} add(%row, %next_row)
  ROOT %sum = f32[10]{0} add(%rows, %ten)
}

%store (param_0.1: f32[28,10], param_1.1: f32[10], param_2.1: s32[]) -> (f32[28,10], pred[10]) {
  %param_0.1 = f32[28,10]{1,0} parameter(0)
  %param_1.1 = f32[10]{0} parameter(1)
  %row.1 = f32[1,10]{1,0} bitcast(%param_1.1)
  %param_2.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  %stored = f32[28,10]{1,0} dynamic-update-slice(%param_0.1, %row.1, %param_2.1, %zero.1)
  %same = pred[10]{0} compare(%param_1.1, %param_1.1), direction=EQ
  ROOT %both = (f32[28,10]{1,0}, pred[10]{0}) tuple(%stored, %same)
}

%step (state: (s32[], f32[28,10], f32[10])) -> (s32[], f32[28,10], f32[10]) {
  %state = (s32[], f32[28,10]{1,0}, /*index=2*/f32[10]{0}) parameter(0)
  %number = s32[] get-tuple-element(%state), index=0
  %table = f32[28,10]{1,0} get-tuple-element(%state), index=1
  %value = f32[10]{0} get-tuple-element(%state), index=2
  %part_fusion = f32[10]{0} fusion(%table, %number, %value), kind=kLoop, calls=%part, metadata={op_name="jit(run)/add"}
  %store_fusion = (f32[28,10]{1,0}, pred[10]{0}) fusion(%table, %part_fusion, %number), kind=kLoop, calls=%store
  ROOT %next = (s32[], f32[28,10]{1,0}, f32[10]{0}) tuple(%number, %table, %part_fusion)
}

%more (state.1: (s32[], f32[28,10], f32[10])) -> pred[] {
  %state.1 = (s32[], f32[28,10]{1,0}, f32[10]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (argument: (s32[], f32[28,10], f32[10])) -> (s32[], f32[28,10], f32[10]) {
  %argument = (s32[], f32[28,10]{1,0}, f32[10]{0}) parameter(0)
  %copied = f32[28,10]{0,1} copy(%argument)
  ROOT %loop = (s32[], f32[28,10]{1,0}, f32[10]{0}) while(%argument), condition=%more, body=%step, \
backend_config={"known_trip_count":{"n":"28"},"known_init_step":{"init":"0","step":"1"}}
}
"""


def test_kernels_are_found_in_loops_and_parts_count_as_parts():
    assert list(described_devices.kernels(*described_devices.read_module(PROGRAM))) == [
        Kernel("copied", 1, 2 * 28 * 10 * 4),
        Kernel("part_fusion", 28, 40 + 40 + 4 + 20 + 40),  # a row, its number, another row, five of ten, the sum
        Kernel("store_fusion", 28, 40 + 4 + 40 + 10),  # the value, its place, the row stored, truth values
    ]


@pytest.mark.parametrize(
    ("before", "after", "bytes_more"),
    [
        ("add(%rows, %ten)", "add(%rows, %param_2)", 20),  # all ten are read, and count once
        (
            "%stored = f32[28,10]{1,0} dynamic-update-slice(%param_0.1,",
            "%stored = f32[28,10]{1,0} add(%param_0.1,",
            2200,
        ),
    ],
)
def test_what_is_used_whole_counts_whole(before, after, bytes_more):
    counts = [
        {kernel.name: kernel.bytes for kernel in described_devices.kernels(*described_devices.read_module(text))}
        for text in (PROGRAM, PROGRAM.replace(before, after))
    ]
    assert sum(counts[1].values()) - sum(counts[0].values()) == bytes_more


def test_unknown_kernels_are_refused():
    program = PROGRAM.replace("%copied = f32[28,10]{0,1} copy(", "%copied = f32[28,10]{0,1} custom-call(")
    with pytest.raises(ValueError, match="nothing is known of what this moves"):
        list(described_devices.kernels(*described_devices.read_module(program)))


def test_a_compiled_program_is_read():
    def run(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x) * jnp.roll(x, 1), None), x, length=7)[0]

    text = jax.jit(run).lower(jnp.zeros(1000)).compile().as_text()
    found = list(described_devices.kernels(*described_devices.read_module(text)))
    assert {kernel.runs for kernel in found} >= {7}
    assert max(kernel.bytes for kernel in found if kernel.runs == 7) == 8000


ON_TPU = """HloModule jit_run, is_scheduled=true

%step (state: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %state = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %number = s32[]{:T(128)} get-tuple-element(%state), index=0
  %value = f32[8,128]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %start = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%value)
  %near = f32[8,128]{1,0:T(8,128)S(1)} copy-done(%start)
  %part = ((f32[8,128]{1,0:T(8,128)}), f32[2,128]{1,0:T(2,128)S(1)}, s32[]{:S(2)}) slice-start(%value), slice={}
  %two = f32[2,128]{1,0:T(2,128)S(1)} slice-done(%part)
  %room = f32[8,128]{1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %doubled = f32[8,128]{1,0:T(8,128)S(1)} add(%near, %near)
  %sum = f32[8,128]{1,0:T(8,128)} add(%value, %doubled)
  ROOT %next = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) tuple(%number, %sum)
}

%more (state.1: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  %state.1 = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  %at = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

ENTRY %main (argument: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %argument = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) parameter(0)
  ROOT %loop = (s32[]{:T(128)}, f32[8,128]{1,0:T(8,128)}) while(%argument), condition=%more, body=%step
}
"""


def test_on_a_tpu_only_what_goes_to_memory_and_back_counts():
    assert list(described_devices.kernels(*described_devices.read_module(ON_TPU))) == [
        Kernel("start", 28, 4096),
        Kernel("part", 28, 1024),  # two rows of eight
        Kernel("doubled", 28, 0),
        Kernel("sum", 28, 8192),  # reads the value, writes the sum
    ]


@pytest.mark.parametrize("limit", ["add(%at, %at)", "constant(28), from=%other\n  %other = s32[] constant(29)"])
def test_loops_of_unknown_length_count_once(limit):
    program = ON_TPU.replace("constant(28)", limit)
    assert {kernel.runs for kernel in described_devices.kernels(*described_devices.read_module(program))} == {1}


def test_time_is_bytes_by_bandwidth():
    summary = described_devices.estimate(PROGRAM, num=50, bandwidth=1e3)
    total = 2240 + 28 * (144 + 94)
    assert summary["seconds_at_least"] == pytest.approx(total / 1e3)
    assert summary["seconds_at_least_for_100000"] == pytest.approx(total / 1e3 * 2000)
    assert summary["bytes_per_step_and_run"] == pytest.approx(total / 50 / EXPERIMENT_STEPS)
    assert summary["kernels_per_step"] == pytest.approx(57 / (1600 + 1450))
    assert [kernel["name"] for kernel in summary["kernels"]] == ["part_fusion", "store_fusion", "copied"]


class Compiled:
    """A program that XLA has compiled for a described device."""

    def as_text(self):
        return PROGRAM

    def memory_analysis(self):
        return jax.jit(jnp.sin).lower(jnp.zeros(7)).compile().memory_analysis()


@pytest.mark.parametrize("device", DEVICES)
def test_the_script_writes_its_summary(tmp_path, monkeypatch, capsys, device):
    monkeypatch.setattr(described_devices, "compiled_for", lambda device, num: Compiled())
    monkeypatch.setattr("sys.argv", ["described_devices", "--device", device, "--out", str(tmp_path)])
    described_devices.main()
    assert "100,000 experiments take" in " ".join(capsys.readouterr().out.split())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["num"] == described_devices.NUM[device]
    assert summary["memory"]["argument"] == 28


@pytest.mark.parametrize("device", DEVICES)
def test_what_to_install_is_said_in_one_line(tmp_path, monkeypatch, device):
    def not_here(**_):
        raise NotImplementedError("topology not implemented")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", not_here)
    monkeypatch.setattr("sys.argv", ["described_devices", "--device", device, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r'^error: JAX cannot compile for .*: pip install "jax\[.*\]" \(topology'):
        described_devices.main()
