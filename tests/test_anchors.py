"""`Anchors`, the state machine, without a Trainer: where anchors come from, who waits for one, who has one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lightning_tpgm.anchors import Anchors
from lightning_tpgm.constrained import Constrained
from lightning_tpgm.sharding import full
from properties import assert_same

Candidates = dict[str, Tensor]


def candidates(**trainable: bool) -> Candidates:
    """Parameters of shape (2, 3), the values of each all different from those of the others."""
    values = {name: 10.0 * i + torch.arange(6.0).reshape(2, 3) for i, name in enumerate(trainable)}
    return {name: nn.Parameter(values[name], requires_grad=trainable[name]) for name in trainable}


def values(tensors: Mapping[str, Tensor]) -> Candidates:
    """Copies."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def shifted(tensors: Mapping[str, Tensor], by: float = 1.0) -> Candidates:
    """Copies that differ."""
    return {name: tensor.detach() + by for name, tensor in tensors.items()}


def move(tensors: Mapping[str, Tensor], by: float = 0.5) -> None:
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.add_(by)


def silent(text: str) -> None:
    raise AssertionError(f"nothing is to be reported, found {text!r}")


def kept(anchors: Anchors) -> dict[str, Tensor | None]:
    """What is kept for those that wait."""
    found: dict[str, Tensor | None] = anchors.state_dict()["waiting"]
    return found


def assert_states(anchors: Anchors, origin: str, waiting: list[str], joined: list[str]) -> None:
    """Where the machine is, with all names in this order."""
    assert anchors.origin == origin
    assert anchors.waiting == waiting
    assert list(anchors.joined) == joined


# --- none, and back to it


def test_a_new_one_has_no_origin_and_nothing() -> None:
    anchors = Anchors()
    assert_states(anchors, "none", [], [])
    assert anchors.parameters == {}
    assert_same(anchors.state_dict(), {"anchor": {}, "waiting": {}})
    assert anchors.join() == []


def begun() -> Anchors:
    anchors = Anchors("host")
    anchors.begin(candidates(a=True, b=False))
    anchors.join()
    return anchors


def test_forget_is_as_good_as_new() -> None:
    anchors = begun()
    anchors.forget()
    assert_states(anchors, "none", [], [])
    assert anchors.parameters == {}
    assert_same(anchors.state_dict(), {"anchor": {}, "waiting": {}})
    assert anchors.place == "host"
    anchors.begin(candidates(c=True))
    assert anchors.join() == ["c"]


@pytest.mark.parametrize("transition", ["begin", "begin_from", "restore", "load_state_dict"])
def test_every_origin_forgets_the_one_before(transition: str) -> None:
    anchors, new = begun(), candidates(c=True)
    state = {"anchor": values(new), "waiting": {}}
    {
        "begin": lambda: anchors.begin(new),
        "begin_from": lambda: anchors.begin_from(shifted(new), new, silent),
        "restore": lambda: anchors.restore(state, new),
        "load_state_dict": lambda: anchors.load_state_dict(state),
    }[transition]()
    anchors.join()
    assert list(anchors.joined) == ["c"]
    assert list(anchors.state_dict()["waiting"]) == []


# --- begin: fresh


def test_begin_lets_all_wait_and_copies_nothing() -> None:
    found = candidates(a=True, b=False)
    anchors = Anchors()
    anchors.begin(found)
    assert_states(anchors, "fresh", ["a", "b"], [])
    assert_same(kept(anchors), {"a": None, "b": None})


def test_fresh_anchors_are_copies_of_what_is_there_at_the_join() -> None:
    found = candidates(a=True, b=True)
    anchors = Anchors()
    anchors.begin(found)
    move(found)
    expected = values(found)
    anchors.join()
    move(found)
    assert_states(anchors, "fresh", [], ["a", "b"])
    assert_same(anchors.joined, expected)
    assert not any(isinstance(anchor, nn.Parameter) or anchor.requires_grad for anchor in anchors.joined.values())
    assert anchors.parameters.keys() == found.keys()
    assert all(anchors.parameters[name] is found[name] for name in found)


# --- join: from waiting to joined


