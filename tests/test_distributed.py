"""Invariant 5, "Same everywhere": two processes follow one, and never differ from each other, under every strategy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_worker import (
    METHODS,
    RESUMED,
    RESUMED_ALIKE,
    RESUMED_METHODS,
    STEPS,
    STRATEGIES,
    cases,
    cases_of_four,
    pretrained_file,
    train,
)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the processes talk through gloo on Linux"),
    pytest.mark.xdist_group("distributed"),  # its processes are started once
]
ON_TWO = sorted(name for name in cases(Path()) if not name.endswith("half"))
ON_FOUR = sorted(name for name in cases_of_four(Path()) if not name.endswith("half"))
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    pretrained_file(folder)
    for method in RESUMED_METHODS:
        train("single", method, max_steps=STEPS // 2, save_to=folder / f"single-{method}.ckpt")
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[Results]:
    return launch(folder, 2)


@pytest.fixture(scope="module")
def mesh(folder: Path) -> list[Results]:
    return launch(folder, 4)


def launch(folder: Path, count: int) -> list[Results]:
    """The results of all ranks; a deadlock ends in a time-out, with what the processes had printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    root = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")]),
    }
    done = subprocess.run(
        [*command, str(root / "tests" / "distributed_worker.py"), str(folder)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [torch.load(folder / f"rank-{rank}-of-{count}.pt", weights_only=True) for rank in range(count)]


@pytest.fixture(scope="module")
def single() -> Any:
    """One process' run of the same method and data, computed once each."""
    runs: Results = {}

    def run(**options: Any) -> dict[str, Any]:
        key = repr(sorted(options.items()))
        if key not in runs:
            runs[key] = train("single", **options)
        return runs[key]

    return run


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for kind in ("weights", "anchor"):
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            torch.testing.assert_close(
                found[kind][name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )
    steps = len(found["learned"])  # a resumed run has seen the last ones only
    for learned, reference in zip(found["learned"], expected["learned"][-steps:], strict=True):
        assert learned == pytest.approx(reference, rel=1e-8, abs=1e-10, nan_ok=True)


@pytest.mark.parametrize("case", ON_TWO)
def test_same_everywhere_ranks_are_equal_to_the_bit(ranks: list[Results], case: str) -> None:
    first, second = (results[case] for results in ranks)
    for kind in ("weights", "anchor"):
        assert all(torch.equal(first[kind][name], second[kind][name]) for name in first[kind])
    assert repr(first["learned"]) == repr(second["learned"])  # repr: a radius that is not learned yet is not a number


@pytest.mark.parametrize("case", [name for name in ON_TWO if not name.endswith("resumed")])
def test_same_everywhere_two_processes_follow_one(ranks: list[Results], single: Any, case: str) -> None:
    """One process has the anchors in memory, also where the others read them from a file."""
    options = {name: value for name, value in cases(Path())[case].items() if name not in ("strategy", "file")}
    assert_same(ranks[0][case], single(**options))


@pytest.mark.parametrize("method", RESUMED_METHODS)
@pytest.mark.parametrize(("first", "second"), RESUMED)
def test_same_everywhere_checkpoints_are_portable(
    ranks: list[Results], folder: Path, single: Any, first: str, second: str, method: str
) -> None:
    if second == "single":
        resumed = train("single", method, resume_from=folder / f"{first}-{method}.ckpt")
    else:
        resumed = ranks[0][f"{first}-{second}-{method}-resumed"]
    assert len(resumed["learned"]) == STEPS // 2
    assert_same(resumed, single(method=method))


@pytest.mark.parametrize(("strategy", "kind"), RESUMED_ALIKE)
def test_same_everywhere_files_and_shards_resume(
    ranks: list[Results], folder: Path, single: Any, strategy: str, kind: str
) -> None:
    """Checkpoints that name the file of the anchors, and Lightning's default under `ModelParallelStrategy`."""
    resumed, saved = ranks[0][f"{strategy}-{kind}-resumed"], folder / f"{strategy}-{kind}.ckpt"
    assert saved.is_dir() == (kind == "shards")
    (state,) = torch.load(saved / "meta.pt" if saved.is_dir() else saved, weights_only=True)["callbacks"].values()
    assert {type(value) for value in state["anchor"].values()} == {str if kind == "file" else torch.Tensor}
    assert len(resumed["learned"]) == STEPS // 2
    assert_same(resumed, single(method="tpgm_mars"))


@pytest.mark.parametrize(("method", "sends"), {"tpgm_mars": 2, "tpgm_l2": 4, "ftp_mars": 0, "digrap": 0}.items())
def test_a_radius_update_under_ddp_sends_one_vector(ranks: list[Results], method: str, sends: int) -> None:
    """One all-reduce for each of the updates, in steps 1 and 5 of 6, and no barrier; a projection sends nothing."""
    for results in ranks:
        assert results[f"ddp-{method}"]["sent"] == ["all_reduce"] * sends


@pytest.mark.parametrize("case", [name for name in ON_TWO if name.endswith("file")])
def test_anchors_for_the_end_stay_in_their_file_until_then(ranks: list[Results], case: str) -> None:
    assert {results[case]["place"] for results in ranks} == {"device" if "tpgm_mars" in case else "file"}


def test_every_method_and_strategy_is_covered() -> None:
    assert {f"{strategy}-{method}" for strategy in STRATEGIES for method in METHODS} <= set(ON_TWO)


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_FOUR)
def test_same_everywhere_a_mesh_of_two_dimensions_follows_one_process(
    mesh: list[Results], single: Any, case: str
) -> None:
    """Tensor parallel, then FSDP2: tensors that are split twice; resumed runs, too; ranks are equal to the bit."""
    first, *others = (results[case] for results in mesh)
    for other in others:
        for kind in ("weights", "anchor"):
            assert all(torch.equal(first[kind][name], other[kind][name]) for name in first[kind])
        assert repr(first["learned"]) == repr(other["learned"])
    method = next(name for name in sorted(METHODS, key=len, reverse=True) if name in case)
    assert_same(first, single(method=method))
