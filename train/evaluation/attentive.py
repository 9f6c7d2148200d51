"""The attentive probe: one learned query attends to the frozen tokens of an image, and a linear map names its class."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from pipeline.loader import MultiCropLoader
from pipeline.notices import Every
from train.evaluation.features import STORED, free_memory
from train.optim import cosine

ATTENTIVE_RATES = (1e-3, 3e-3, 1e-2)
EPOCHS, LEAST_STEPS = 10, 1000  # so many passes over the training images, or more to make so many steps
HEAD_WIDTH = 64  # of one attention head, at most
STORE_SHARE = 0.25  # of the free memory: tokens that fit it are kept, others are encoded again for each epoch
TOLD_EVERY_S = 5.0
HELD_OUT = 10  # every tenth training image chooses the learning rate

Tokens = Callable[[torch.Tensor], torch.Tensor]


class AttentiveProbe(nn.Module):
    """`[n, N, D] -> [n, C]` logits: normed tokens, pooled by one query, mapped to classes.

    Equal to `nn.MultiheadAttention` with one query for all images, in another order: such a query can be multiplied into the
    keys' weights and the tokens pooled before the values' weights are, so that no token is projected.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        heads = -(-width // HEAD_WIDTH)
        while width % heads:
            heads += 1
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.classify = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        attention, normed = self.attention, self.norm(tokens)
        to_query, to_key, to_value = attention.in_proj_weight.unflatten(0, (3, attention.num_heads, -1))
        query_bias, _, value_bias = attention.in_proj_bias.view(3, -1)  # the keys' shifts all scores of a head alike
        query = (to_query @ self.query[0, 0] + query_bias.view(attention.num_heads, -1)) * attention.head_dim**-0.5
        scores = normed @ torch.einsum("hw,hwd->dh", query, to_key)
        pooled = scores.softmax(dim=1).transpose(1, 2) @ normed  # [n, heads, D]
        values = torch.einsum("nhd,hwd->nhw", pooled, to_value).flatten(1) + value_bias
        return self.classify(attention.out_proj(values))


class TokenStream:
    """Batches of (tokens `[n, N, D] float32`, labels `[n]`, held out `[n] bool`) of a split, epoch after epoch.

    Tokens that fit a share of the memory are encoded once and kept as float16; if they do not, each epoch encodes them again.
    """

    def __init__(self, loader: MultiCropLoader, tokens: Tokens) -> None:
        self._loader, self._tokens = loader, tokens
        self._store: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None

    @property
    def batches(self) -> int:
        """Of one epoch."""
        return len(self._loader)

    def epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        if self._store is not None:
            for tokens, labels, held_out in self._store:
                yield tokens.to(labels.device).float(), labels, held_out
            return
        store: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = []
        room, taken = STORE_SHARE * free_memory(), 0
        self._loader.load_state_dict({"epoch": 0, "position": 0})
        for batch in self._loader:
            with torch.inference_mode():
                found = self._tokens(batch.crops[0]).to(STORED)
            held_out = batch.positions % HELD_OUT == 0
            taken += found.nbytes
            if store is not None:
                store.append((found.cpu(), batch.labels, held_out))
                store = store if taken <= room else None
            yield found.float(), batch.labels, held_out
        self._store = store


def attentive_probe(
    train: TokenStream, test: TokenStream, width: int, classes: int, device: torch.device, say: Callable[[str], None]
) -> tuple[float, str]:
    """Percent right on `test`, and the learning rate of ATTENTIVE_RATES that won on every tenth training image.

    `width`: D of the tokens. The labels of both streams are below `classes`. `say` is told every few seconds how far it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        probes = nn.ModuleList(AttentiveProbe(width, classes) for _ in ATTENTIVE_RATES).to(device)
    groups = [{"params": probe.parameters(), "lr": rate} for probe, rate in zip(probes, ATTENTIVE_RATES, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    steps = train.batches * max(EPOCHS, -(-LEAST_STEPS // train.batches))
    step, told = 0, Every(TOLD_EVERY_S)
    while step < steps:
        for tokens, labels, held_out in train.epoch():
            for group, rate in zip(optimizer.param_groups, ATTENTIVE_RATES, strict=True):
                group["lr"] = cosine(rate, 0.0, step / steps)
            kept, step = ~held_out, step + 1
            loss = torch.stack([F.cross_entropy(probe(tokens[kept]), labels[kept]) for probe in probes]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if told.due():
                say(f"  step {step} of {steps}")
    chosen_by = _accuracies(probes, ((tokens[held], labels[held]) for tokens, labels, held in train.epoch()))
    scores = _accuracies(probes, ((tokens, labels) for tokens, labels, _ in test.epoch()))
    best = max(range(len(ATTENTIVE_RATES)), key=lambda number: chosen_by[number])
    return scores[best], f"lr {ATTENTIVE_RATES[best]:g}"


@torch.inference_mode()
def _accuracies(probes: nn.ModuleList, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> Sequence[float]:
    right, count = [0] * len(probes), 0
    for tokens, labels in batches:
        count += len(labels)
        for number, probe in enumerate(probes):
            right[number] += int((probe(tokens).argmax(dim=1) == labels).sum())
    return [100.0 * found / max(count, 1) for found in right]