def test_frozen_ones_wait_until_they_thaw() -> None:
    found = candidates(a=True, b=False, c=True)
    anchors = Anchors()
    anchors.begin(found)
    assert anchors.join() == ["a", "c"]
    assert_states(anchors, "fresh", ["b"], ["a", "c"])
    assert list(anchors.parameters) == ["a", "c"]
    assert_same(kept(anchors), {"b": None})
    assert anchors.join() == []

    found["b"].requires_grad_(True)
    move(found)
    expected = found["b"].detach().clone()
    assert anchors.join() == ["b"]
    assert_states(anchors, "fresh", [], ["a", "c", "b"])  # in the order in which they joined
    assert list(anchors.parameters) == ["a", "c", "b"]
    assert_same(anchors.joined["b"], expected)
    assert kept(anchors) == {}


def test_one_that_is_frozen_again_stays_joined() -> None:
    found = candidates(a=True)
    anchors = Anchors()
    anchors.begin(found)
    anchors.join()
    found["a"].requires_grad_(False)
    assert anchors.join() == []
    assert_states(anchors, "fresh", [], ["a"])


def test_join_with_frozen_takes_all_in_in_the_order_of_the_model() -> None:
    found = candidates(c=False, a=True, b=False)
    anchors = Anchors()
    anchors.begin(found)
    assert anchors.join(frozen=True) == ["c", "a", "b"]
    assert_states(anchors, "fresh", [], ["c", "a", "b"])
    assert_same(anchors.joined, values(found))


def test_buffers_join_at_once() -> None:
    """A tensor that is no parameter is never frozen, and never asks for a gradient."""
    found: Candidates = candidates(weight=False) | {"running_mean": torch.arange(3.0)}
    anchors = Anchors()
    anchors.begin(found)
    assert anchors.join() == ["running_mean"]
    assert_states(anchors, "fresh", ["weight"], ["running_mean"])
    move({"running_mean": found["running_mean"]})
    assert anchors.joined["running_mean"].tolist() == [0, 1, 2]


def test_a_buffer_takes_its_pretrained_value() -> None:
    found: Candidates = {"running_mean": torch.arange(3.0)}
    for given in (values(found), shifted(found)):
        anchors = Anchors()
        anchors.begin_from(given, found, silent)
        assert anchors.join() == ["running_mean"]
        assert_same(anchors.joined, given)


# --- begin_from: pretrained


def test_pretrained_values_are_the_anchors() -> None:
    found = candidates(a=True, b=True)
    given = shifted(found)
    anchors = Anchors()
    anchors.begin_from({name: given[name] for name in ("b", "a")}, found, silent)
    assert_states(anchors, "pretrained", ["a", "b"], [])  # in the order of the model
    assert anchors.join() == ["a", "b"]
    assert_states(anchors, "pretrained", [], ["a", "b"])
    assert_same(anchors.joined, given)
    assert all(anchors.joined[name].data_ptr() != given[name].data_ptr() for name in given)


def test_what_pretrained_lacks_is_not_constrained_and_reported() -> None:
    found, reports = candidates(a=True, head=True, odd=False), list[str]()
    anchors = Anchors()
    anchors.begin_from({"a": torch.ones(2, 3), "odd": torch.ones(3, 2)}, found, reports.append)
    assert anchors.join(frozen=True) == ["a"]
    assert reports == [
        "Not constrained, because `pretrained` has them in another shape: odd (2, 3) (pretrained (3, 2)).",
        "Not constrained, because `pretrained` lacks them: head.",
    ]


def test_pretrained_that_fits_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^`pretrained` matches no parameter by name and shape"):
        Anchors().begin_from({"b": torch.ones(2, 3)}, candidates(a=True), silent)


def test_pretrained_for_no_candidates_is_no_error() -> None:
    """That nothing is left to constrain is said elsewhere."""
    anchors = Anchors()
    anchors.begin_from({"b": torch.ones(2, 3)}, {}, silent)
    assert_states(anchors, "pretrained", [], [])


def test_a_frozen_one_that_holds_its_pretrained_value_is_not_copied_until_it_thaws() -> None:
    found = candidates(a=False, b=False)
    given = values(found)
    anchors = Anchors()
    anchors.begin_from(given, found, silent)
    anchors.own()
    assert anchors.join() == []
    assert_states(anchors, "pretrained", ["a", "b"], [])
    assert_same(kept(anchors), {"a": None, "b": None})
    assert tensors_in(anchors) <= {id(tensor) for tensor in found.values()}

    found["b"].requires_grad_(True)
    assert anchors.join() == ["b"]
    assert_same(anchors.joined, {"b": given["b"]})


def tensors_in(anchors: Anchors) -> set[int]:
    """All tensors that the object holds."""
    stores = [value for value in vars(anchors).values() if isinstance(value, dict)]
    return {id(tensor) for store in stores for tensor in store.values() if tensor is not None}


