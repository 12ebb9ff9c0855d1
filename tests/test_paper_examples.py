"""The paper's experiments, end to end on a few tiny images and tiny random weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "examples" / "paper"))
Image: Any = pytest.importorskip("PIL.Image", reason="the experiments read images by pillow, of the benchmark extra")

import common  # noqa: E402
import domainnet  # noqa: E402
import imagenet  # noqa: E402
from domains import Domain, folder_domain, list_domain, read_names, split, train_classes  # noqa: E402
from images import Images, View, middle_box, random_box  # noqa: E402

CLASSES = ("apple", "bus", "cat")
WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361", *(f"n0200000{i}" for i in range(8)))  # 12: "10" < "2"
TINY = ("--size", "8", "--epochs", "1", "--batch-size", "8", "--radius-batch-size", "4", "--workers", "0")


def tiny_encoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def draw(path: Path, label: int, index: int = 0) -> None:
    """A small image, of a colour that belongs to the label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = np.random.default_rng(label).integers(0, 200, 3)
    noise = np.random.default_rng(100 * label + index).integers(0, 56, (12, 10 + index % 5, 3))
    Image.fromarray((colour + noise).astype(np.uint8)).save(path)


def make_list(root: Path, domain: str, part: str, count: int, classes: Sequence[str] = CLASSES) -> None:
    """Draws ``count`` images of each class, and writes the list file."""
    lines = []
    for label, name in enumerate(classes):
        for i in range(count):
            path = f"{domain}/{name}/{domain}_{label + 1:03d}_{part}{i}.jpg"
            draw(root / path, label, i)
            lines.append(f"{path} {label}")
    (root / f"{domain}_{part}.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def domains(tmp_path: Path) -> Path:
    """DomainNet's layout, and a state dict."""
    root = tmp_path / "domainnet"
    make_list(root, "real", "train", 10)
    for domain in ("real", *domainnet.SHIFTED):
        make_list(root, domain, "test", 2)
    torch.manual_seed(0)
    torch.save(tiny_encoder().state_dict(), root / "encoder.pt")
    return root


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """ImageNet's layout, with names of the classes."""
    root = tmp_path / "imagenet"
    for folder, names in {
        "train": WNIDS,
        "val": WNIDS,
        "imagenetv2-matched-frequency-format-val": [str(label) for label in range(len(WNIDS))],
        "imagenet-a": WNIDS[1:4],
        "imagenet-r": WNIDS[2:9],
        "sketch": WNIDS,
    }.items():
        for label, name in enumerate(names):
            for i in range(2 if folder == "train" else 1):
                draw(root / folder / name / f"{name}_{i}.JPEG", label, i)
    (root / "names.json").write_text(json.dumps({wnid: f"thing {i}" for i, wnid in enumerate(WNIDS)}))
    return root


def rows(path: Path) -> list[list[str]]:
    """The cells of the Markdown table in a file."""
    return [line.strip("| ").split(" | ") for line in path.read_text().splitlines() if line.startswith("|")]


def save_tiny_clip(folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="of the benchmark and compat extras")
    tokenizers = pytest.importorskip("tokenizers", reason="comes with transformers")
    words = ["<start>", "<end>", "a", "photo", "of", "thing", "one", ".", *map(str, range(len(WNIDS))), "<unknown>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 0), ("<end>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<end>", eos_token="<end>", bos_token="<start>", unk_token="<unknown>"
    ).save_pretrained(folder)
    shared = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(words), "max_position_embeddings": 20, "bos_token_id": 0, "eos_token_id": 1}
    torch.manual_seed(0)
    config = transformers.CLIPConfig(
        text_config={**shared, **text, "pad_token_id": 1},
        vision_config={**shared, "image_size": 8, "patch_size": 4},
        projection_dim=6,
    )
    transformers.CLIPModel(config).save_pretrained(folder)


def recorded(monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str) -> list[tuple[tuple[Any, ...], Any]]:
    """The calls of a script's function: arguments and what it returned."""
    calls: list[tuple[tuple[Any, ...], Any]] = []
    function = getattr(module, name)

    def record(*args: Any, **options: Any) -> Any:
        result = function(*args, **options)
        calls.append((args, result))
        return result

    monkeypatch.setattr(module, name, record)
    return calls


