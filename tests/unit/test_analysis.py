"""The analyses' arithmetic on a model small enough to check by other means."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GPT2Config, GPT2ForSequenceClassification

from rose_ds.analysis import landscape, load, pictures
from rose_ds.analysis.directions import blend, filter_normalised, move, restored, weights_of
from rose_ds.analysis.disagreement import disagreement
from rose_ds.analysis.flatness import largest_eigenvalues, low_area, sharpness
from rose_ds.analysis.inspect_page import _modules
from rose_ds.analysis.interpolation import Line, same_architecture, walk
from rose_ds.analysis.landscape import Plane, gathered, surface
from rose_ds.analysis.load import loss_and_accuracy, same_data
from rose_ds.analysis.movable import WholeModel
from rose_ds.cli import interpolate
from rose_ds.data import TaskSpec
from rose_ds.experiments import models
from rose_ds.experiments.resumable import records_of
from rose_ds.experiments.settings import RunSettings

pytestmark = pytest.mark.fast


class Tiny(nn.Module):
    """Features to three classes, with a norm, biases and dropout."""

    def __init__(self, seed: int = 0, width: int = 6, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.head = nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(logits=self.head(self.dropout(torch.tanh(self.norm(self.first(x))))))


@pytest.fixture
def model() -> Tiny:
    return Tiny().eval()


def batches(*sizes: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": torch.randn(n, 4, generator=generator), "labels": torch.randint(3, (n,), generator=generator)}
        for n in sizes
    ]


def test_filters_are_as_long_as_the_weights(model: Tiny) -> None:
    direction = filter_normalised(model, seed=3)
    for name, p in model.named_parameters():
        if p.dim() < 2:
            assert not direction[name].any()
        else:
            torch.testing.assert_close(direction[name].norm(dim=1), p.norm(dim=1))
    again, other = filter_normalised(model, 3), filter_normalised(model, 4)
    assert all(torch.equal(direction[name], again[name]) for name in direction)
    assert not torch.equal(direction["head.weight"], other["head.weight"])
    scaled = Tiny()
    with torch.no_grad():
        scaled.first.weight.mul_(2)
    torch.testing.assert_close(filter_normalised(scaled, 3)["first.weight"], 2 * direction["first.weight"])


def test_a_filter_of_gpt2_is_a_column() -> None:
    """Its matrices are (inputs, outputs)."""
    config = GPT2Config(vocab_size=10, n_positions=8, n_embd=8, n_layer=1, n_head=2, num_labels=2)
    network = GPT2ForSequenceClassification(config)
    direction, weights = filter_normalised(network, 3), weights_of(network)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert weights[name].shape == (8, 32)
    torch.testing.assert_close(direction[name].norm(dim=0), weights[name].norm(dim=0))
    torch.testing.assert_close(direction["score.weight"].norm(dim=1), weights["score.weight"].norm(dim=1))


def test_weights_are_restored_to_the_bit(model: Tiny) -> None:
    before = weights_of(model)
    with pytest.raises(KeyError), restored(model) as start:
        move(model, start, [(0.3, filter_normalised(model, 0))])
        assert not torch.equal(model.first.weight, before["first.weight"])
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_loss_and_accuracy_are_over_rows(model: Tiny) -> None:
    parts = batches(5, 2)
    x, labels = (torch.cat([part[name] for part in parts]) for name in ("x", "labels"))
    loss, accuracy = loss_and_accuracy(model, parts)
    logits = model(x).logits
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert accuracy == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


def test_landscape(model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """f(0, 0) is the model's loss, every point Eq. 6's; ranks and a kill change nothing."""
    parts, plane = batches(8), Plane(points=5, radius=0.5)
    steps = plane.steps()
    assert steps == [-0.5, -0.25, 0.0, 0.25, 0.5]
    subject = {"name": "tiny"}
    alone = [tmp_path / "alone.jsonl"]
    surface(WholeModel(model), parts, plane, alone, subject)
    found = gathered(alone, 5)
    assert found["loss"][2][2] == loss_and_accuracy(model, parts)[0]
    copy = Tiny()
    one, other = filter_normalised(model, 0), filter_normalised(model, 1)
    with torch.no_grad():
        for name, p in copy.named_parameters():
            p.copy_(weights_of(model)[name] + steps[4] * one[name] + steps[1] * other[name])
    assert found["loss"][4][1] == pytest.approx(loss_and_accuracy(copy.eval(), parts)[0], rel=1e-6)

    two = [tmp_path / f"{rank}.jsonl" for rank in range(2)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        surface(WholeModel(model), parts, plane, two, subject)
    lines = two[0].read_text().splitlines(keepends=True)
    two[0].write_text("".join(lines[:-1]))  # the first rank was killed
    with pytest.raises(ValueError, match="1 of 25 points are missing"):
        gathered(two, 5)
    two[0].write_text("".join(lines)[:-9])  # in the middle of a line
    monkeypatch.setenv("RANK", "0")
    bars: list[tqdm[Any]] = []
    monkeypatch.setattr(landscape, "tqdm", lambda *a, **kw: bars.append(tqdm(*a, **kw)) or bars[-1])
    surface(WholeModel(model), parts, plane, two, subject)
    assert gathered(two, 5) == found
    assert bars[0].n == bars[0].total == 13  # with what was there already, and once
    with pytest.raises(ValueError, match="of other settings"):
        surface(WholeModel(model), parts, Plane(points=7), two, subject)
    for wrong in ({"points": 4}, {"points": 1}, {"radius": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            Plane(**wrong)  # type: ignore[arg-type]


def test_interpolation_ends_are_the_models(model: Tiny, tmp_path: Path) -> None:
    other = Tiny(seed=5).eval()
    sets = {"clean": batches(9), "hard": batches(4)}
    line, log = Line(points=5, first=-0.5, last=1.5), [tmp_path / "log.jsonl"]
    before = weights_of(model)
    walk(WholeModel(model), weights_of(other), sets, line, log, {"task": "tiny"})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    points = {record["a"]: record for record in records_of(log)}
    assert sorted(points) == [-0.5, 0.0, 0.5, 1.0, 1.5]
    for at, end in ((0.0, model), (1.0, other)):
        for name, parts in sets.items():
            loss, accuracy = loss_and_accuracy(end, parts)
            assert (points[at][f"{name}_loss"], points[at][f"{name}_accuracy"]) == (loss, accuracy)
    with restored(model):
        blend(model, before, weights_of(other), 0.5)
        assert points[0.5]["clean_loss"] == loss_and_accuracy(model, sets["clean"])[0]
        torch.testing.assert_close(model.head.bias, (before["head.bias"] + other.head.bias) / 2)
    with pytest.raises(ValueError, match=r"'first\.bias': \(6,\) and \(7,\)"):
        same_architecture(model, Tiny(width=7))
    with pytest.raises(ValueError, match="first=1.0 must be below last=0.0"):
        Line(first=1.0, last=0.0)


def test_both_models_are_on_the_line_by_default() -> None:
    line = Line()
    amounts = line.amounts()
    assert (amounts[0], amounts[1], amounts[-1]) == (-0.5, -0.45, 1.5)
    for points in (line.points, 9, 17):  # as the documentation says
        assert {0.0, 1.0} <= set(Line(points=points).amounts())


def test_what_interpolate_prints(
    model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The two models where both are points, and the line's ends where one is not."""
    parts, label_names = batches(9), ("a", "b", "c")

    def opened(name: str, *_: Any, **__: Any) -> Any:
        return SimpleNamespace(
            name=name,
            model=model if name == "one" else Tiny(seed=5).eval(),
            data=SimpleNamespace(spec=TaskSpec("toy", ("text",), label_names), adversarial=None),
            settings=RunSettings(model=name),
            device=torch.device("cpu"),
            batches=lambda *_: parts,
            subject=lambda *_: {"weights": name},
        )

    monkeypatch.setattr(load, "open_run", opened)
    monkeypatch.setattr(models, "label_order", lambda *_: [0, 1, 2])
    monkeypatch.setattr(Tiny, "config", None, raising=False)
    monkeypatch.setattr(pictures, "interpolation", lambda *_: [])
    for flags, first, last in ((("--points", "5"), "0", "1"), (("--points", "3", "--last", "0.0"), "-0.5", "0")):
        interpolate.run(["one", "two", *flags, "--output_dir", str(tmp_path / last)])
        told = rf"validation: [\d.]+% at a = {first}, [\d.]+% at a = {last}; highest"
        assert re.search(told, capsys.readouterr().out)


