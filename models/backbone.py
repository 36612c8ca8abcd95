"""What backbones of other libraries need before they are towers here."""

from torch import nn

from models.batch_norm import BatchNorm


class _BatchNormAct(BatchNorm):
    """Stand-in for timm's BatchNormAct2d, which holds its activation itself."""

    def __init__(self, layer: nn.Module, *, sync: bool):
        super().__init__(layer.num_features, sync=sync, eps=layer.eps, momentum=layer.momentum)
        self.drop = layer.drop
        self.act = layer.act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


def replace_batch_norms(module: nn.Module, sync: bool) -> int:
    """Replaces the batch norms below a module by `BatchNorm`, keeping their tensors and state-dict names.

    Args:
        module: The backbone.
        sync: Take batch statistics over all ranks.

    Returns:
        How many there were.

    Raises:
        ValueError: On a batch norm of another kind.
    """
    count = 0
    for name, child in module.named_children():
        if not isinstance(child, nn.modules.batchnorm._BatchNorm):
            count += replace_batch_norms(child, sync)
            continue
        if hasattr(child, "act") and hasattr(child, "drop"):
            replacement = _BatchNormAct(child, sync=sync)
        elif type(child) is nn.BatchNorm2d:
            replacement = BatchNorm(child.num_features, sync=sync, eps=child.eps, momentum=child.momentum)
        else:
            raise ValueError(f"batch norm {type(child).__name__} of this architecture is not supported")
        replacement.weight, replacement.bias = child.weight, child.bias
        for buffer_name, buffer in child.named_buffers(recurse=False):
            setattr(replacement, buffer_name, buffer)
        setattr(module, name, replacement)
        count += 1
    return count


def refuse_scalars(module: nn.Module, what: str) -> None:
    """Raises ValueError if a parameter of a backbone has no dimension."""
    scalars = [name for name, parameter in module.named_parameters() if parameter.ndim == 0]
    if scalars:
        raise ValueError(
            f"{what} has 0-dim parameters, which DeepSpeed cannot hold ({', '.join(scalars[:3])}); "
            f"choose another architecture"
        )


def layer_groups(module: nn.Module) -> list[list[nn.Parameter]]:
    """Cuts a backbone's parameters into groups: what precedes its layers, each layer, what follows with the last.

    Args:
        module: A backbone whose layers are its longest ModuleList, the outermost of equally long ones.

    Returns:
        Groups in the order of the parameters; all of them in one if there is no such list.
    """
    lists = [(name, part) for name, part in module.named_modules() if isinstance(part, nn.ModuleList) and len(part) > 1]
    if not lists:
        return [list(module.parameters())]
    prefix, layers = max(lists, key=lambda entry: (len(entry[1]), -entry[0].count(".")))
    before: list[nn.Parameter] = []
    groups: list[list[nn.Parameter]] = [[] for _ in layers]
    after = before
    for name, parameter in module.named_parameters():
        if name.startswith(f"{prefix}."):
            groups[int(name.removeprefix(f"{prefix}.").split(".")[0])].append(parameter)
            after = groups[-1]
        else:
            after.append(parameter)
    return [group for group in (before, *groups) if group]
