"""The attentive probe: a classifier that pools patch tokens by attention."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from model.encoder import MultiCropEncoder, patchify
from pipeline.loader import MultiCropLoader
from train.evaluation.features import STORED_DTYPE, free_memory, mixed_precision
from train.evaluation.measure import accuracies, best_trial, fit_heads, is_held_out

ATTENTIVE_RATES = (1e-3, 3e-3, 1e-2)
ATTENTIVE_EPOCHS, MIN_STEPS = 10, 1000  # small splits train for more epochs, up to this many steps
MAX_HEAD_WIDTH = 64  # of one attention head
TOKENS_SHARE = 0.25  # of the free memory, for the tokens of one split

Tokenizer = Callable[[torch.Tensor], torch.Tensor]
"""`[n, 3, S, S] float32, normalised -> [n, N, D]`"""


def patch_tokens(encoder: MultiCropEncoder) -> Tokenizer:
    """Return a tokenizer of patch tokens after the final norm."""
    return lambda crops: encoder([(crops, None)])[0].tokens


def pixel_tokens(patch_size: int) -> Tokenizer:
    """Return a tokenizer of each patch's pixels, D = 3 * patch_size^2."""
    return lambda crops: patchify(crops, patch_size).contiguous()


class TokenStream:
    """Yields the tokens of a split epoch after epoch.

    Tokens that fit in a share of the free memory are computed once and kept as float16; otherwise every epoch computes them.
    """

    def __init__(self, loader: MultiCropLoader, tokenizer: Tokenizer) -> None:
        self._loader, self._tokenizer, self.batches_per_epoch = loader, tokenizer, len(loader)
        self._store: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield tokens `[n, N, D] float32`, labels `[n]` and positions `[n]`."""
        if self._store:
            for tokens, labels, positions in self._store:
                yield tokens.to(labels.device).float(), labels, positions
            return
        store, room, used = [], TOKENS_SHARE * free_memory(), 0
        self._loader.load_state_dict({"epoch": 0, "position": 0})
        for batch in self._loader:
            with torch.inference_mode(), mixed_precision(batch.crops[0]):
                tokens = self._tokenizer(batch.crops[0]).to(STORED_DTYPE)
            used += tokens.nbytes
            if used <= room:
                store.append((tokens.cpu(), batch.labels, batch.positions))
            else:
                store.clear()
            yield tokens.float(), batch.labels, batch.positions
        self._store = store


class AttentiveProbe(nn.Module):
    """`[n, N, D] -> [n, C]` logits: normed tokens, pooled by one learned query, then a linear classifier.

    Equals `nn.MultiheadAttention` with one query for all images, but projects no token: the query is multiplied into the key
    weights, and the tokens are pooled before the value projection.
    """

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        heads = -(-width // MAX_HEAD_WIDTH)
        while width % heads:
            heads += 1
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.classify = nn.Linear(width, classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        attention, normed = self.attention, self.norm(tokens)
        to_query, to_key, to_value = attention.in_proj_weight.unflatten(0, (3, attention.num_heads, -1))
        # The key bias shifts all scores of a head equally, so it has no effect.
        query_bias, _, value_bias = attention.in_proj_bias.view(3, -1)
        query = (to_query @ self.query[0, 0] + query_bias.view(attention.num_heads, -1)) * attention.head_dim**-0.5
        scores = normed @ torch.einsum("hw,hwd->dh", query, to_key)
        pooled = scores.softmax(dim=1).transpose(1, 2) @ normed  # [n, heads, D]
        values = torch.einsum("nhd,hwd->nhw", pooled, to_value).flatten(1) + value_bias
        return self.classify(attention.out_proj(values))


def attentive_probe(train: TokenStream, test: TokenStream, width: int, classes: int, device: torch.device) -> tuple[float, str]:
    """Return the accuracy on `test` and the best of ATTENTIVE_RATES. `width`: D of the tokens; all labels are below `classes`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        heads = nn.ModuleList(AttentiveProbe(width, classes) for _ in ATTENTIVE_RATES).to(device)
    epochs = max(ATTENTIVE_EPOCHS, -(-MIN_STEPS // train.batches_per_epoch))

    def part(held_out: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for tokens, labels, positions in train.epoch():
            rows = is_held_out(positions) == held_out
            yield tokens[rows], labels[rows]

    batches = (batch for _ in range(epochs) for batch in part(held_out=False))
    adamw = partial(torch.optim.AdamW, weight_decay=0.01)
    fit_heads("attentive", heads, ATTENTIVE_RATES, adamw, batches, epochs * train.batches_per_epoch)
    validation = accuracies(heads, part(held_out=True))
    scores = accuracies(heads, ((tokens, labels) for tokens, labels, _ in test.epoch()))
    return best_trial(zip(validation, scores, [f"lr {rate:g}" for rate in ATTENTIVE_RATES], strict=True))
