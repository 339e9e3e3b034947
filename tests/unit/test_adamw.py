"""The optimizer that the trainer makes is AdamW."""

import torch

from train_srpo_wan_t2i import make_optimizer


def test_adamw_is_fused_and_computes_what_adamw_computes(make_args):
    args = make_args("--learning_rate", 0.1, "--adam_weight_decay", 0.5, "--adam_beta1", 0.8, "--adam_epsilon", 0.1)
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 1000)) for _ in range(2)]
    fused = make_optimizer(args, weights[:1])
    plain = torch.optim.AdamW(weights[1:], 0.1, betas=(0.8, 0.999), eps=0.1, weight_decay=0.5, fused=False)
    assert fused.defaults["fused"]
    for optimizer, weight in zip((fused, plain), weights, strict=True):
        for power in (1, 2, 3):
            weight.grad = torch.linspace(-2, 3, 1000) ** power
            optimizer.step()
    torch.testing.assert_close(*weights, rtol=0, atol=1e-6)
