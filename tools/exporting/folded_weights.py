"""The weights of a model as another program would use them, which knows nothing of scaling with depth."""

from torch import Tensor

from lightning_modules.trunk import Trunk
from spannorm.initialization import OUTPUTS


def folded_weights(model: Trunk) -> dict[str, Tensor]:
    """Return the model's tensors by name, the factor on branches multiplied into the matrices that end them."""
    tensors = model.state_dict()
    if model.branch_multiplier == 1:
        return tensors
    ends = {matrix.weight for matrix in model.matrices() if matrix.role in OUTPUTS}
    names = {name for name, parameter in model.named_parameters() if parameter in ends}
    return {name: tensor * model.branch_multiplier if name in names else tensor for name, tensor in tensors.items()}
