"""What docs/models.md says around its tables."""

from __future__ import annotations

INTRODUCTION = """# Which models has ROSE been tried with?

Made by `python tests/e2e/models.py`. Tiny models of each kind with random weights, two steps of ROSE-Ensemble with
AdamW on four rows. `tests/e2e/test_architectures.py` tries every row again in one process, some of them on all engines,
and fails where this page says something else.

- **default**: how many of the trainable tensors the default `include` masks, and their share of the trainable weights.
  It knows the names that most of transformers' models have; where it does not fit, it is refused and the error names
  `include="@blocks"`, everything in the model's numbered blocks but biases.
- **include**: what was used; for `@blocks` the patterns that it stands for, as `stepper.describe()` lists them.
- **dropout**: the layers that make two passes differ, by their names in the transformers of `launch/requirements.txt`.
  Without any there is no first-order risk and `strategy="first"` and `"ensemble"` are refused; those were tried with
  `"second"`.
- **FSDP2**, **ZeRO-3**: two ranks with two of the rows each, the blocks of the model sharded one by one.
  **RoseTrainer**: one process, two micro-batches. The number is the largest relative difference of a loss or a
  threshold from those of a loop of one process with the same random numbers; "equal" is to the bit.

In language models labels of -100 (prompts, padding) count neither in the loss nor in the divergence of two passes: pass
`positions=` to `stepper.backward()` in a loop of your own, RoseTrainer does it.
"""

CLOSING = """## Adapters and weights in 8 bits

With PEFT only what trains is eligible: the adapters; a new head is always updated. The base is frozen and in no
optimizer: no moments, no gradient kept apart, no masks. LoRA's B begins as zeros, so in the first step half of the
risks are zero.

Weights in 8 bits (bitsandbytes' `Linear8bitLt`) cannot train, with or without ROSE; adapters over them do. Their passes
need no gradient of the weights, only through them. Under FSDP2 they do not work: bitsandbytes keeps its scales on the
parameter, and FSDP2 replaces parameters. ZeRO-3 does.

## A decoder of a billion parameters

`python benchmarks/billion.py` trains a Llama with random weights under ZeRO-3 on two CPU ranks: bf16 weights, fp32
masters and moments, ROSE-Second, 16 tokens a rank, two steps.

| layers | parameters | peak of a rank, GiB | both, bytes a parameter | seconds a step |
| --- | --- | --- | --- | --- |
| 2 | 106,668,800 | 1.71 | 34.4 | 2 to 3 |
| 8 | 340,653,824 | 3.63 | 22.9 | 7 to 8 |
| 14 | 574,638,848 | 5.54 | 20.7 | 11 to 12 |
| 25 | 1,003,611,392 | 8.99 | 19.2 | 18 to 21 |

Thresholds were the same bits on both ranks, and the second step kept 0.6000 to 0.6001 of the elements. A rank has 0.5
GiB before there is a model. For each further parameter both ranks together hold 16 bytes before the first step
(weights, gradients, masters, moments) and 17 to 18 at the highest point of a step; `benchmarks/results/billion.json`
has every rank's peaks. The largest needs 20 GiB of free memory. Masters in bf16 would take less, and are refused:
they round ROSE's small updates away.

## What else was found

- **big_bird** was tried with `attention_type="original_full"`. `block_sparse` draws its blocks with numpy's random
  numbers, which no seed of torch's sets: at ZeRO-3, where a pass is run again, an error says so; elsewhere the run
  cannot be repeated.
- **squeezebert** calls its blocks' `forward()` directly, past the hooks by which FSDP2 gathers their weights, and fails
  where they are sharded one by one. It was sharded as a whole.
- **DeepSpeed clips by default**: without `"gradient_clipping"` in its config the gradient's norm is clipped to 1.0. Set
  it to 0 for a loop without clipping.
"""