def test_a_frozen_one_that_differs_keeps_a_copy_of_its_own() -> None:
    found = candidates(same=False, other=False)
    given = values(found)
    with torch.no_grad():
        given["other"][1, 2] += 1e-6
    expected = values(given)
    anchors = Anchors()
    anchors.begin_from(given, found, silent)
    assert kept(anchors)["other"] is given["other"]  # not yet its own
    anchors.own()
    move(given)
    assert_same(kept(anchors), {"same": None, "other": expected["other"]})
    for parameter in found.values():
        parameter.requires_grad_(True)
    assert anchors.join() == ["same", "other"]
    assert_same(anchors.joined, expected)


@pytest.mark.parametrize(("dtype", "copied"), [(torch.bfloat16, False), (torch.float64, False), (torch.float32, True)])
def test_equal_means_equal_in_the_dtype_of_the_parameter(dtype: torch.dtype, copied: bool) -> None:
    """The anchor is the pretrained value in the dtype of its parameter: that is what is compared."""
    value = torch.tensor([1.0, 2.0])
    given = {"a": value + 1e-3 if dtype == torch.bfloat16 else value + copied}
    anchors = Anchors()
    anchors.begin_from(given, {"a": nn.Parameter(value.to(dtype), requires_grad=False)}, silent)
    assert (kept(anchors)["a"] is not None) == copied


# --- state_dict, restore and load_state_dict


def saved() -> tuple[dict[str, Any], Candidates]:
    """The state of anchors of which one has joined, one waits, and one waits with a value that is kept for it."""
    found = candidates(a=True, b=False, c=False)
    given = {"a": torch.ones(2, 3), "b": found["b"].detach().clone(), "c": torch.full((2, 3), 7.0)}
    anchors = Anchors()
    anchors.begin_from(given, found, silent)
    anchors.own()
    anchors.join()
    return anchors.state_dict(), given


def test_state_dict_is_plain_whole_and_on_the_cpu() -> None:
    state, given = saved()
    assert_same(state, {"anchor": {"a": given["a"]}, "waiting": {"b": None, "c": given["c"]}})


def test_restore_takes_all_states_back() -> None:
    state, given = saved()
    found = candidates(a=True, b=False, c=False, new=True)
    anchors = Anchors()
    anchors.restore(state, found)
    assert_states(anchors, "restored", ["b", "c"], ["a"])
    assert list(anchors.parameters) == ["a"]
    assert anchors.parameters["a"] is found["a"]
    assert_same(anchors.state_dict(), state)
    assert anchors.join() == []  # a parameter that the run did not have is not constrained
    found["c"].requires_grad_(True)
    assert anchors.join() == ["c"]
    assert_same(anchors.joined["c"], given["c"])
    found["b"].requires_grad_(True)
    assert anchors.join() == ["b"]
    assert_same(anchors.joined["b"], found["b"].detach())


def test_restored_ones_that_had_joined_stay_so_though_they_are_frozen_now() -> None:
    state, _ = saved()
    anchors = Anchors()
    anchors.restore(state, candidates(a=False, b=False, c=False))
    assert_states(anchors, "restored", ["b", "c"], ["a"])


def test_restored_anchors_are_copies() -> None:
    state, given = saved()
    anchors = Anchors()
    anchors.restore(state, candidates(a=True, b=False, c=False))
    anchors.own()
    move(state["anchor"])
    move({"c": state["waiting"]["c"]})
    assert_same(anchors.joined, {"a": given["a"]})
    assert_same(kept(anchors), {"b": None, "c": given["c"]})


RESUME = r"Resume with the module and the `exclude` of the run that wrote the checkpoint\.$"


@pytest.mark.parametrize(
    ("name", "found"),
    [("a", None), ("a", torch.zeros(3, 2)), ("c", torch.zeros(4))],
    ids=["gone", "other shape", "kept value of other shape"],
)
def test_restore_of_another_module_is_an_error(name: str, found: Tensor | None) -> None:
    state, _ = saved()
    others = candidates(a=True, b=False, c=False)
    del others[name]
    if found is not None:
        others[name] = nn.Parameter(found, requires_grad=False)
    shown = "no such parameter" if found is None else rf"shape \({', '.join(map(str, found.shape))},?\)"
    message = rf"^The checkpoint's anchor of {name!r} has shape \(2, 3\), found {shown} among those to constrain\. "
    with pytest.raises(ValueError, match=message + RESUME):
        Anchors().restore(state, others)


