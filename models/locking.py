"""Freezing a tower, or all of it but its last groups."""

from torch import nn

from models.batch_norm import BatchNorm


def lock_tower(tower: nn.Module, unlocked_groups: int, what: str) -> None:
    """Freezes a tower's parameters, and the running statistics of the batch norms whose parameters are all frozen.

    Args:
        tower: With a method `lock_groups`, which lists what can be frozen together, from the input on. The new
            projection of a timm or Hugging Face backbone is in none of its groups and always trains.
        unlocked_groups: How many of the last groups go on training.
        what: Name of the setting, for errors.

    Raises:
        ValueError: If the tower has fewer groups.

    Source: Zhai et al. 2022, "LiT: Zero-Shot Transfer with Locked-image text Tuning"; groups as in open_clip.
    """
    groups = tower.lock_groups()
    if unlocked_groups > len(groups):
        raise ValueError(f"{what} {unlocked_groups} is more than the {len(groups)} groups of this tower")
    for group in groups[: len(groups) - unlocked_groups]:
        for member in group:
            member.requires_grad_(False)
    for layer in tower.modules():
        if isinstance(layer, BatchNorm) and not layer.weight.requires_grad:
            layer.locked = True
            layer.eval()
