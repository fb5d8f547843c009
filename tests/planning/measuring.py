"""
What a training step really holds and sends, for comparison with onerec_hf.planning. As a script (under torchrun) it measures one strategy and
writes each rank's numbers into FOLDER/rank-N.json.
"""

from __future__ import annotations

import json
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.distributed import DistributedConfig

from onerec_hf import OneRecConfig, OneRecForConditionalGeneration
from onerec_hf.modeling.layers_onerec import OneRecTopKRouter
from onerec_hf.planning import Batch

# Encoder variants and the item head; all items of codebooks of 7 and 8 have a vector.
VARIANTS = {
    "paper": {},
    "pointwise": {"encoder_attention": "pointwise", "encoder_scales_embeddings": True},
    "pooled": {"encoder_pools_items": True},
    "item head": {"item_head": {"num_items": 56, "dropout": 0.2}},
    "item head with codes": {"item_head": {"num_items": 56, "score_codes": True}, "encoder_pools_items": True},
    "content": {"item_head": {"num_items": 56, "content_dim": 6, "evidence": True}, "encoder_pools_items": True},
    "item head of low rank": {"item_head": {"num_items": 56, "rank": 3}},
    "low rank with codes": {"item_head": {"num_items": 56, "rank": 6, "score_codes": True, "content_dim": 5}},
    "features": {"features": {"user": [["age", 9, 1], ["tags", 7, 2]], "item": [["year", 6, 1]], "dim": 5}},
    "pathways": {
        "features": {
            "user": [["age", 9, 1]],
            "interaction": [["positive", 5, 1]],
            "item": [["year", 6, 1]],
            "dim": 5,
            "not_positive": [0, 4],
            "pathways": {"short_term": 2, "positive": 9},
        },
        "encoder_pools_items": True,
    },
    "vectors only": {"item_head": {"num_items": 56, "loss_weight": 0.0}},
}


def make_model(config: OneRecConfig) -> OneRecForConditionalGeneration:
    """A model whose item head, if it has one, knows all combinations of codes."""
    model = OneRecForConditionalGeneration(config)
    if config.item_head is not None:
        codes = torch.cartesian_prod(*map(torch.arange, config.codebook_sizes))
        model.model.encoder.item_head.set_codes(codes, popularity=torch.arange(len(codes)))
    return model


def rows(config: OneRecConfig, batch: Batch, padded: bool = True) -> dict[str, torch.Tensor]:
    """A batch of random items; `padded`: the first user's history and session are one item shorter."""
    levels = config.tokens_per_item

    def items(count):
        codes = [
            torch.randint(size, (batch.users, count)) + offset
            for size, offset in zip(config.codebook_sizes, config.level_offsets, strict=True)
        ]
        return torch.stack([torch.full_like(codes[0], 3), *codes], -1).flatten(1)

    read = batch.history if config.features is None else config.features.places(batch.history)
    histories, labels = items(read), items(batch.session).roll(-1, 1)
    labels[:, levels - 1 :: levels] = -100
    masks = {"attention_mask": torch.ones_like(histories), "decoder_attention_mask": torch.ones_like(labels)}
    if padded:
        masks["attention_mask"][0, :levels] = 0
        masks["decoder_attention_mask"][0, -levels:] = 0
    if config.features is None:
        return {"input_ids": histories, "labels": labels, **masks}
    sizes = [size for _, size, slots in config.features.columns for _ in range(slots)]
    users = config.features.user_slots
    codes = torch.stack([torch.randint(1, size, histories[:, ::levels].shape) for size in sizes], -1)
    static = torch.tensor([[3] + [2] * (levels - 1)]).expand(batch.users, -1)
    codes, masks["attention_mask"] = (
        torch.cat([codes[:, :1], codes], 1),
        torch.cat([static * 0 + 1, masks["attention_mask"]], 1),
    )
    codes[:, 0, users:], codes[:, 1:, :users] = 0, 0
    return {"input_ids": torch.cat([static, histories], 1), "labels": labels, "feature_ids": codes, **masks}


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def nbytes(tensors) -> int:
    return sum(local(tensor).numel() * tensor.element_size() for tensor in tensors)


CHANGING = {"EmbeddingBackward0"}  # one weight goes in, but what comes out are rows of the batch