def test_restore_without_one_that_waited_is_no_error() -> None:
    """It has never been constrained."""
    state, _ = saved()
    anchors = Anchors()
    anchors.restore(state, candidates(a=True))
    assert_states(anchors, "restored", [], ["a"])
    assert list(kept(anchors)) == ["b", "c"]


def test_load_state_dict_needs_no_model() -> None:
    state, _ = saved()
    anchors = Anchors()
    anchors.load_state_dict(state)
    assert_states(anchors, "restored", [], ["a"])
    assert anchors.parameters == {}
    assert_same(anchors.state_dict(), state)
    anchors.go_on(candidates(a=True, b=True, c=True), None, silent)
    assert anchors.join() == ["b", "c"]


def test_the_order_of_names_survives() -> None:
    """Vectors of learned scalars go by it: order of joining first, then that of the model."""
    found = candidates(a=False, b=True, c=True)
    anchors = Anchors()
    anchors.begin(found)
    anchors.join()
    found["a"].requires_grad_(True)
    anchors.join()
    state = anchors.state_dict()
    assert list(state["anchor"]) == ["b", "c", "a"]
    again = Anchors()
    again.restore(state, found)
    assert list(again.joined) == list(again.parameters) == ["b", "c", "a"]
    again.release()
    again.go_on(found, None, silent)
    assert list(again.joined) == list(again.parameters) == ["b", "c", "a"]


# --- release and go_on


def test_release_lets_go_of_the_model_and_keeps_what_a_checkpoint_needs() -> None:
    found = candidates(a=True, b=False)
    given = {"a": torch.ones(2, 3), "b": torch.full((2, 3), 7.0)}
    anchors = Anchors()
    anchors.begin_from(given, found, silent)
    anchors.own()
    anchors.join()
    state = anchors.state_dict()
    anchors.release()
    assert_states(anchors, "pretrained", [], ["a"])
    assert anchors.parameters == {}
    assert not tensors_in(anchors) & {id(tensor) for tensor in found.values()}
    assert_same(anchors.state_dict(), state)
    assert anchors.join(frozen=True) == []


def released(found: Candidates) -> Anchors:
    anchors = Anchors()
    anchors.begin(found)
    anchors.join()
    anchors.release()
    return anchors


def test_go_on_keeps_the_anchors_whatever_the_weights_are_now() -> None:
    found = candidates(a=True, b=False)
    expected = found["a"].detach().clone()
    anchors = released(found)
    move(found)
    anchors.go_on(found, None, silent)
    assert_states(anchors, "fresh", ["b"], ["a"])
    assert anchors.parameters["a"] is found["a"]
    assert anchors.join() == []
    assert_same(anchors.joined, {"a": expected})
    found["b"].requires_grad_(True)
    assert anchors.join() == ["b"]
    assert_same(anchors.joined["b"], found["b"].detach())


def test_go_on_lets_new_parameters_wait_for_their_present_weights() -> None:
    anchors = released(candidates(a=True, b=False))
    grown = candidates(a=True, b=False, new=True, frozen=False)
    anchors.go_on(grown, None, silent)
    assert_states(anchors, "fresh", ["b", "new", "frozen"], ["a"])
    assert anchors.join() == ["new"]
    assert_same(anchors.joined["new"], grown["new"].detach())


def test_go_on_takes_the_pretrained_value_of_new_parameters_alone() -> None:
    first, reports = candidates(a=True), list[str]()
    anchors = Anchors()
    anchors.begin_from(shifted(first), first, silent)
    anchors.join()
    anchors.release()
    grown = candidates(a=True, new=True, head=True, frozen=False)
    given = shifted({name: grown[name] for name in ("a", "new")}, by=3.0) | {"frozen": grown["frozen"].detach().clone()}
    anchors.go_on(grown, given, reports.append)
    assert_states(anchors, "pretrained", ["new", "frozen"], ["a"])
    assert anchors.join() == ["new"]
    assert_same(anchors.joined, {"a": first["a"].detach() + 1, "new": given["new"]})
    assert_same(kept(anchors), {"frozen": None})
    assert reports == ["Not constrained, because `pretrained` lacks them: head."]


AGAIN = (
    r"A trainer that fits again goes on with the anchors it has\. Use a new Trainer: it takes the present weights for"
    r" anchors\.$"
)


