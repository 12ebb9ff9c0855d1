"""Faults that only unusual ways of training show."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_tpgm import TPGMCallback
from toys import Blobs, Classifier, blobs, trainer_in


class Named(NamedTuple):
    x: Tensor
    y: Tensor


# --- batches that are views of their data ---

BATCHES: dict[str, Any] = {
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "dict": lambda x, y: {"x": x, "y": y},
    "named": Named,
    "nested": lambda x, y: [{"x": (x,)}, y],
}


@pytest.mark.parametrize("kind", BATCHES)
def test_a_step_that_writes_to_its_batch_leaves_the_held_out_data_alone(kind: str, tmp_path: Path) -> None:
    x, y = blobs(16, seed=2)[:]
    before, written = x.clone(), []

    class Writes(Classifier):
        def loss(self, batch: Any) -> Tensor:
            x, y = tree_leaves(batch)
            x.add_(torch.randn_like(x)).requires_grad_()
            written.append(self.training)
            return super().loss((x, y))

    held_out = [BATCHES[kind](x[:8], y[:8]), BATCHES[kind](x[8:], y[8:])]
    callback = TPGMCallback(held_out, every_n_steps=1)
    trainer_in(tmp_path, callbacks=callback, max_epochs=1, limit_val_batches=0).fit(Writes(), Blobs())
    assert written == [True, False] * 4
    assert torch.equal(x, before)
    assert not any(part.requires_grad for part in tree_leaves(held_out))
