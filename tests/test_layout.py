"""The arrangement of tensors as matrices gives what the functions of one tensor give, for every kind of tensor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_tpgm.groups
from lightning_tpgm.layout import Layout
from lightning_tpgm.norms import Norm, deviation, from_sums
from lightning_tpgm.projection import project, ratio
from test_cost import Operations

SHAPES = [(), (1,), (7,), (0,), (3, 5), (5, 3), (1, 15), (0, 4), (4, 0), (4, 3, 2, 2), (2, 3, 3)]


@pytest.fixture(autouse=True, scope="module", params=[(12, 7), (100, 1000)], ids=["large ones", "mixed ones"])
def small_limits(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tiny tensors are large ones, worked on in blocks that do not divide them evenly; or all share few matrices."""
    with pytest.MonkeyPatch.context() as patch:
        set_limits(patch, *request.param)
        yield


def set_limits(patch: pytest.MonkeyPatch, shared: int, block: int) -> None:
    patch.setattr(lightning_tpgm.groups, "SHARED", shared)
    patch.setitem(lightning_tpgm.groups.BLOCK, "cpu", block)


def some(shapes: list[tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def matrix(tensor: Tensor, norm: Norm) -> Tensor:
    """The rows of one tensor, one after the other."""
    return tensor.flatten(1) if norm == "mars" and tensor.ndim > 1 else tensor.reshape(1, -1)


def row_distance(deviation: Tensor, norm: Norm) -> Tensor:
    return torch.linalg.vector_norm(matrix(deviation, norm), ord=1 if norm == "mars" else 2, dim=1)


def row_dot(grad: Tensor, deviation: Tensor, norm: Norm) -> Tensor:
    return (matrix(grad.to(deviation.dtype), norm) * matrix(deviation, norm)).sum(dim=1)


def one_by_one(values: list[Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values])


def rows_in_order(layout: Layout, rows: Tensor, count: int) -> Tensor:
    return rows[layout.rows_of(range(count))]


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=12),
    norm=st.sampled_from(["mars", "l2"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_rows_and_projections_are_those_of_one_tensor(
    shapes: list[tuple[int, ...]], norm: Norm, dtype: torch.dtype, seed: int
) -> None:
    weights, anchors, grads = (some(shapes, seed + i, dtype) for i in range(3))
    layout = Layout(weights, norm)
    w, a, g = (layout.arrange(tensors) for tensors in (weights, anchors, grads))
    deviations = [deviation(*pair) for pair in zip(weights, anchors, strict=True)]
    expected = [row_distance(d, norm) for d in deviations]
    found = from_sums(layout.sums(w, a), norm)
    torch.testing.assert_close(rows_in_order(layout, found, len(shapes)), one_by_one(expected))
    dots = [row_dot(grad, d, norm) for grad, d in zip(grads, deviations, strict=True)]
    torch.testing.assert_close(rows_in_order(layout, layout.dots(g, w, a), len(shapes)), one_by_one(dots))
    largest = torch.stack([d.amax() if d.numel() else d.new_zeros(()) for d in expected])
    smallest = torch.stack([d.amin() if d.numel() else d.new_full((), torch.inf) for d in expected])
    torch.testing.assert_close(layout.largest(found), largest)
    torch.testing.assert_close(layout.smallest(found), smallest)
    torch.testing.assert_close(layout.total(found), torch.stack([d.sum() for d in expected]))

    radii = largest / 2
    ratios = ratio(layout.of_rows(radii), found)
    projected = [
        project(matrix(w, norm), matrix(a, norm), ratio(radius, n)[:, None]).reshape(w.shape)
        for w, a, radius, n in zip(weights, anchors, radii, [e.to(layout.dtype) for e in expected], strict=True)
    ]
    kept = [matrix.clone() for matrix in layout.arrange(weights)]
    layout.project(weights, kept, layout.arrange(anchors), ratios, inside=False)
    for tensor, value in zip(weights, projected, strict=True):
        torch.testing.assert_close(tensor, value)


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=12),
    norm=st.sampled_from(["mars", "l2"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    more=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_one_pass_gives_what_a_step_asks_for(
    shapes: list[tuple[int, ...]], norm: Norm, dtype: torch.dtype, more: bool, last: bool, seed: int
) -> None:
    """What is kept may be the deviations before, and those of every third tensor are left alone."""
    weights, before, anchors, grads = (some(shapes, seed + i, dtype) for i in range(4))
    moved = [deviation(*pair) for pair in zip(weights, anchors, strict=True)]
    wide = [d.to(now.dtype) for d, now in zip(before, moved, strict=True)]
    expected = [
        [row_dot(g, d, norm) for g, d in zip(grads, wide, strict=True)],
        [row_distance(d, norm) for d in moved],
        [row_distance(d, norm) for d in wide],
        [row_dot(g, d, norm) for g, d in zip(grads, moved, strict=True)],
        [row_dot(g, g.to(d.dtype), norm) for g, d in zip(grads, moved, strict=True)],
    ]
    layout = Layout(weights, norm)
    w, a, b, g = (layout.arrange(tensors) for tensors in (weights, anchors, before, grads))
    targets = before if last else some(shapes, seed + 4, dtype)
    kept = [None if index % 3 == 0 else target for index, target in enumerate(targets)]
    pairs = zip(targets, moved, strict=True)
    left = [d.to(dtype) if index % 3 else target.clone() for index, (target, d) in enumerate(pairs)]
    sums = layout.step_sums(w, a, b, g, kept, more)
    distances = slice(1, 3 if more else 2)
    sums[distances] = from_sums(sums[distances], norm)
    for found, values in zip(sums, expected if more else expected[:2], strict=True):
        torch.testing.assert_close(rows_in_order(layout, found, len(shapes)), one_by_one(values))
    assert all(map(torch.equal, targets, left))


@settings(deadline=None, max_examples=30)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=12),
    norm=st.sampled_from(["mars", "l2"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_what_a_change_asks_for(shapes: list[tuple[int, ...]], norm: Norm, dtype: torch.dtype, seed: int) -> None:
    weights, before, anchors, grads = (some(shapes, seed + i, dtype) for i in range(4))
    new, old = ([deviation(*pair) for pair in zip(of, anchors, strict=True)] for of in (weights, before))
    layout = Layout(weights, norm)
    sums = layout.change_sums(*map(layout.arrange, (weights, anchors, before, grads)))
    sums[1:] = from_sums(sums[1:], norm)
    dots = [row_dot(g, d, norm) for g, d in zip(grads, old, strict=True)]
    for found, values in zip(sums, [dots, *([row_distance(d, norm) for d in ds] for ds in (new, old))], strict=True):
        torch.testing.assert_close(rows_in_order(layout, found, len(shapes)), one_by_one(values))


@pytest.mark.parametrize("norm", ["mars", "l2"])
@pytest.mark.parametrize(
    "strided",
    [
        lambda t: t,
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.cat([t, t], dim=1)[:, :4],
    ],
    ids=["contiguous", "channels_last", "transposed", "with_gaps"],
)
def test_memory_of_any_order(strided: Any, norm: Norm) -> None:
    (weight, anchor, grad) = some([(6, 4, 3, 2)] * 3, seed=1)
    expected = project(weight, anchor, torch.tensor(0.5))
    dot = row_dot(grad, deviation(weight, anchor), norm).flatten()
    weight = strided(weight)
    address = weight.data_ptr()
    layout = Layout([weight], norm)
    weights, anchors = layout.arrange([weight]), layout.arrange([anchor])
    torch.testing.assert_close(layout.dots(layout.arrange([grad]), weights, anchors), dot)
    layout.project([weight], weights, anchors, torch.full((dot.numel(),), 0.5), inside=False)
    torch.testing.assert_close(weight, expected)
    assert weight.data_ptr() == address


def test_memory_whose_order_changes_during_training() -> None:
    weight, anchor = some([(6, 4, 3, 2)] * 2, seed=1)
    expected = project(weight, anchor, torch.tensor(0.5))
    layout = Layout([weight], "mars")
    weight = weight.to(memory_format=torch.channels_last)
    layout.project([weight], layout.arrange([weight]), layout.arrange([anchor]), torch.full((6,), 0.5), inside=False)
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("norm", ["mars", "l2"])
def test_small_tensors_of_any_order_share_a_matrix(norm: Norm, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, 100, 1000)
    weights, anchors, grads = (some([(3, 2, 2, 2)] * 2, seed) for seed in range(3))
    expected = [project(w, a, torch.tensor(0.5)) for w, a in zip(weights, anchors, strict=True)]
    dots = [row_dot(g, deviation(w, a), norm) for g, w, a in zip(grads, weights, anchors, strict=True)]
    weights, anchors, grads = (
        [tensor.to(memory_format=torch.channels_last) for tensor in tensors] for tensors in (weights, anchors, grads)
    )
    layout = Layout(weights, norm)
    w, a, g = (layout.arrange(tensors) for tensors in (weights, anchors, grads))
    assert len(w) == 1
    found = layout.dots(g, w, a)
    torch.testing.assert_close(found, one_by_one(dots))
    layout.project(weights, w, a, torch.full_like(found, 0.5), inside=False)
    for tensor, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(tensor, value)


@pytest.mark.parametrize("from_d", [False, True])
@pytest.mark.parametrize("shape", [(3,), (6, 4)])
def test_gradients(shape: tuple[int, ...], from_d: bool) -> None:
    weights, anchors, grads = (some([shape] * 3, seed) for seed in range(3))
    missing = [grads[0], None, grads[2]]
    expected = [g - 0.5 * (w - a) for g, w, a in zip(grads, weights, anchors, strict=True)]
    layout = Layout(weights, "l2")
    w, a = layout.arrange(weights), layout.arrange(anchors)
    dots = layout.total(layout.dots(layout.arrange(missing), w, a))
    assert dots[1] == 0
    assert dots[0] == pytest.approx((grads[0] * (weights[0] - anchors[0])).sum().item(), rel=1e-5)
    rows = torch.full((3,), -0.5)
    if from_d:
        layout.add_multiples(missing, layout.arrange([w - a for w, a in zip(weights, anchors, strict=True)]), rows)
    else:
        layout.add_deviations(missing, w, a, rows)
    torch.testing.assert_close(grads[0], expected[0])
    torch.testing.assert_close(grads[2], expected[2])


def test_large_tensors_are_not_copied_and_small_ones_share_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, 12, 7)
    tensors = some([(6, 4), (3,), (3,), (2, 3)], seed=0)
    layout = Layout(tensors, "mars")
    large, shared, other = layout.arrange(tensors)
    assert large.data_ptr() == tensors[0].data_ptr()
    assert shared.shape == (2, 3)
    assert other.shape == (2, 3)


def test_a_shared_matrix_is_no_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, 12, 7)
    layout = Layout(some([(3,)] * 10, seed=0), "l2")
    assert [matrix.shape for matrix in layout.arrange(some([(3,)] * 10, seed=0))] == [(3, 3)] * 3 + [(1, 3)]


def test_private_function_of_torch_is_what_it_was() -> None:
    """Copies a list of tensors into another, whatever their order in memory."""
    targets = [torch.zeros(3, 2), torch.zeros(()), nn.Parameter(torch.zeros(2))]
    with torch.no_grad():
        torch._foreach_copy_(targets, [torch.arange(6.0).view(2, 3).t(), torch.tensor(7.0), torch.ones(2)])
    assert [target.tolist() for target in targets] == [[[0, 3], [1, 4], [2, 5]], 7, [1, 1]]


def test_long_rows_are_summed_exactly() -> None:
    """All elements moved alike, as in Adam's first step: sums that add one after the other lose 3e-5 here."""
    anchor = torch.zeros(2**18)
    layout = Layout([anchor], "l2")
    moved = layout.arrange([torch.full_like(anchor, 1e-3)])
    found = from_sums(layout.sums(moved, layout.arrange([anchor])), "l2")
    torch.testing.assert_close(found, torch.tensor([0.512]), rtol=1e-6, atol=0)


def test_anchors_of_another_dtype_are_measured() -> None:
    """As after ``model.double()`` in the middle of a training."""
    anchor = torch.zeros(3, 8)
    layout = Layout([anchor.double()], "mars")
    found = layout.sums(layout.arrange([torch.ones(3, 8).double()]), [anchor])
    assert found.tolist() == [8, 8, 8]


@pytest.mark.parametrize("norm", ["mars", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 127, 128, 131, 254, 509 * 8, 509 * 16, 2**14])  # 131 and 509 are primes
def test_rows_of_any_length_are_summed(length: int, dtype: torch.dtype, norm: Norm) -> None:
    weights, anchors = some([(3, length)], 0, dtype), some([(3, length)], 1, dtype)
    layout = Layout(weights, norm)
    found = from_sums(layout.sums(layout.arrange(weights), layout.arrange(anchors)), norm)
    wide = row_distance(weights[0].double() - anchors[0].double(), norm)
    torch.testing.assert_close(found.double(), wide, rtol=1e-6 if dtype != torch.float64 else 1e-14, atol=0)


@pytest.mark.parametrize(("length", "result"), [(1000, 40), (1024, 32), (1016, 1016), (1021, 1021)])
def test_distances_need_a_block_of_memory_only_where_rows_have_no_long_equal_pieces(
    length: int, result: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block is a row here. 1,021 is a prime, and 1,016 is eight times one."""
    set_limits(monkeypatch, 10, 100)
    tensor = torch.zeros(2, length)
    layout = Layout([tensor], "mars")
    with Operations() as operations:
        layout.sums(layout.arrange([tensor]), layout.arrange([tensor]))
    assert max(operations.results) == result
    for pair in ([tensor], [None]), ([None], [tensor]):
        with Operations() as operations:
            layout.sums(*map(layout.arrange, pair))
        assert max(operations.results) == length, "zeros are not written out, though no operation takes them at once"


@pytest.mark.parametrize("other", [torch.float32, torch.float64])
def test_a_projection_is_one_operation_unless_dtypes_need_memory(
    other: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ratios have float64 beside a tensor that does."""
    set_limits(monkeypatch, 10, 100)
    tensors = [torch.ones(1000), torch.ones(4, dtype=other)]
    layout = Layout(tensors, "l2")
    w, a = layout.arrange(tensors), layout.arrange([tensor.clone() for tensor in tensors])
    ratios = torch.ones(2, dtype=layout.dtype)
    with Operations() as operations:
        layout.project(tensors, w, a, ratios, inside=True)
    assert (1000 in operations.results) is (other == torch.float32)
    assert max(operations.results) == (1000 if other == torch.float32 else 100)


@pytest.mark.parametrize("norm", ["mars", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_tensors_of_several_shapes_share_a_matrix(
    norm: Norm, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every value is that of the tensor alone, to the bit but for the order of sums."""
    set_limits(monkeypatch, 100, 1000)
    shapes = [(7,), (3, 5), (3,), (0,), (2, 3, 3), ()]
    weights, anchors, grads = (some(shapes, seed, dtype) for seed in range(3))
    weights[4], grads[4] = (tensors[4].transpose(1, 2).contiguous().transpose(1, 2) for tensors in (weights, grads))
    layout, alone = Layout(weights, norm), [Layout([weight], norm) for weight in weights]
    assert len(layout.arrange(weights)) == (1 if norm == "mars" else 2)  # six rows of 18 elements are too many

    for moved in (weights, [None, *weights[1:]]):
        found = layout.dots(layout.arrange(grads), layout.arrange(moved), layout.arrange(anchors))
        of_one = [
            one.dots(one.arrange([g]), one.arrange([w]), one.arrange([a]))
            for one, g, w, a in zip(alone, grads, moved, anchors, strict=True)
        ]
        torch.testing.assert_close(rows_in_order(layout, found, len(shapes)), torch.cat(of_one))
        torch.testing.assert_close(layout.total(found), torch.stack([rows.sum() for rows in of_one]))

    ends = [weight.clone() for weight in weights]
    for one, weight, anchor in zip(alone, ends, anchors, strict=True):
        w, a = one.arrange([weight]), one.arrange([anchor])
        one.project([weight], w, a, one.of_rows(torch.tensor([0.3])), inside=True)
    first = weights[0].clone()
    w, a = layout.arrange(weights), layout.arrange(anchors)
    layout.project([None, *weights[1:]], w, a, layout.of_rows(torch.full((len(shapes),), 0.3)), inside=True)
    assert all(map(torch.equal, weights, [first, *ends[1:]]))


def test_a_matrix_of_several_shapes_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fills up the rows costs less than a call."""
    set_limits(monkeypatch, 1000, 10**6)
    shapes = [(2,), (4, 4), (30, 4), (30, 8), (2, 100), (5, 100), (3, 200), (800,)]
    matrices = Layout(some(shapes, seed=0), "mars").arrange(some(shapes, seed=0))
    assert sorted(m.shape for m in matrices) == [(1, 800), (3, 200), (7, 100), (65, 8)]


def test_a_tensor_of_many_rows_shares_no_matrix_with_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums over each tensor's rows would have as many places for every one of them."""
    set_limits(monkeypatch, 1000, 10**6)
    tensors = some([(40, 1)] + [(1,)] * 30, seed=0)
    assert [m.shape for m in Layout(tensors, "mars").arrange(tensors)] == [(30, 1), (40, 1)]


def test_a_tensor_without_rows_adds_none_to_the_others() -> None:
    """As many rows as tensors, but not one each: a process may hold no part of a tensor."""
    assert Layout(some([(0, 4), (2, 3)], seed=0), "mars").total(torch.ones(2)).tolist() == [0, 2]


def test_a_tensor_whose_size_changed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits(monkeypatch, 100, 1000)
    layout = Layout(some([(3,), (2, 2)], seed=0), "l2")
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        layout.arrange(some([(5,), (2, 2)], seed=0))


def test_tensors_of_several_dtypes_share_no_matrix() -> None:
    tensors = [torch.zeros(2), torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(3).double()]
    assert {m.dtype: m.shape for m in Layout(tensors, "mars").arrange(tensors)} == {
        torch.float32: (2, 3),
        torch.bfloat16: (1, 2),
        torch.float64: (1, 3),
    }
