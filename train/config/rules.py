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
    """Yield what is wrong between the keys of a config whose values are valid one by one.

    Objects of the run refuse some values by themselves, such as a crop size that its patches do not divide: not repeated here.
    """
    model, loss, strategy, training = config.model, config.loss, config.masking.strategy, config.training
    for name in sorted(REFUSED_ARGUMENTS.keys() & model.encoder_kwargs.keys()):
        yield "model.encoder_kwargs", f"{name}: {REFUSED_ARGUMENTS[name]}"
    if loss.anchor_weight > 0 and model.weights is None:
        yield "loss.anchor_weight", "there is no start to stay close to; name it with model.weights, or write 0"
    if model.levels == ():
        yield "model.levels", "the list is empty; list some levels, or write null for the three default ones"
    if not any((loss.prediction_weight, loss.summary_weight, loss.view_weight, loss.sigreg_weight)):
        yield "loss.prediction_weight", "all four weights are 0, so nothing would be learned; raise one"
    if loss.whiten_targets and not (loss.prediction_weight or loss.summary_weight):
        yield "loss.whiten_targets", "there are no targets; write false, or raise prediction_weight or summary_weight"
    if config.logging.wandb and not config.logging.tensorboard:
        yield "logging.wandb", "it gets what TensorBoard does; write logging.tensorboard: true, or wandb: false"
    if training.compile == "cudagraphs" and config.device == "cpu":
        yield "training.compile", "cudagraphs needs a GPU, and device is cpu; write true or false"
    if training.compile == "cudagraphs" and training.accumulation_steps > 1:
        problem = "cudagraphs needs accumulation_steps: 1, because each batch overwrites the last one; or write true"
        yield "training.compile", problem
    if strategy == "none" and loss.prediction_weight > 0:
        yield "masking.strategy", "none leaves nothing to predict; write loss.prediction_weight: 0, or choose global_only"
    if strategy not in ("none", "global_only") and loss.prediction_weight == 0:
        problem = f"0 builds no predictor, and {strategy} differs only in what it sees; choose strategy global_only or none"
        yield "loss.prediction_weight", problem
