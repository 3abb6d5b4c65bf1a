"""How often loops turn that do not say it, read off hand-written programs."""

import pytest

from mimicnorm_jax.planning import hlo, traffic

# The loop counts up to the second element of its state, which each turn makes anew of LIMIT.
_COUNTED = """HloModule counted

%both (p.0: s32[], p.1: f32[8]) -> (f32[8], s32[]) {
  %p.0 = s32[] parameter(0)
  %p.1 = f32[8]{0} parameter(1)
  %minus = f32[8]{0} negate(%p.1)
  %less = s32[] negate(%p.0)
  ROOT %pair = (f32[8]{0}, s32[]) tuple(%minus, %less)
}

%condition (s.0: (s32[], s32[], f32[8])) -> pred[] {
  %s.0 = (s32[], s32[], f32[8]{0}) parameter(0)
  %i.0 = s32[] get-tuple-element(%s.0), index=0
  %limit.0 = s32[] get-tuple-element(%s.0), index=1
  ROOT %below = pred[] compare(%i.0, %limit.0), direction=LT
}

%body (s.1: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %s.1 = (s32[], s32[], f32[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %limit.1 = s32[] get-tuple-element(%s.1), index=1
  %x.1 = f32[8]{0} get-tuple-element(%s.1), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  %made = (f32[8]{0}, s32[]) fusion(%limit.1, %x.1), kind=kLoop, calls=%both
  %y = f32[8]{0} get-tuple-element(%made), index=0
  %limit.2 = s32[] get-tuple-element(%made), index=1
  ROOT %out = (s32[], s32[], f32[8]{0}) tuple(%next, %LIMIT, %y)
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %zero = s32[] constant(0)
  %hundred = s32[] constant(100)
  %start = (s32[], s32[], f32[8]{0}) tuple(%zero, %hundred, %x)
  %loop = (s32[], s32[], f32[8]{0}) while(%start), condition=%condition, body=%body
  ROOT %result = f32[8]{0} get-tuple-element(%loop), index=2
}
"""


@pytest.mark.parametrize(("limit", "turns", "unknown"), [("limit.1", 100, 0), ("limit.2", 1, 1)])
def test_a_limit_is_one_if_turns_hand_it_on(limit, turns, unknown):
    """And not if a kernel makes it whose second result it is, as it is the second of the state."""
    found = traffic.work(hlo.parse(_COUNTED.replace("LIMIT", limit)))
    # A turn's kernel reads and writes eight numbers and a limit, and at most some single numbers more.
    assert 2 * 4 * 9 * turns <= sum(found.moved.values()) <= 2 * 4 * 12 * turns
    assert found.unknown_loops == unknown
