"""The library's norms, of the kind that a configuration names."""

import inspect
from collections.abc import Callable, Iterator

from torch import nn

from core.errors import require
from core.options import check_arguments
from lightning_modules.argument_errors import as_config_errors, as_error_of_own
from lightning_modules.config import ModelConfig
from spannorm import Matrix, NormFactory, owned_matrices
from spannorm.norms import FILLED_IN, NORMS


class ConfiguredNorms(NormFactory):
    """Makes norms of the configured kind; what cannot work is a ConfigError of model.norm or model.norm_options."""

    def constructor(self) -> Callable[..., nn.Module]:
        """Return what makes a norm of this kind, which takes the options that it is given."""
        with as_config_errors("model.norm_options"):
            make = super().constructor()
        first = next(iter(inspect.signature(make).parameters), "")
        require(bool(first), "model.norm", self.kind, "a class or function that takes the number of features")
        check_arguments("model.norm_options", make, self.options, first, *FILLED_IN)
        kind, options = self.base
        if self.kind == "gatednorm" and kind in NORMS:  # another one it refuses itself
            check_arguments("model.norm_options.kind_options", NORMS[kind], options, "dim", *FILLED_IN)
        return make

    def __call__(self, before_attention: bool = False) -> nn.Module:
        """Make one norm; see NormFactory."""
        with as_config_errors("model.norm_options"), as_error_of_own("model.norm", self.kind):
            return super().__call__(before_attention)

    def embedding_scale(self) -> nn.Module:
        """Make the scalar on the embedding that this kind asks for; see NormFactory."""
        with as_config_errors("model.norm_options"):
            return super().embedding_scale()


def norm_factory(config: ModelConfig, dim: int) -> ConfiguredNorms:
    """Return what makes norms of the configured kind over `dim` features."""
    return ConfiguredNorms(config.norm, dim, config.norm_eps, config.norm_options, config.dim)


def make_norm(config: ModelConfig, dim: int) -> nn.Module:
    """Make one norm of the configured kind over `dim` features."""
    return norm_factory(config, dim)()


def norm_matrices(layer: nn.Module, width_is_explicit: bool = False, reads_hidden: bool = False) -> Iterator[Matrix]:
    """Yield the matrices of a layer's norms. A norm does not know what its features are, and the layer does.

    Args:
        layer: has the norms among its parts.
        width_is_explicit: whether the number of features that they norm over is fixed by the configuration.
        reads_hidden: whether these are those of an FFN's hidden layer.
    """
    for matrix in owned_matrices(layer):
        if matrix.width_is_explicit:  # reads a number of features of the norm's own, such as a rank
            yield matrix
        else:
            yield matrix._replace(width_is_explicit=width_is_explicit, reads_hidden=reads_hidden)
