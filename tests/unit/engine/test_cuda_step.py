"""How a pass is laid out for CUDA; the same on any device."""

from __future__ import annotations

import torch

from worker.engine.attention import KVRow
from worker.engine.cuda.step import MAX_ROWS, StepInput

CPU = torch.device("cpu")
SPARE = 99


def test_rows_say_where_their_sequence_lies_and_padding_keeps_to_itself() -> None:
    step = StepInput(CPU, 8, SPARE)
    one, two = torch.tensor([7, 3], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    rows = [KVRow(one, 64), KVRow(one, 65), KVRow(two, 1)]
    step.fill([11, 12, 13], [63, 64, 0], rows, [1, 2])
    assert step.blocks[:4].tolist() == [SPARE, 7, 3, 5]
    assert step.tokens[:4].tolist() == [11, 12, 13, 0]
    assert step.positions[:4].tolist() == [63, 64, 0, 0]
    assert step.begins[:4].tolist() == [1, 1, 3, 0]
    assert step.lengths[:4].tolist() == [64, 65, 1, 1]
    assert step.targets[:4].tolist() == [7 * 64 + 63, 3 * 64, 5 * 64, SPARE * 64]
    assert step.wanted[:3].tolist() == [1, 2, 0]
    tokens, positions = step.rows(2)
    assert (tokens.tolist(), positions.tolist()) == ([[11, 12]], [[63, 64]])


def test_a_shorter_pass_leaves_nothing_of_a_longer_one() -> None:
    step = StepInput(CPU, 4, SPARE)
    slots = torch.tensor([1, 2, 3, 4], dtype=torch.int32)
    rows = [KVRow(slots, length) for length in range(1, MAX_ROWS + 1)]
    step.fill([9] * MAX_ROWS, list(range(MAX_ROWS)), rows, list(range(MAX_ROWS)))
    assert step.targets[-1] == (MAX_ROWS - 1) // 64 % 4 * 64 + 64 + (MAX_ROWS - 1) % 64
    step.fill([8], [5], [KVRow(slots, 6)], [0])
    for zeros in (step.tokens, step.positions, step.begins, step.wanted):
        assert not zeros[1:].any()
    assert step.lengths[1:].eq(1).all()
    assert step.targets[1:].eq(SPARE * 64).all()


def test_places_of_a_pass_are_the_same_every_time() -> None:
    step = StepInput(CPU, 4, SPARE)
    before = [tensor.data_ptr() for tensor in (step.blocks, *step.rows(64), step.wanted, step.targets)]
    step.fill([1], [0], [KVRow(torch.tensor([2], dtype=torch.int32), 1)], [0])
    assert [tensor.data_ptr() for tensor in (step.blocks, *step.rows(64), step.wanted, step.targets)] == before
