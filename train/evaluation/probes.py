"""The offline probes: an attentive probe on patch tokens, and logistic regression on a few images per class."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from model.encoder import MultiCropEncoder, patchify
from pipeline.loader import MultiCropLoader
from train.evaluation.features import STORED_DTYPE, Features, free_memory, mixed_precision
from train.evaluation.measure import Standardizer, accuracies, best_trial, fit_heads, is_held_out, num_classes

ATTENTIVE_RATES = (1e-3, 3e-3, 1e-2)
ATTENTIVE_EPOCHS, MIN_STEPS = 10, 1000  # small splits train for more epochs, up to this many steps
MAX_HEAD_WIDTH = 64  # of one attention head
LOWSHOT_STRENGTH = 1.0  # C of the logistic regression, scikit-learn's default
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


def sample_per_class(labels: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return `[count * classes] int64`: `count` random rows of each class, or all rows of a smaller class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == label][:count] for label in labels.unique()])


def logistic_regression(
    rows: torch.Tensor, labels: torch.Tensor, classes: int, strength: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights `[D, C]` and biases `[C]`, float64, from L-BFGS.

    They minimise the sum of cross-entropies + |weights|^2 / (2 * strength), as in scikit-learn.
    """
    x = rows.double()
    weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=300, tolerance_grad=1e-8, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def objective() -> torch.Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, labels, reduction="sum") + weight.square().sum() / (2 * strength)
        loss.backward()
        return loss

    solver.step(objective)
    return weight.detach(), bias.detach()


def lowshot_accuracies(train: Features, test: Features, shots: int, seeds: Sequence[int], device: torch.device) -> list[float]:
    """Return the accuracy on `test` of a logistic regression on `shots` images per class, for each seed that draws them.

    Features are standardized over all training images and divided by the square root of their width, so that the
    regularisation has the same strength at every width.
    """
    values, labels = train.values["last"], train.labels
    standardizer, root = Standardizer(values, device), values.shape[1] ** 0.5
    heads = []
    for seed in seeds:
        rows = sample_per_class(labels, shots, seed)
        inputs, truth = standardizer(values[rows]) / root, labels[rows].to(device)
        weight, bias = logistic_regression(inputs, truth, num_classes(labels, test.labels), LOWSHOT_STRENGTH)
        heads.append(partial(F.linear, weight=weight.T.float() / root, bias=bias.float()))
    return accuracies(heads, standardizer.batches(test.values["last"], test.labels))