@pytest.mark.parametrize(
    ("name", "found"),
    [("a", None), ("a", torch.zeros(5, 3)), ("c", torch.zeros(4))],
    ids=["gone", "other shape", "kept value of other shape"],
)
def test_go_on_with_changed_parameters_is_an_error_that_changes_nothing(name: str, found: Tensor | None) -> None:
    state, _ = saved()
    anchors = Anchors()
    anchors.load_state_dict(state)
    others = candidates(a=True, b=False, c=False)
    del others[name]
    if found is not None:
        others[name] = nn.Parameter(found, requires_grad=False)
    shown = "no such parameter" if found is None else rf"shape \({', '.join(map(str, found.shape))},?\)"
    message = rf"^{name!r} had shape \(2, 3\) in the fit before, found {shown} now\. "
    with pytest.raises(ValueError, match=message + AGAIN):
        anchors.go_on(others, None, silent)
    assert_same(anchors.state_dict(), state)
    assert anchors.parameters == {}


def test_go_on_without_one_that_waited_or_with_it_in_another_shape() -> None:
    """Nothing is known of it but its name."""
    anchors = released(candidates(a=True, b=False, c=False))
    others = candidates(a=True) | {"c": nn.Parameter(torch.zeros(7))}
    anchors.go_on(others, None, silent)
    assert anchors.join() == ["c"]
    assert_same(anchors.joined["c"], torch.zeros(7))


# --- where anchors are, and in which dtype


def test_anchors_take_dtype_and_memory_layout_of_their_parameters() -> None:
    weight = torch.rand(2, 3, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    anchors = Anchors()
    anchors.begin_from({"a": torch.rand(2, 3, 4, 4)}, {"a": nn.Parameter(weight)}, silent)
    anchors.join()
    (anchor,) = anchors.joined.values()
    assert anchor.dtype == torch.float64
    assert anchor.stride() == weight.stride()


def test_go_on_follows_a_module_that_was_converted() -> None:
    anchors = released(candidates(a=True))
    anchors.go_on({"a": nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))}, None, silent)
    assert_same(anchors.joined["a"], torch.arange(6.0, dtype=torch.float64).reshape(2, 3))


@pytest.mark.parametrize("place", ["device", "host"])
def test_place_of_the_anchors(place: Any) -> None:
    """On "meta" there is no memory at all: an anchor that is on the CPU was asked for there."""
    found: Candidates = {"a": nn.Parameter(torch.zeros(2, 3, device="meta"))}
    anchors = Anchors(place)
    anchors.begin_from({"a": torch.ones(2, 3)}, found, silent)
    anchors.join()
    assert anchors.joined["a"].device.type == ("meta" if place == "device" else "cpu")
    if place == "host":
        assert_same(anchors.joined["a"], torch.ones(2, 3))


# --- split over processes


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def test_parts_of_split_parameters_stay_in_the_hosts_memory(mesh: DeviceMesh) -> None:
    """The parameter's part is on a device, here meta; the processes talk on the mesh's, here the CPU."""
    value = torch.arange(6.0).reshape(2, 3)
    split = DTensor.from_local(torch.empty(2, 3, device="meta"), mesh, [Shard(0)], run_check=False)
    anchors = Anchors("host")
    anchors.begin_from({"a": value}, {"a": split}, silent)
    anchors.join(frozen=True)
    assert anchors.joined["a"].to_local().is_cpu  # type: ignore[attr-defined]
    assert_same(anchors.state_dict()["anchor"], {"a": value})
    tensors = Constrained({"a": split}, anchors.joined, "mars")
    assert tensors.rows(tensors.weights()).is_meta
    anchors.bring()
    assert anchors.joined["a"].to_local().is_meta  # type: ignore[attr-defined]


def test_parts_of_split_parameters_stay_in_a_file(mesh: DeviceMesh) -> None:
    split = DTensor.from_local(torch.zeros(2, 3), mesh, [Shard(0)], run_check=False)
    anchors = Anchors("file")
    anchors.begin_from({"a": torch.ones(2, 3)}, {"a": split}, silent)
    anchors.join(frozen=True)
    (anchor,) = anchors.joined.values()
    assert isinstance(anchor, DTensor)
    assert anchor.placements == split.placements
    assert anchor.to_local().is_meta
    assert anchors.state_dict({"a": "source"})["anchor"] == {"a": "source"}


def test_what_is_kept_away_from_the_mesh_comes_there_to_be_gathered(mesh: DeviceMesh) -> None:
    """Nothing can come from the device meta, so the attempt shows."""
    elsewhere = torch.empty_like(DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False), device="meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        full(elsewhere)
