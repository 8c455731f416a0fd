"""Collectives of programs, read off XLA's text. What the compiler writes for real programs is read in test_topology.py."""

import pytest

from seal_jax.parallel import collectives

MESH = {"edit": 2, "fsdp": 1, "tensor": 4}
TEXT = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: bf16[8,16]) -> bf16[8,64] {
  ROOT %gathered = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={1}
}

%cond.1 (c: (s32[], f32[4])) -> pred[] {
  %c = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %limit = s32[]{:T(128)} constant(28)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%body.1 (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %c = (s32[]{:T(128)}, f32[4]{0}) parameter(0)
  %reduced = (f32[100]{0}, bf16[50]{0}) all-reduce(%a, %b), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %t = (s32[], f32[4]) tuple(%i, %v)
}

%cond.2 (c: (s32[], f32[4])) -> pred[] {
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body.2 (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  ROOT %moved = f32[10]{0} collective-permute(%p), channel_id=3, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
}

%busy (c: f32[4]) -> f32[4] {
  ROOT %s = f32[10]{0} reduce-scatter(%p), channel_id=4, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
}

%idle (c: f32[4]) -> f32[4] {
  ROOT %c = f32[4] parameter(0)
}

%offloaded (p: f32[6]) -> f32[6] {
  ROOT %r = f32[6]{0} all-reduce(%p), channel_id=8, replica_groups=[2,4]<=[8], to_apply=%add
}, execution_thread="sparsecore"

%async (p: f32[6]) -> f32[6] {
  ROOT %custom = f32[6]{0} custom-call(%p), custom_call_target="Offloaded", called_computations={%offloaded}
}, execution_thread="sparsecore"

ENTRY %main (a: bf16[8,16]) -> f32[20] {
  %f = bf16[8,64] fusion(%a), kind=kCustom, calls=%fused
  %rest = bf16[8,64] fusion(%f), kind=kCustom, calls=%fused
  %w = (s32[], f32[4]) while(%t), condition=%cond.1, body=%body.1
  %v = (s32[], f32[4]) while(%t), condition=%cond.2, body=%body.2
  %b = f32[4] conditional(%p, %c, %c), true_computation=%busy, false_computation=%idle
  %start = (f32[10], f32[80]) all-gather-start(%q), channel_id=5, replica_groups={}, dimensions={0}
  %done = f32[80] all-gather-done(%start)
  %call-start = ((), (), (s32[9]{0})) async-start(), async_execution_thread="sparsecore", calls=%async
  %call-update = ((f32[6]{0}), f32[6]{0}, (s32[9]{0})) async-update(%call-start, %q)
  %call-done = f32[6]{0} async-done(%call-update)
  %alone = f32[7] all-reduce(%q), channel_id=6, replica_groups=[8,1]<=[8], to_apply=%add
  ROOT %last = f32[20]{0:T(128)} all-reduce(%q), channel_id=7, replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, to_apply=%add
}
"""


def test_each_collective_is_read_with_its_axes_and_as_often_as_it_runs():
    found = collectives.of_text(TEXT, MESH, trips=3)
    assert found == [
        ("all-gather", ("tensor",), 4, 1, 8 * 64 * 2 * 3 / 4),
        ("all-reduce", ("tensor",), 4, 28, 2 * (400 + 100) * 3 / 4),
        ("collective-permute", ("edit",), 2, 3, 40),
        ("reduce-scatter", ("edit",), 2, 1, 40),
        ("all-gather", ("edit", "tensor"), 8, 1, 320 * 7 / 8),
        ("all-reduce", ("tensor",), 4, 1, 2 * 24 * 3 / 4),  # by a processor beside the main one
        ("all-reduce", ("edit",), 2, 1, 2 * 80 / 2),
    ]
    assert collectives.by_axes(found) == {"tensor": 768 + 28 * 750 + 36, "edit": 3 * 40 + 40 + 80, "edit+tensor": 280}
    assert collectives.total(found) == 768 + 28 * 750 + 36 + 240 + 280


def test_what_xla_notes_of_a_loop_comes_first():
    noted = TEXT.replace("body=%body.2", 'body=%body.2, backend_config={"known_trip_count":{"n":"5"}}')
    assert collectives.of_text(noted, MESH, trips=3)[2].times == 5


def test_a_mesh_may_list_the_devices_in_another_order():
    other = TEXT.replace("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", "mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}")
    assert other != TEXT and collectives.of_text(other, MESH, trips=3) == collectives.of_text(TEXT, MESH, trips=3)


def test_groups_of_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match=r"a form that is not known: .*last"):
        collectives.of_text(TEXT.replace("mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", "mesh['axis_0'=8] {'axis_0':(1)2}"), MESH)