def is_made_of_a_weight_alone(tensor: torch.Tensor) -> bool:
    """Whether it is a leaf or a leaf's cast, transposition or view: single steps lead back to where a gradient accumulates."""
    step = tensor.grad_fn
    if step is None:
        return tensor.requires_grad
    while len(step.next_functions) == 1 and step.name() not in CHANGING:
        step = step.next_functions[0][0]
    return hasattr(step, "variable")


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """
    Bytes of the storages that autograd saves: `activations`, and `copies` of weights: autocast's, or those that FSDP gathered.

    Args:
        copies: the type of such copies. They are known by their history: a shape is also that of as many token rows as a weight has.
    """

    def __init__(self, model: torch.nn.Module, copies: torch.dtype | None = None):
        # Storages are known by themselves, and kept: an address that FSDP frees is given to something else.
        weights = [local(weight).untyped_storage() for weight in model.parameters()]
        self.weights = {storage._cdata: storage for storage in weights}
        self.dtype = copies
        self.seen = {}
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            is_copy = tensor.dtype == self.dtype and is_made_of_a_weight_alone(tensor)
            self.seen[storage._cdata] = (storage, is_copy)
        return tensor

    def _bytes(self, copies: bool) -> int:
        return sum(storage.nbytes() for storage, is_copy in self.seen.values() if is_copy is copies)

    @property
    def activations(self) -> int:
        return self._bytes(False)

    @property
    def copies(self) -> int:
        return self._bytes(True)


class LiveBytes(TorchDispatchMode):
    """
    What operations inside the context have made and not freed: `live` now, `peak` at most.

    Args:
        present: tensors that were there before; views of them are nothing new.
    """

    def __init__(self, present):
        super().__init__()
        self.live, self.peak = 0, 0
        self.known = {tensor.untyped_storage()._cdata for tensor in present}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, address, size):
        self.known.discard(address)
        self.live -= size


KINDS = {
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "allreduce": "all_reduce",
    "all_to_all": "all_to_all",
}


class Collectives(TorchDispatchMode):
    """Payload bytes of the collectives inside the context, by kind: the whole buffer; of all_to_all of token rows, what is sent."""

    def __init__(self):
        super().__init__()
        self.payload = dict.fromkeys(KINDS.values(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        kind = next((kind for part, kind in KINDS.items() if part in name), None)
        if "c10d" in name and kind is not None:
            sizes = [
                leaf.numel() * leaf.element_size() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)
            ]
            # Gather: output, then input; scatter: output, then input; the exchange of rows: input.
            self.payload[kind] += max(sizes)
        return func(*args, **(kwargs or {}))


def measure(model, wrapped, config, batch, dtype="float32", copies=None, padded=True) -> dict:
    """Two steps of AdamW; the numbers of the second."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        saved, collectives = SavedTensors(model, copies), Collectives()
        autocast = torch.autocast("cpu", torch.bfloat16) if dtype == "mixed" else nullcontext()
        with collectives, saved:
            with autocast:
                loss = wrapped(**rows(config, batch, padded)).loss
            kept = {"activations": saved.activations, "copies": saved.copies}
            loss.backward()
        optimizer.step()
    parameters = list(model.parameters())
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    return {
        "weights": nbytes(parameters),
        "gradients": nbytes(weight.grad for weight in parameters),
        "optimizer": nbytes(moments),
        **kept,
        "collectives": collectives.payload,
    }


def deal_tokens_in_turn(router: OneRecTopKRouter, _, chosen: tuple) -> tuple:
    """
    A hook: every expert gets as many tokens, which is what the plan computes. A router with random weights may send nothing to a rank's
    experts, which then compute on a row of transformers' making.
    """
    logits, weights, index = chosen
    turns = torch.arange(index.numel(), device=index.device) % logits.shape[-1]
    return logits, weights, turns.view_as(index)


def measured(folder: str, strategy: str, dtype: str, batch: dict, shards=1, experts=1, checkpointing=False) -> dict:
    """One strategy on all ranks; the model is the one saved in `folder`."""
    options = {"experts_implementation": "grouped_mm"}  # what a GPU runs
    mixed = dtype == "mixed"
    if strategy != "ddp":
        options["distributed_config"] = DistributedConfig(
            fsdp_size=shards, ep_size=experts, fsdp_mixed_precision=mixed
        )
    model = OneRecForConditionalGeneration.from_pretrained(folder, **options)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, OneRecTopKRouter):
            module.register_forward_hook(deal_tokens_in_turn)
    wrapped = DistributedDataParallel(model) if strategy == "ddp" else model
    autocast = dtype if strategy == "ddp" else "float32"
    copies = torch.bfloat16 if mixed else torch.float32
    return measure(model, wrapped, model.config, Batch(**batch), autocast, copies)


def main(folder: str, settings: str) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    found = [measured(folder, **setting) for setting in json.loads(settings)]
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