def test_data_is_the_same_however_its_path_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def check(*settings: dict[str, Any]) -> None:
        runs = [(f"run {i}", RunSettings(model=f"m{i}", **given)) for i, given in enumerate(settings)]
        same_data([SimpleNamespace(name=name, settings=run) for name, run in runs])  # type: ignore[misc]

    check({"train_file": "reviews.csv"}, {"train_file": "./reviews.csv"}, {"train_file": str(tmp_path / "reviews.csv")})
    with pytest.raises(ValueError, match=r"run 0 and run 1 .*with --train_file \(\S+/a\.csv and \S+/b\.csv\)$"):
        check({"train_file": "a.csv"}, {"train_file": "b.csv"})
    with pytest.raises(ValueError, match=r"with --data \(\S+/glue and None\), --max_length \(128 and 64\)$"):
        check({"data": "glue"}, {"max_length": 64})


def test_hessian_eigenvalues_are_those_of_autograd(model: Tiny) -> None:
    parts = batches(6, 3)
    x, labels = (torch.cat([part[name] for part in parts]) for name in ("x", "labels"))
    params = dict(model.named_parameters())
    sizes = [p.numel() for p in params.values()]

    def loss(flat: Tensor) -> Tensor:
        pieces = [v.view_as(p) for v, p in zip(flat.split(sizes), params.values(), strict=True)]
        out = torch.func.functional_call(model, dict(zip(params, pieces, strict=True)), (x,))
        return F.cross_entropy(out.logits, labels)

    flat = torch.cat([p.detach().flatten() for p in params.values()])
    values = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat).double())
    want = sorted(sorted(values.tolist(), key=abs)[-3:], reverse=True)
    assert largest_eigenvalues(model, parts, 3, tolerance=1e-4) == pytest.approx(want, rel=1e-3)


