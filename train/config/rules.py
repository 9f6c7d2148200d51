"""Rules between keys."""

from collections.abc import Iterator

from train.config.schema import Config

Problem = tuple[str, str]  # the dotted key that an error is reported at, and the message

WEIGHTS_KEY = "starting weights have a key of their own: model.weights names a timm tag, a file, a folder or a run"
REFUSED_ARGUMENTS = {
    **dict.fromkeys(("mean", "std"), "timm takes none; set data.augmentation.mean and std"),
    **dict.fromkeys(("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"), WEIGHTS_KEY),
    "in_chans": "crops have 3 channels; leave it out",
}


def broken_rules(config: Config) -> Iterator[Problem]:
    """Yield what is wrong between the keys of a config whose values are valid one by one."""
    yield from _crop_rules(config)
    yield from _masking_rules(config)
    model, loss, training = config.model, config.loss, config.training
    if model.predictor_width % model.predictor_heads:
        problem = f"{model.predictor_heads} does not divide predictor_width = {model.predictor_width}"
        yield "model.predictor_heads", problem
    for name in sorted(REFUSED_ARGUMENTS.keys() & model.encoder_kwargs.keys()):
        yield "model.encoder_kwargs", f"{name}: {REFUSED_ARGUMENTS[name]}"
    if loss.anchor_weight > 0 and model.weights is None:
        yield "loss.anchor_weight", "there is no start to stay close to; name it with model.weights, or write 0"
    if model.levels == ():
        yield "model.levels", "the list is empty; list some levels, or write null for the three default ones"
    if not any((loss.prediction_weight, loss.summary_weight, loss.view_weight, loss.sigreg_weight)):
        yield "loss.prediction_weight", "all four weights are 0, so nothing would be learned; raise one"
    if training.warmup_epochs > training.epochs:
        problem = f"{training.warmup_epochs:g} is more than epochs = {training.epochs}; lr would never reach its peak"
        yield "training.warmup_epochs", problem


def _crop_rules(config: Config) -> Iterator[Problem]:
    data, patch, (num_global, num_local) = config.data, config.model.patch_size, config.data.crop_counts
    if config.device == "cpu" and data.crop_device == "gpu":
        yield "data.crop_device", "gpu needs device: gpu; a run on the CPU makes its crops there, write auto or cpu"
    for key in ("global_blur_prob", "solarize_prob"):
        values = getattr(data.augmentation, key)
        if isinstance(values, tuple) and len(values) < num_global:
            problem = f"has {len(values)} values for {num_global} global crops; give {num_global}, or one number for all"
            yield f"data.augmentation.{key}", problem
    for kind in ("global", "local") if num_local else ("global",):
        size: int = getattr(data.multicrop, f"{kind}_crop_size")
        if patch and size % patch:
            near = f"{size // patch * patch} or {(size // patch + 1) * patch}" if size > patch else patch
            yield f"data.multicrop.{kind}_crop_size", f"{size} is not a multiple of the patch size {patch}; try {near}"


def _masking_rules(config: Config) -> Iterator[Problem]:
    masking, strategy, weight = config.masking, config.masking.strategy, config.loss.prediction_weight
    num_global, num_local = config.data.crop_counts
    if masking.context_ratio + masking.query_ratio > 1 + 1e-9:  # for 0.9 + 0.1, which can exceed 1 in float64
        total = f"context_ratio + query_ratio = {masking.context_ratio} + {masking.query_ratio}"
        yield "masking.query_ratio", f"{total} exceeds 1; a token cannot be both, lower one"
    if strategy == "none" and weight > 0:
        problem = "none leaves nothing to predict; write loss.prediction_weight: 0, or choose global_only"
        yield "masking.strategy", problem
    if strategy not in ("none", "global_only") and weight == 0:
        problem = f"0 builds no predictor, and {strategy} differs only in what it sees; choose strategy global_only or none"
        yield "loss.prediction_weight", problem
    num_other = {"global_with_local_context": num_local, "cross_crop_prediction": num_global + num_local - 1}
    if num_other.get(strategy) == 0:
        other = "local" if strategy == "global_with_local_context" else "second"
        advice = "raise data.multicrop.num_local_crops, or choose global_only"
        yield "masking.strategy", f"{strategy} needs a {other} crop; {advice}"
