"""`compile=True` follows the ordinary path; where torch.compile does not work, a warning says so."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_tpgm.layout
from lightning_tpgm import FTPCallback, TPGMCallback
from lightning_tpgm.blocks import fused_blocks
from lightning_tpgm.callbacks.radii import WithRadii
from properties import assert_inside_balls, assert_same
from toys import Blobs, Classifier, seed_everything, trainer_in, weights_of

METHODS: dict[str, Callable[..., WithRadii]] = {
    "tpgm mars": TPGMCallback,
    "tpgm l2": partial(TPGMCallback, norm="l2", radius_steps=2),
    "ftp": FTPCallback,
}


@pytest.fixture(autouse=True)
def compiled_anew() -> Iterator[None]:
    fused_blocks.cache_clear()
    yield
    fused_blocks.cache_clear()


def run(tmp_path: Path, callback: WithRadii) -> dict[str, torch.Tensor]:
    seed_everything(0)
    module = Classifier()
    trainer_in(tmp_path, callbacks=[callback], max_epochs=2).fit(module, Blobs())
    assert_inside_balls(module, callback.anchor, callback.radii, callback.norm)
    return weights_of(module)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("method", METHODS)
def test_compiled_work_follows_the_ordinary_path(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_tpgm.layout, "SHARED", 12)  # matrices that are views, and shared ones
    monkeypatch.setattr(lightning_tpgm.layout, "LARGE_BLOCK", 10)
    compiled, plain = METHODS[method](compile=True), METHODS[method]()
    found, expected = run(tmp_path, compiled), run(tmp_path, plain)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert compiled.radii == pytest.approx(plain.radii, rel=1e-5, abs=1e-7)
    assert compiled.compile  # it was not given up
    assert pickle.loads(pickle.dumps(compiled)).radii == compiled.radii  # as for another fit in started processes


def test_clear_failure_where_nothing_can_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no C++ compiler\nwith a long story")

    monkeypatch.setattr(torch, "compile", no_compiler)
    callback = TPGMCallback(compile=True)
    with pytest.warns(UserWarning, match="has no effect.*RuntimeError: no C\\+\\+ compiler$") as warned:
        found = run(tmp_path, callback)
    assert sum("compile" in str(warning.message) for warning in warned) == 1
    assert_same(found, run(tmp_path, TPGMCallback()))
