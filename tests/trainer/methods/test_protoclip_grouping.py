"""What ProtoCLIP's prototypes are for: features group by class sooner than InfoNCE alone groups them."""

import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from losses import normalize
from losses.clustering import kmeans, nearest
from models.clip import LogitScale
from trainer.config.sections import TrainConfig
from trainer.methods import parse_method
from trainer.methods.protoclip import ProtoclipMethod

CLASSES, WIDTH = 4, 16
BATCH, EPISODE_STEPS, EPISODES = 64, 8, 10


class TinyTowers(nn.Module):
    """Two small perceptrons over vectors, in place of a `ClipModel`."""

    embed_dim = WIDTH
    pixel_mean = pixel_std = (1.0, 1.0, 1.0)

    def __init__(self) -> None:
        super().__init__()
        self.image_tower = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH))
        self.text_tower = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH))
        self.logit_scale = LogitScale()


class VectorProtoclip(ProtoclipMethod):
    """The method, fed with vectors."""

    def encode(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "image_features": self.model.image_tower(batch["images"])[None],
            "text_features": self.model.text_tower(batch["texts"])[None],
            "position": batch["position"],
        }


def draw_pairs(world: int, count: int, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Images and texts, and the classes of each.

    A pair shares its class and a little of its own, among noise of more variance than either; three in ten texts
    belong to another pair.
    """
    layout, generator = torch.Generator().manual_seed(world), torch.Generator().manual_seed(seed)
    shared = torch.randn(count, 8, generator=generator) / 2
    images = torch.randint(CLASSES, (count,), generator=generator)
    others = torch.randint(CLASSES, (count,), generator=generator)
    classes = [images, torch.where(torch.rand(count, generator=generator) < 0.3, others, images)]
    vectors = []
    for own in classes:
        scale = torch.tensor([0.5] * 4 + [0.2] * 8 + [2.0] * 4)
        vector = scale * torch.randn(count, WIDTH, generator=generator)
        vector[:, :12] += torch.cat([2 * nn.functional.one_hot(own, CLASSES), shared], dim=1)
        vectors.append(vector @ torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=layout))[0])
    return vectors, classes


def agreement(method: VectorProtoclip, vectors: list[Tensor], classes: list[Tensor]) -> float:
    """Adjusted Rand index of the classes and of clusters of the towers' features, the mean over both modalities."""
    found = []
    with torch.no_grad():
        for tower, rows, own in zip((method.model.image_tower, method.model.text_tower), vectors, classes, strict=True):
            features = normalize(tower(rows))
            result = kmeans(features, torch.arange(len(features)), len(features), CLASSES, iterations=10, restarts=3)
            found.append(adjusted_rand_score(own.numpy(), nearest(features, result.centroids)[0].numpy()))
    return sum(found) / 2


def agreement_while_training(world: int, with_prototypes: bool) -> float:
    """The mean over the ends of every second episode, on pairs that are not trained on."""
    (images, texts), _ = draw_pairs(world, BATCH * EPISODE_STEPS, seed=2 * world)
    unseen = draw_pairs(world, 512, seed=2 * world + 1)
    settings = {
        "name": "protoclip",
        "episode_steps": EPISODE_STEPS,
        # Without, prototypes would begin where this ends.
        "warmup_episodes": 0 if with_prototypes else EPISODES,
        "clusters": 4 * CLASSES,
        "cluster_iterations": 10,
        "cluster_restarts": 1,
        "head_dim": 8,
        "head_hidden_dim": 32,
    }
    torch.manual_seed(world)
    method = VectorProtoclip(TinyTowers(), parse_method(settings)[1], None)
    method.begin_run(TrainConfig(steps=(EPISODES + 1) * EPISODE_STEPS, global_batch_size=BATCH), None)
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-3)

    def batch(number: int) -> dict[str, Tensor]:
        rows = torch.arange(BATCH) + number % EPISODE_STEPS * BATCH
        return {"images": images[rows], "texts": texts[rows], "position": torch.arange(BATCH) + number * BATCH}

    agreements = []
    for number in range(EPISODES * EPISODE_STEPS):
        due = method.begin_step(number + 1, number)
        assert (due is not None) == (with_prototypes and number % EPISODE_STEPS == 0)
        if due is not None:
            method.eval()
            with torch.no_grad():
                for seen in map(batch, due):
                    method.collect(method("preview", seen), seen)
            method.end_preview()
            method.train()
        optimizer.zero_grad()
        method("train", {"micro_batches": [batch(number)]})["loss"].backward()
        optimizer.step()
        if (number + 1) % (2 * EPISODE_STEPS) == 0:
            agreements.append(agreement(method, *unseen))
    return sum(agreements) / len(agreements)


def test_features_group_by_class_sooner_with_prototypes():
    without, with_prototypes = ([agreement_while_training(world, active) for world in range(4)] for active in (0, 1))
    assert sum(with_prototypes) > 1.05 * sum(without)
