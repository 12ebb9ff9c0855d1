"""The default encoder of the DomainNet experiment, with random weights."""

import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

sys.path.append(str(Path(__file__).parents[1] / "examples" / "paper"))

from domainnet import load_encoder


@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
def test_embeddings_of_clip(file: str, tmp_path: Path) -> None:
    weights = timm.create_model("resnet50_clip", pretrained=False).state_dict()
    save_file(weights, tmp_path / file) if file.endswith("safetensors") else torch.save(weights, tmp_path / file)
    encoder = load_encoder("resnet50_clip.openai", tmp_path / file)
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())
    with torch.inference_mode():
        assert encoder.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 1024)
