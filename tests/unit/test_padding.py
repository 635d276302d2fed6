"""Perturbed embeddings of padded texts: padding is neither shifted nor counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from rose_ds import RoseAdamW, prepare
from rose_ds.objectives import FreeLB

pytestmark = pytest.mark.fast

IDS = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 8, 0, 0, 0, 0], [5, 5, 5, 5, 5, 5]])
REAL = IDS != 0


def test_freelbs_noise_is_of_a_texts_own_tokens() -> None:
    """Uniform in a cube of side 2 * init_mag / sqrt(tokens * dimensions), zero on padding (FreeLB's initialisation)."""
    dim, init = 4096, 0.5
    noise = FreeLB(init_mag=init)._noise(REAL, (*REAL.shape, dim), torch.Generator().manual_seed(1))
    assert not noise[~REAL].any() and noise[REAL].all()
    for row, real in zip(noise, REAL, strict=True):
        side = init / (int(real.sum()) * dim) ** 0.5
        assert 0.99 * side < row.abs().max() <= side
        assert abs(float(row[real].mean())) < 0.05 * side


@pytest.mark.parametrize("told", ["by a mask", "by the padding's number", "by a mask that says more"])
def test_which_tokens_are_padding(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's attention mask goes before the token's number."""
    seen: list[Tensor] = []
    noise = FreeLB._noise

    def spy(self: FreeLB, real: Tensor, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        seen.append(real)
        return noise(self, real, shape, generator)

    monkeypatch.setattr(FreeLB, "_noise", spy)
    torch.manual_seed(0)
    config: Any = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = BertForSequenceClassification(BertConfig(**config, intermediate_size=8, pad_token_id=0)).train()
    stepper = prepare(model, RoseAdamW(model.named_parameters(), strategy="second"), objective="freelb")
    want, inputs = REAL, {"input_ids": IDS}
    if told == "by a mask that says more":
        want = REAL & (torch.arange(6) < 3)
    if told != "by the padding's number":
        inputs["attention_mask"] = want.long()
    stepper.backward(lambda: model(**inputs).logits, lambda z: F.cross_entropy(z, torch.tensor([0, 1, 0])))
    stepper.step()
    assert len(seen) == 1 and torch.equal(seen[0], want)