@pytest.mark.filterwarnings("ignore")
def test_domainnet(domains: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fits with the authors' settings; the table is printed, and a second run trains no more."""
    fits = recorded(monkeypatch, domainnet, "fine_tune")
    command = [str(domains), str(domains / "encoder.pt"), "--encoder", f"{__name__}:tiny_encoder", *TINY]
    command += ["--output", str(domains / "made"), "--epochs", "5", "--lr", "0.1"]
    domainnet.main(command)
    table = rows(domains / "made" / "domainnet" / "table.md")
    assert table[0] == ["domain", "plain", "TPGM", "plain (authors)", "TPGM (authors)"]
    assert [row[0] for row in table[2:]] == ["real", *domainnet.SHIFTED, "mean of sketch, painting, infograph, clipart"]
    assert all(float(row[1]) > 50 for row in table[2:]), "three colours are easily told apart"
    assert table[-1][3:] == ["33.17", "39.02"]
    assert "| real |" in capsys.readouterr().out

    (plain, _), (constrained, _) = fits
    assert plain[-1] == []
    (tpgm,) = constrained[-1]
    assert set(tpgm.radii) == {"encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias"}
    assert (tpgm.norm, tpgm.radius_lr, tpgm.radius_steps, tpgm.every_n_steps) == ("mars", 1e-2, 1, 1)
    used = {*plain[3].dataset.paths}
    for held_out in (plain[4].dataset, tpgm.dataloader.dataset):
        assert len(held_out) == 3
        assert not held_out.augment
        assert used.isdisjoint(held_out.paths)

    last = domains / "made" / "domainnet" / "TPGM" / "last.ckpt"
    before = last.stat().st_mtime_ns
    domainnet.main(command)
    assert last.stat().st_mtime_ns == before
    assert rows(domains / "made" / "domainnet" / "table.md") == table


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_imagenet(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain fine-tuning, WiSE-FT and TPGM after the fact, all on five domains; a second run does not train."""
    save_tiny_clip(folders / "clip")
    projected = recorded(monkeypatch, imagenet, "project_checkpoint")
    command = [str(folders), str(folders / "clip"), str(folders / "names.json"), *TINY]
    command += [
        "--output",
        str(folders / "made"),
        "--radius-steps",
        "3",
        "--lr",
        "0.02",
        "--warmup",
        "2",
        "--epochs",
        "6",
    ]
    imagenet.main(command)
    made = folders / "made" / "imagenet"
    table = rows(made / "table.md")
    methods = ["zero-shot", "plain", "WiSE-FT 0.5", "TPGM"]
    assert table[0] == ["domain", *methods, *(f"{method} (authors)" for method in methods)]
    assert [row[0] for row in table[2:]] == [*imagenet.FOLDERS, "mean of ImageNet, V2, A, R, Sketch"]
    zero_shot, plain_accuracy, *_ = map(float, table[2][1:])
    assert plain_accuracy > zero_shot + 10
    assert table[-1][5:] == ["60.26", "63.58", "68.97", "69.27"]

    (_, callback), (plain, result) = (
        projected[0],
        (
            torch.load(made / "plain" / "best.ckpt", weights_only=True)["state_dict"],
            torch.load(made / "projected.ckpt", weights_only=True)["state_dict"],
        ),
    )
    assert callback.norm == "l2"
    assert "head.weight" in callback.radii  # the authors constrain all of CLIP
    assert plain.keys() == result.keys()
    assert any(not torch.equal(plain[name], result[name]) for name in plain)

    before = (made / "plain" / "last.ckpt").stat().st_mtime_ns
    imagenet.main(command)
    assert (made / "plain" / "last.ckpt").stat().st_mtime_ns == before
    assert rows(made / "table.md") == table


@pytest.mark.filterwarnings("ignore")
def test_an_interrupted_fit_goes_on(domains: Path) -> None:
    """The rate has fallen as often as in a fit without interruption."""
    command = [str(domains), str(domains / "encoder.pt"), "--encoder", f"{__name__}:tiny_encoder", *TINY]
    command += ["--output", str(domains / "made"), "--epochs", "3"]
    starts = domainnet.DomainNetClassifier.on_train_epoch_start

    def stop(self: domainnet.DomainNetClassifier) -> None:
        if self.current_epoch == 2:
            raise RuntimeError("out of time")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(domainnet.DomainNetClassifier, "on_train_epoch_start", stop)
        with pytest.raises(RuntimeError, match="out of time"):
            domainnet.main(command)
    assert domainnet.DomainNetClassifier.on_train_epoch_start is starts
    last = domains / "made" / "domainnet" / "plain" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2 * 3
    domainnet.main(command)
    resumed = torch.load(last, weights_only=True)
    uninterrupted = torch.load(last.parents[1] / "TPGM" / "last.ckpt", weights_only=True)
    for checkpoint in (resumed, uninterrupted):
        assert checkpoint["global_step"] == 3 * 3
        assert checkpoint["lr_schedulers"][0]["last_epoch"] == 3


@pytest.mark.parametrize("file", ["weights.pt", "weights.safetensors"])
def test_an_encoder_of_ones_own_lies_where_the_command_is_started(file: str, tmp_path: Path) -> None:
    """Python looks in the folder of the script. Either kind of file is read."""
    (tmp_path / "my_encoders.py").write_text("from torch import nn\n\n\ndef tiny():\n    return nn.Linear(2, 1)\n")
    weights = {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}
    save_file(weights, tmp_path / file) if file.endswith("safetensors") else torch.save(weights, tmp_path / file)
    code = f"""
import sys
sys.path[0] = {domainnet.__file__.rpartition("domainnet")[0]!r}
from pathlib import Path
from domainnet import load_encoder
print(load_encoder("my_encoders:tiny", Path({file!r})).weight.tolist())
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "[[1.0, 1.0]]\n", done.stderr


def test_a_tenth_is_held_out() -> None:
    """At random, the same each time."""
    items = [(Path(f"{i}.jpg"), i) for i in range(40)]
    train, held_out = split(items, 0)
    assert (len(held_out), sorted(train + held_out)) == (4, sorted(items))
    assert split(items, 0) == (train, held_out)
    assert split(items, 1)[1] != held_out != items[:4]


def test_domains_of_imagenet(folders: Path) -> None:
    """V2's folders are numbers and sorted as such; A and R have a part of the classes."""
    v2, a, r, sketch = (
        folder_domain(folders, name, imagenet.FOLDERS[name], WNIDS, part=name in {"A", "R"})
        for name in ("V2", "A", "R", "Sketch")
    )
    assert all(int(path.parent.name) == label for path, label in v2.items)
    assert (v2.classes, sketch.classes) == (None, None)
    assert a.classes == (1, 2, 3)
    assert r.classes == tuple(range(2, 9))
    assert all(WNIDS[label] == path.parent.name for path, label in r.items)


def test_answers_are_restricted_to_the_classes_of_the_domain() -> None:
    logits = torch.tensor([[9.0, 1.0, 2.0, 3.0], [0.0, 9.0, 5.0, 4.0]])
    assert common.only(logits, (1, 2)).argmax(dim=1).tolist() == [2, 1]
    model = common.Classifier(nn.Identity(), nn.Linear(4, 4, bias=False), "abcd")
    nn.init.eye_(model.head.weight)
    logged: dict[str, Tensor] = {}
    model.log = lambda name, value, **options: logged.update({name: value})
    model.domains = [Domain("all", []), Domain("part", [], (1, 2))]
    for index in (0, 1):
        model.test_step((logits, torch.tensor([2, 1])), 0, index)
    assert {name: float(value) for name, value in logged.items()} == {"all": 0.5, "part": 1.0}


def test_zero_shot_head_belongs_to_the_classes(tmp_path: Path) -> None:
    """A row is the scaled mean embedding of a class's sentences, of CLIP's own reckoning."""
    save_tiny_clip(tmp_path)
    from transformers import AutoTokenizer, CLIPModel

    clip, tokenizer = CLIPModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    names = ["thing 3", "thing 7", "one"]
    head = imagenet.zero_shot_head(clip, tokenizer, names, ["a photo of {}."])
    images = torch.randn(2, 3, 8, 8)
    tokens = tokenizer([f"a photo of {name}." for name in names], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = clip(pixel_values=images, **tokens).logits_per_image
        torch.testing.assert_close(head(imagenet.ClipImages(clip)(images)), expected)


def test_another_order_of_classes_is_found(domains: Path, folders: Path) -> None:
    make_list(domains, "sketch", "test", 1, classes=("apple", "cat", "bus"))
    with pytest.raises(SystemExit, match=r"sketch_test.txt has 'cat' as class 1, real_train.txt has 'bus'"):
        list_domain(domains, "sketch", CLASSES)
    with pytest.raises(SystemExit, match=r"real_train.txt has labels up to 2, and no image with label 1"):
        train_classes([(Path("apple/0.jpg"), 0), (Path("cat/0.jpg"), 2)])
    (folders / "names.txt").write_text("".join(f"{wnid} thing\n" for wnid in WNIDS[1:]) + "n99999999 other thing\n")
    with pytest.raises(SystemExit, match=f"names.txt has '{WNIDS[1]}' as class 0, .* have '{WNIDS[0]}'"):
        read_names(folders / "names.txt", WNIDS)
    with pytest.raises(SystemExit, match=f"imagenet-r lacks folders that train has, for instance {WNIDS[0]}"):
        folder_domain(folders, "R", "imagenet-r", WNIDS)
    draw(folders / "sketch" / "n99999999" / "0.JPEG", 0)
    with pytest.raises(SystemExit, match=r"sketch has folders that train has not, for instance n99999999"):
        folder_domain(folders, "Sketch", "sketch", WNIDS)
    model = common.Classifier(nn.Identity(), nn.Linear(1, 3), CLASSES)
    with pytest.raises(SystemExit, match="the checkpoint has 'cat' as class 1, the training images have 'bus'"):
        model.on_load_checkpoint({"classes": ["apple", "cat", "bus"]})


def test_other_files_in_a_folder_of_a_class_are_no_images(tmp_path: Path) -> None:
    for name, files in {"a": ("1.JPEG", ".DS_Store", "._1.JPEG", "list.txt", "2.webp"), "b": ("1.png",)}.items():
        (tmp_path / "train" / name).mkdir(parents=True)
        for file in files:
            (tmp_path / "train" / name / file).touch()
    found = folder_domain(tmp_path, "train", "train", ["a", "b"])
    assert [(path.name, label) for path, label in found.items] == [("1.JPEG", 0), ("2.webp", 0), ("1.png", 1)]
    (tmp_path / "train" / "b" / "1.png").unlink()
    with pytest.raises(SystemExit, match=r"train/b has no images"):
        folder_domain(tmp_path, "train", "train", ["a", "b"])


def test_names_come_from_lines_or_json(folders: Path) -> None:
    (folders / "names.txt").write_text("".join(f"{wnid} thing {i}\n" for i, wnid in enumerate(WNIDS)))
    expected = [f"thing {i}" for i in range(len(WNIDS))]
    assert read_names(folders / "names.txt", WNIDS) == expected
    assert read_names(folders / "names.json", WNIDS) == expected


@pytest.mark.parametrize(
    ("call", "missing", "layout"),
    [
        (lambda root: domainnet.main([str(root), "weights.pt"]), "real_train.txt", "real_test.txt sketch_test.txt"),
        (lambda root: imagenet.main([str(root), "clip", "names"]), "train", "train/n01440764/"),
    ],
)
def test_a_missing_folder_names_the_layout(call: Any, missing: str, layout: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as error:
        call(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / missing} is missing. Expected is this layout:\nDATA/\n")
    assert layout in str(error.value)


def test_views(tmp_path: Path) -> None:
    """The middle square, normalised; a random part of the image, another each time."""
    draw(tmp_path / "image.png", 0)
    view = View(8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    assert middle_box(512, 256) == (144, 16, 368, 240)
    image, label = Images([(tmp_path / "image.png", 3)], view)[0]
    assert (tuple(image.shape), label) == ((3, 8, 8), 3)
    assert -2 <= float(image.min()) < float(image.max()) <= 2
    augmented = Images([(tmp_path / "image.png", 3)], view, augment=True)
    assert not torch.equal(augmented[0][0], augmented[0][0])
    for _ in range(200):
        left, top, right, bottom = random_box(30, 20)
        assert 0 <= left < right <= 30
        assert 0 <= top < bottom <= 20


def test_readme_has_the_figures_that_the_scripts_print() -> None:
    readme = Path(common.__file__).with_name("README.md").read_text()
    for authors, averaged in ((domainnet.AUTHORS, domainnet.SHIFTED), (imagenet.AUTHORS, imagenet.FOLDERS)):
        for method, figures in authors.items():
            values = [*figures.values(), mean(figures[domain] for domain in averaged)]
            assert f"| {method} | {' | '.join(f'{value:.2f}' for value in values)} |" in readme


@pytest.mark.parametrize(
    ("script", "defaults"),
    [
        (domainnet, {"epochs": 50, "batch_size": 256, "lr": 1e-3, "tpgm_lr": 1e-2, "radius_lr": 1e-2}),
        (imagenet, {"batch_size": 512, "radius_steps": 200, "radius_lr": 1e-2, "radius_batch_size": 64}),
    ],
)
def test_defaults_are_those_of_the_authors(script: ModuleType, defaults: dict[str, float]) -> None:
    arguments = vars(script.parse(["a", "b", "c"][: 2 if script is domainnet else 3]))
    assert {name: arguments[name] for name in defaults} == defaults
