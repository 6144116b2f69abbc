"""Warns of batch normalization whose running averages would change in training without being saved with the adapter."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from rankwise.attach.matching import within
from rankwise.attach.refusals import some
from rankwise.config import LoraConfig


def tell_of_running_averages(
    modules: Mapping[str, nn.Module], config: LoraConfig, saved: Collection[str]
) -> None:
    """Warn of modules outside of ``saved`` that update running averages in each training pass.

    Args:
        modules: modules of the model, by path.
        config: the configuration.
        saved: paths of the modules that train in full.

    Warns:
        UserWarning: there are such modules, and the adapter is to be trained.
    """
    if config.inference_mode:
        return
    found = [
        path
        for path, module in modules.items()
        if isinstance(module, _NormBase) and module.running_mean is not None and not within(path, saved)
    ]
    if found:
        names = list(dict.fromkeys(path.rpartition(".")[2] for path in found))
        warnings.warn(
            f"{some(found)} would change their running averages in training, but the adapter's file does not hold "
            "them. So the loaded adapter would give other results than the trained model. Name them in "
            f"`modules_to_save` ({', '.join(map(repr, names[:6]))}), or call `eval()` on them after each "
            "`model.train()`.",
            UserWarning,
            stacklevel=4,
        )
