"""The optimisers that a recipe can name: one explicit table over torch.optim.

Sources: AdamW: Loshchilov and Hutter 2017 (arXiv 1711.05101); Adam: Kingma and Ba 2014 (arXiv
1412.6980); Adadelta: Zeiler 2012 (arXiv 1212.5701); RMSprop: Tieleman and Hinton 2012; Adagrad:
Duchi et al. 2011.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from llmproto.errors import invalid
from llmproto.recipes import TrainingRecipe
from torch import nn

Groups = list[dict[str, Any]]  # Any: torch's own type of a parameter group
Make = Callable[[Groups, TrainingRecipe], torch.optim.Optimizer]


def _adamw(groups: Groups, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(
        groups, lr=recipe.learning_rate, betas=betas, eps=recipe.epsilon, fused=True
    )


def _adam(groups: Groups, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.Adam(
        groups, lr=recipe.learning_rate, betas=betas, eps=recipe.epsilon, fused=True
    )


def _adadelta(groups: Groups, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    return torch.optim.Adadelta(
        groups, lr=recipe.learning_rate, rho=recipe.beta1, eps=recipe.epsilon, foreach=True
    )


def _rmsprop(groups: Groups, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(
        groups,
        lr=recipe.learning_rate,
        alpha=recipe.beta2,
        eps=recipe.epsilon,
        momentum=recipe.momentum,
        foreach=True,
    )


def _sgd(groups: Groups, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, fused=True)


def _adagrad(groups: Groups, recipe: TrainingRecipe) -> torch.optim.Optimizer:
    on_cpu = all(each.device.type == "cpu" for group in groups for each in group["params"])
    return torch.optim.Adagrad(groups, lr=recipe.learning_rate, eps=recipe.epsilon, fused=on_cpu)


TABLE: Final[dict[str, Make]] = {
    "adamw": _adamw,
    "adam": _adam,
    "adadelta": _adadelta,
    "rmsprop": _rmsprop,
    "sgd": _sgd,
    "adagrad": _adagrad,
}
"""By the recipe's word.  `beta1` is Adadelta's rho, `beta2` RMSprop's alpha."""


def unknown(name: str) -> str:
    """What to say of a name that is not in the table."""
    return f"training.optimizer is {name!r}; there are {', '.join(sorted(TABLE))}"


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Matrices decay; biases, norms and other vectors do not."""
    return parameter.dim() > 1


def build(
    recipe: TrainingRecipe, parameters: Iterable[tuple[str, nn.Parameter]]
) -> torch.optim.Optimizer:
    """The recipe's optimiser over named parameters; INVALID names those that there are."""
    make = TABLE.get(recipe.optimizer)
    if make is None:
        raise invalid(unknown(recipe.optimizer))
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in parameters:
        wanted = recipe.decay_all or decays(name, parameter)
        (decayed if wanted else kept).append(parameter)
    groups: Groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return make([group for group in groups if group["params"]], recipe)
