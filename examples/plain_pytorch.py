"""Adapters without Lightning: plan, inject, train, merge.

python examples/plain_pytorch.py
"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import lightning_lora as ll
from lightning_lora.demo.data import Windows, manual_prose
from lightning_lora.demo.module import BASE


def main(steps: int = 50) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(BASE)
    config = ll.LoRAConfig(r=8, lora_alpha=16, target_modules="attention", rank_pattern={"v_proj": 16})

    print(ll.plan(model, config))  # which layers, how many parameters; nothing is changed yet
    ll.inject(model, config)
    print(ll.summary(model))

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    data = DataLoader(Windows(manual_prose()[0], 16 * steps), batch_size=16)
    for step, batch in enumerate(data):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    torch.save(ll.adapter_state_dict(model), "adapter.pt")  # kilobytes
    print(ll.merge(model))  # into the weights, with a report of what rounding left of the update
    ll.unmerge(model)  # out again, bit for bit
    ll.merge_and_unload(model)  # for good: a plain model
    print(type(model.model.layers[0].self_attn.q_proj).__name__, "again")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
