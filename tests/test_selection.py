"""Which parameters are constrained: by name pattern, once each, and only tensors that a distance makes sense for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_tpgm.selection import clean_name, constrainable


def net() -> nn.Sequential:
    """Parameters 0.weight, 0.bias, 1.weight, 1.bias."""
    return nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))


def test_all_parameters_by_name_in_order() -> None:
    module = net()
    assert constrainable(module) == dict(module.named_parameters())
    assert list(constrainable(module)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["1.*"], ["0.weight", "0.bias"]),
        (["*.bias"], ["0.weight", "1.weight"]),
        (["0.weight", "1.weight"], ["0.bias", "1.bias"]),
        (["?.b*"], ["0.weight", "1.weight"]),
        (["[!0].*"], ["0.weight", "0.bias"]),
        (["*"], []),
    ],
)
def test_exclude_is_fnmatch_over_the_whole_name(patterns: list[str], left: list[str]) -> None:
    assert list(constrainable(net(), patterns)) == left


def test_exclude_needs_the_whole_name() -> None:
    """The trap: a name without its prefix must not pass silently for one that is there."""
    wrapped = nn.ModuleDict({"model": nn.ModuleDict({"body": nn.Linear(2, 2), "head": nn.Linear(2, 2)})})
    with pytest.raises(ValueError, match=r"'head\.\*' matches no parameter.*'model\.head\.weight'"):
        constrainable(wrapped, ["head.*"])
    assert list(constrainable(wrapped, ["*head.*"])) == ["model.body.weight", "model.body.bias"]


def test_exclude_is_case_sensitive() -> None:
    with pytest.raises(ValueError, match="matches no parameter"):
        constrainable(nn.ModuleDict({"head": nn.Linear(2, 2)}), ["HEAD.*"])


@pytest.mark.parametrize(
    ("pattern", "closest"),
    [
        ("haed.weight", "'head.weight'"),
        ("head.weigth", "'head.weight'"),
        ("model.head.*", "'head.bias', 'head.weight'"),
        ("encoder", "'body.encoder.weight', 'body.encoder.bias'"),
        ("zzz", "'body.encoder.weight', 'body.encoder.bias', 'head.weight', 'head.bias'"),
    ],
)
def test_pattern_without_match_lists_the_closest_names(pattern: str, closest: str) -> None:
    module = nn.ModuleDict({"body": nn.ModuleDict({"encoder": nn.Linear(2, 2)}), "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="`exclude` pattern") as error:
        constrainable(module, ["head.*", pattern])
    assert repr(pattern) in str(error.value)
    assert f"The closest names are {closest}" in str(error.value)


def test_frozen_parameters_are_included() -> None:
    module = net()
    module[0].requires_grad_(False)
    assert list(constrainable(module)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(3, 2, bias=False)
        self.body = nn.Linear(2, 2)
        self.decoder = nn.Linear(3, 2)
        self.decoder.weight = self.embedding.weight


def test_tied_parameters_count_once_under_their_first_name() -> None:
    module = Tied()
    selected = constrainable(module)
    assert list(selected) == ["embedding.weight", "body.weight", "body.bias", "decoder.bias"]
    assert selected["embedding.weight"] is module.decoder.weight


@pytest.mark.parametrize("pattern", ["embedding.*", "decoder.*"])
def test_any_name_of_a_tied_parameter_excludes_it(pattern: str) -> None:
    assert "embedding.weight" not in constrainable(Tied(), [pattern])


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own import
def test_compiled_names() -> None:
    module = nn.ModuleDict({"model": torch.compile(net())})
    assert next(iter(module.state_dict())) == "model._orig_mod.0.weight"
    assert list(constrainable(module)) == ["model.0.weight", "model.0.bias", "model.1.weight", "model.1.bias"]
    assert list(constrainable(module, ["model.1.*"])) == ["model.0.weight", "model.0.bias"]
    assert list(constrainable(module, ["model._orig_mod.1.*"])) == ["model.0.weight", "model.0.bias"]
    assert list(constrainable(torch.compile(net()))) == ["0.weight", "0.bias", "1.weight", "1.bias"]


@pytest.mark.parametrize(
    ("name", "clean"),
    [
        ("_orig_mod.conv.weight", "conv.weight"),
        ("model._orig_mod.net._orig_mod.conv.weight", "model.net.conv.weight"),
        ("my_orig_mod.weight", "my_orig_mod.weight"),
        ("_orig_mod_2.weight", "_orig_mod_2.weight"),
    ],
)
def test_clean_name_takes_away_whole_parts_only(name: str, clean: str) -> None:
    assert clean_name(name) == clean


def test_integer_complex_and_empty_parameters_are_left_alone() -> None:
    module = nn.ParameterDict(
        {
            "integer": nn.Parameter(torch.tensor([1, 2]), requires_grad=False),
            "boolean": nn.Parameter(torch.tensor([True]), requires_grad=False),
            "complex": nn.Parameter(torch.zeros(2, dtype=torch.complex64)),
            "empty": nn.Parameter(torch.empty(0, 3)),
            "small": nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)),
            "scalar": nn.Parameter(torch.zeros((), dtype=torch.float64)),
        }
    )
    assert set(constrainable(module)) == {"small", "scalar"}
    assert set(constrainable(module, ["integer"])) == {"small", "scalar"}  # a pattern may name them


def test_lazy_parameter_is_an_error_that_says_what_to_do() -> None:
    module = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 1))
    message = r"Parameter '0\.weight' has no shape yet\. Run one batch .* before the fit, or name it in `exclude`\."
    with pytest.raises(ValueError, match=message):
        constrainable(module)
    assert list(constrainable(module, ["0.*"])) == ["1.weight", "1.bias"]
    module(torch.zeros(1, 3))
    assert list(constrainable(module)) == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_module_without_parameters() -> None:
    assert constrainable(nn.Tanh()) == {}
    with pytest.raises(ValueError, match=r"`exclude` pattern 'head\.\*' matches no parameter\. The module has none\."):
        constrainable(nn.Tanh(), ["head.*"])


def test_pattern_without_match_says_where_many_names_begin() -> None:
    module = nn.ModuleDict(
        {"backbone": nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))), "classifier": nn.Linear(2, 2)}
    )
    with pytest.raises(
        ValueError, match=r"'zzz' matches no parameter\. Names begin with backbone \(8\), classifier \(2\)\. Patterns"
    ):
        constrainable(module, ["zzz"])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_where_all_names_begin_alike_it_says_how_they_go_on(depth: int) -> None:
    layers = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)))
    module: nn.Module = nn.ModuleDict({"backbone": layers, "classifier": nn.Linear(2, 2)})
    for _ in range(depth):
        module = nn.ModuleDict({"model": module})
    start = r"model\." * depth
    with pytest.raises(ValueError, match=rf"begin with {start}backbone \(8\), {start}classifier \(2\)\. Patterns "):
        constrainable(module, ["zzz"])


def test_where_names_never_branch_all_are_said() -> None:
    module = nn.ModuleDict({"model": nn.ParameterDict({f"w{i}": nn.Parameter(torch.ones(1)) for i in range(6)})})
    with pytest.raises(ValueError, match=r"begin with model\.w0 \(1\), .* model\.w5 \(1\)\. Patterns are compared"):
        constrainable(module, ["zzz"])