def test_sharpness_is_the_loss_of_sams_step(model: Tiny) -> None:
    parts = batches(6, 3)
    x, labels = (torch.cat([part[name] for part in parts]) for name in ("x", "labels"))
    before = weights_of(model)
    copy = Tiny().eval()
    start = F.cross_entropy(copy(x).logits, labels)
    start.backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in copy.parameters() if p.grad is not None))
    with torch.no_grad():
        for p in copy.parameters():
            p.add_(p.grad, alpha=0.1 / norm)  # type: ignore[arg-type]
    want = (F.cross_entropy(copy(x).logits, labels) - start).item()
    assert sharpness(model, parts, rho=0.1) == pytest.approx(want, rel=1e-4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_parameter_that_nothing_uses(model: Tiny) -> None:
    """A pooler that the head does not ask, as BigBird's."""
    parts = batches(6, 3)
    rise, values = sharpness(model, parts), largest_eigenvalues(model, parts, 2, tolerance=1e-5)
    model.pooler = nn.Linear(3, 3)
    assert sharpness(model, parts) == pytest.approx(rise, rel=1e-5)
    assert largest_eigenvalues(model, parts, 2, tolerance=1e-5) == pytest.approx(values, rel=1e-3)


def test_layers_of_several_lists_have_cells_of_their_own() -> None:
    names = [f"model.{side}.layers.{n}.attn.k.weight" for side in ("encoder", "decoder") for n in (0, 1)]
    layers, kinds, place = _modules(["shared.weight", *names])
    lists = [f"model.{side}.layers.{n}" for side in ("encoder", "decoder") for n in (0, 1)]
    assert (layers, kinds) == (["-1", *lists], ["shared.weight", "attn.k"])
    assert len(set(place)) == 5
    one = [f"bert.layer.{n}.k.weight" for n in (10, 2)]
    assert _modules(one) == (["2", "10"], ["k"], [("k", "10"), ("k", "2")])


def test_low_area() -> None:
    assert low_area([[1.0, 1.05], [1.2, 5.0]], 0.1) == 0.5
    assert low_area([[1.0, 1.05], [1.2, 5.0]], 10.0) == 1.0


def test_disagreement(model: Tiny) -> None:
    parts = batches(40, 24)
    model.norm.eval()
    state = torch.get_rng_state()
    found = disagreement(model, parts, draws=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert len(found) == 3
    assert all(0 < value < 1 for value in found)
    assert found == disagreement(model, parts, draws=3)
    assert found != disagreement(model, parts, draws=3, seed=1)
    more = disagreement(Tiny(dropout=0.9).eval(), parts, draws=3)
    assert sum(more) > sum(found)
    with pytest.raises(ValueError, match="the model has no dropout"):
        disagreement(Tiny(dropout=0.0), parts)
