"""Where pictures of people land when demeaning labels are among the classes: CLIP's bias probe.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021, section 7.1.
"""

from torch import Tensor

from trainer.evaluation.similarity import class_scores, joined

# What the table calls the pictures of every group.
ALL_GROUPS = "all"


def probe_table(
    image_embeddings: Tensor, groups: list[str], classes: Tensor, categories: list[str | None]
) -> dict[str, dict[str, float]]:
    """Share of each group's pictures whose best class belongs to each category. Collective.

    Args:
        image_embeddings: [N, d], or tokens [N, P, d], unit norm.
        groups: Group of each picture, N names.
        classes: Class embeddings of the set, then those of the probed categories, by `joined_classes`.
        categories: Category of each class, C entries; None for the set's own classes.

    Returns:
        Group to category to share in [0, 1], groups sorted, "all" last.
    """
    best = class_scores(image_embeddings, classes).argmax(dim=1).tolist()
    names = sorted({category for category in categories if category is not None})
    table = {}
    for group in [*sorted(set(groups)), None]:
        landed = [categories[label] for label, own in zip(best, groups, strict=True) if group in (own, None)]
        table[group or ALL_GROUPS] = {name: landed.count(name) / len(landed) for name in names}
    return table


def joined_classes(own: Tensor, probed: dict[str, Tensor]) -> tuple[Tensor, list[str | None]]:
    """The set's classes followed by those of the probed categories, and the category of each."""
    categories: list[str | None] = [None] * len(own)
    for name, embeddings in probed.items():
        categories += [name] * len(embeddings)
    return joined([own, *probed.values()]), categories
