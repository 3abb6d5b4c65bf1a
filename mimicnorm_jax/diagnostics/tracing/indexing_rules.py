"""What operations that pick places do to the axis of a batch's examples: see `batch_axis`."""

from typing import Any

from mimicnorm_jax.diagnostics.tracing.batch_axis import Along, CoupledError, Free, State, Step, UnfollowedError

PLACES = "picks from the batch by place"


def dynamic_slice(step: Step) -> State:
    """Keeps the batch if all of it is taken, wherever the slice starts along the other axes."""
    state = step.states[0]
    if not isinstance(state, Along) or not all(isinstance(index, Free) for index in step.states[1:]):
        raise UnfollowedError("where it starts depends on the inputs")
    if step.params["slice_sizes"][state.axis] != step.shape()[state.axis]:
        raise CoupledError(PLACES)
    return state


def dynamic_update_slice(step: Step) -> State:
    """Keeps the batch if all of it is written."""
    along = [state for state in step.states if isinstance(state, Along)]
    if any(state != along[0] for state in along) or not all(isinstance(index, Free) for index in step.states[2:]):
        raise CoupledError(PLACES)
    axis = along[0].axis
    if step.shape(1)[axis] != step.shape(0)[axis]:
        raise CoupledError(PLACES)
    if any(isinstance(state, Free) and axis in state.varies for state in step.states[:2]):
        raise CoupledError("combines the inputs with values that depend on the place in the batch")
    return along[0]


def _batch_positions(offset_dims: tuple[int, ...], rank: int) -> list[int]:
    """Axes of a gather's result that come from the indices, in order."""
    return [axis for axis in range(rank) if axis not in offset_dims]


def free_gather(step: Step, operand: frozenset[int], indices: frozenset[int]) -> set[int]:
    """Axes along which a gather without the inputs may vary."""
    numbers = step.params["dimension_numbers"]
    positions = _batch_positions(numbers.offset_dims, len(step.out_shape()))
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    varying = indices | {other for axis, other in pairs if axis in operand}
    return set(numbers.offset_dims) | {axis for i, axis in enumerate(positions) if i in varying}


def gather(step: Step) -> State:
    """Keeps the batch if it is taken whole, if each example picks from itself, or from what all have in common."""
    operand, indices = step.states
    numbers, rank = step.params["dimension_numbers"], len(step.out_shape())
    positions = _batch_positions(numbers.offset_dims, rank)
    found: list[State] = []
    if isinstance(operand, Along):
        found.append(_picked_from(step, operand, indices, positions))
    if isinstance(indices, Along):
        if indices.axis >= len(positions):
            raise CoupledError(PLACES)
        if indices.axis in numbers.start_indices_batching_dims:
            _paired(step, indices.axis)
        found.append(Along(positions[indices.axis], indices.inner))
    if any(state != found[0] for state in found):
        raise CoupledError(PLACES)
    return found[0]


def _picked_from(step: Step, operand: Along, indices: State, positions: list[int]) -> State:
    numbers = step.params["dimension_numbers"]
    if operand.axis in numbers.operand_batching_dims:
        paired = numbers.start_indices_batching_dims[list(numbers.operand_batching_dims).index(operand.axis)]
        if isinstance(indices, Free) and paired in indices.varies:
            raise CoupledError(PLACES)
        return Along(positions[paired], operand.inner)
    if operand.axis in numbers.start_index_map or operand.axis in numbers.collapsed_slice_dims:
        raise CoupledError(PLACES)
    if step.params["slice_sizes"][operand.axis] != step.shape(0)[operand.axis]:
        raise CoupledError(PLACES)
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = [axis for axis in range(len(step.shape(0))) if axis not in gone]
    return Along(int(numbers.offset_dims[kept.index(operand.axis)]), operand.inner)


def _paired(step: Step, axis: int) -> None:
    """Raises unless what the indices' axis is paired with is the batch too, or the same at every place."""
    numbers, operand = step.params["dimension_numbers"], step.states[0]
    other = numbers.operand_batching_dims[list(numbers.start_indices_batching_dims).index(axis)]
    if isinstance(operand, Free) and other in operand.varies:
        raise CoupledError("combines the inputs with values that depend on the place in the batch")


def scatter(step: Step) -> State:
    """Keeps the batch if each example's values go to its own place."""
    operand, indices, updates = step.states
    numbers: Any = step.params["dimension_numbers"]
    target = operand if isinstance(operand, Along) else None
    if not isinstance(indices, Free):
        return _scatter_by_example(step)
    if target is None:
        assert isinstance(updates, Along)
        if updates.axis not in numbers.update_window_dims:
            raise CoupledError(PLACES)
        gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        kept = [axis for axis in range(len(step.shape(0))) if axis not in gone]
        target = Along(kept[list(numbers.update_window_dims).index(updates.axis)], updates.inner)
        if isinstance(operand, Free) and target.axis in operand.varies:
            raise CoupledError("combines the inputs with values that depend on the place in the batch")
    return _written(step, target)


def _written(step: Step, target: Along) -> State:
    numbers, updates = step.params["dimension_numbers"], step.states[2]
    if target.axis in (*numbers.scatter_dims_to_operand_dims, *numbers.inserted_window_dims):
        raise CoupledError(PLACES)
    if target.axis in numbers.operand_batching_dims:
        raise UnfollowedError("it writes by place")
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    kept = [axis for axis in range(len(step.shape(0))) if axis not in gone]
    source = numbers.update_window_dims[kept.index(target.axis)]
    if step.shape(2)[source] != step.shape(0)[target.axis]:
        raise CoupledError(PLACES)
    if isinstance(updates, Free) and source in updates.varies:
        raise CoupledError("combines the inputs with values that depend on the place in the batch")
    if isinstance(updates, Along) and updates != Along(int(source), target.inner):
        raise CoupledError(PLACES)
    return target


def _scatter_by_example(step: Step) -> State:
    """Indices that depend on the example: all three go together along axes that the operation knows for a batch."""
    operand, indices, updates = step.states
    numbers: Any = step.params["dimension_numbers"]
    if not isinstance(indices, Along) or indices.axis not in numbers.scatter_indices_batching_dims:
        raise UnfollowedError("where it writes depends on the inputs")
    pair = list(numbers.scatter_indices_batching_dims).index(indices.axis)
    target = Along(int(numbers.operand_batching_dims[pair]), indices.inner)
    outside = _batch_positions(numbers.update_window_dims, len(step.shape(2)))
    source = Along(outside[indices.axis], indices.inner)
    for state, expected in ((operand, target), (updates, source)):
        if isinstance(state, Along) and state != expected:
            raise CoupledError(PLACES)
        if isinstance(state, Free) and expected.axis in state.varies:
            raise CoupledError("combines the inputs with values that depend on the place in the batch")
    return target
