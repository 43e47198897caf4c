"""Figures and the page: whole files, the same each time, that need nothing else and run nothing."""

import base64
import copy
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import lightning_lora as ll
from lightning_lora.analysis.grids import block_labels
from lightning_lora.analysis.html import CAPTIONS, report
from lightning_lora.analysis.plots import drawings, rendered
from tests.commands.files import adapted
from tests.helpers.families import FAMILIES
from tests.helpers.layers import randomise

EVIL = "<script>alert(1)</script>&\"'"


class Page(HTMLParser):
    """The tags and texts of a page, with every address in it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.addresses, self.texts = list[str](), list[str](), list[str]()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attributes)

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def both() -> ll.Analysis:
    torch.manual_seed(0)
    model = adapted(FAMILIES["llama"].make(), target_modules=["q_proj", "down_proj"], use_dora=True)
    ll.inject(model, ll.LoRAConfig(r=2, lora_alpha=5, target_modules=["q_proj"]), "other")
    randomise(model)
    return ll.analyze(model, weight_svd=8, compare="other")


def test_the_page_needs_nothing_and_runs_nothing(both, tmp_path):
    path = both.html(tmp_path / "new" / "report.html")
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert len(page.addresses) == page.tags.count("img") == len(drawings(both))
    for address in page.addresses:
        kind, data = address.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        root = ElementTree.fromstring(base64.b64decode(data))
        assert root.tag.endswith("svg")
        links = [value for node in root.iter() for key, value in node.attrib.items() if key.endswith("href")]
        assert all(link.startswith(("#", "data:")) for link in links)
    assert "url(" not in path.read_text().split("<style>")[1].split("</style>")[0]
    text = " ".join(page.texts)
    for name, layer in both.layers.items():
        assert name in page.texts
        assert f"{layer.norm:.4g}" in page.texts
        assert f"{layer.effective_rank:.2f}" in page.texts
    assert "Beside other" in text
    assert "Only default is on model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj." in text
    assert drawings(both).keys() == CAPTIONS.keys()
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_names_are_text_in_the_page():
    model = nn.ModuleDict({EVIL.replace(".", ""): nn.Linear(6, 5)})
    ll.inject(model, ll.LoRAConfig(r=2, target_modules="all-linear", modules_to_save=None))
    randomise(model)
    found = ll.analyze(model)
    page = Page()
    page.feed(report(ll.Analysis(EVIL, "default", "lora", found.layers, notes=(EVIL,))))
    assert "script" not in page.tags
    assert page.texts.count(EVIL) >= 3


def test_figures_are_whole_files_and_the_same_each_time(both, tmp_path):
    few = ll.Analysis("here", "default", "lora", dict(list(both.layers.items())[:1]))
    written = few.plot(tmp_path / "figures", ["svg", "png"])
    assert {path.suffix for path in written} == {".svg", ".png"}
    assert {path.stem for path in written} == set(drawings(few)) >= {"singular_values", "drift", "intruders"}
    for path in written:
        start = path.read_bytes()[:200]
        assert start.startswith(b"\x89PNG") if path.suffix == ".png" else b"<?xml" in start
    name = "singular_values"
    again = rendered(drawings(few)[name], "svg")
    assert again == (tmp_path / "figures" / f"{name}.svg").read_bytes()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {path.name for path in written}


@pytest.mark.parametrize("family", ["convnet", "t5"])
def test_models_without_blocks_and_with_many(family):
    made = FAMILIES[family]
    found = ll.analyze(adapted(made.make(), target_modules=made.target_modules))
    for name in ("singular_values", "effective_rank", "magnitude_direction"):
        assert rendered(drawings(found)[name], "png").startswith(b"\x89PNG")


def test_a_heatmap_shows_the_numbers(both):
    figure = drawings(both)["effective_rank"]()
    (axis, _) = figure.axes
    shown = axis.images[0].get_array()
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["self_attn.q_proj", "mlp.down_proj"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "1"]
    for layer in both.layers.values():
        value = shown[int(layer.block[-1]), labels.index(layer.module)]
        assert value == pytest.approx(layer.effective_rank)
    assert block_labels(["encoder.block.0", "decoder.block.0"]) == ["encoder.block.0", "decoder.block.0"]


def test_a_heatmap_of_one_value_has_one_colour():
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(2)))
    ll.inject(model, ll.LoRAConfig(r=1, target_modules=["0", "1"], modules_to_save=None))
    for layer in model:
        nn.init.normal_(layer.lora["default"].B)
    image = drawings(ll.analyze(model))["effective_rank"]().axes[0].images[0]
    colours = image.to_rgba(image.get_array()).reshape(-1, 4)  # 1, but for how it is rounded
    assert abs(colours - colours[0]).max() < 0.01


def test_an_untouched_adapter_has_figures_too(tmp_path):
    model = nn.Sequential(nn.Linear(6, 5))
    ll.inject(model, ll.LoRAConfig(r=2, target_modules=["0"], modules_to_save=None))
    other = copy.deepcopy(model)
    found = ll.analyze(model, compare=other)
    for draw in drawings(found).values():
        assert rendered(draw, "png")


def test_bad_places(both, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ll.ConfigError, match="2 problems"):
        both.plot(tmp_path / "file", ["jpeg"])
    with pytest.raises(
        ll.ConfigError, match=r"formats must be one of 'png', 'svg', 'pdf', got 'pgn'. Did you mean 'png'"
    ):
        both.plot(tmp_path, ["pgn"])
    with pytest.raises(ll.ConfigError, match="is a folder: give a file"):
        both.html(tmp_path)
    assert (tmp_path / "file").read_text() == "kept"


def test_without_matplotlib(both, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    for call in (lambda: both.plot(tmp_path), lambda: both.html(tmp_path / "a.html")):
        with pytest.raises(ll.UnsupportedError, match=r"pip install 'lightning-lora\[plots\]'"):
            call()
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_what_was_there(both, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr("os.fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        ll.Analysis("here", "default", "lora", dict(list(both.layers.items())[:1])).html(path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
