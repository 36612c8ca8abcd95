"""What a trained model sees: a similarity matrix, nearest pictures of captions, best and worst classes."""

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from data.captions.tokenizer import CaptionTokenizer
from data.loader import read_eval_samples
from data.sample import EvalTransform
from trainer.config.sections import RunConfig
from trainer.evaluation import Evaluation
from trainer.evaluation.encode import encode_texts
from trainer.evaluation.evaluation import Embedded, labels_of
from trainer.evaluation.sets import EvalData
from trainer.evaluation.similarity import class_scores, pairwise_scores
from trainer.evaluation.zero_shot import score_ranks
from trainer.pipeline import index_store
from trainer.ranks.agreement import together
from trainer.ranks.launch import Place
from trainer.report.curves import Picture, new_figure, to_svg
from trainer.trained import TrainedModel

_MATRIX_ROWS = 32
_QUERIES = 12
_NEAREST = 6
_CLASSES = 10
_THUMBNAIL = 72
_MAX_SAMPLES = 5000


@dataclass(frozen=True)
class Found:
    """One picture found for a caption, as a data URL; `right` if it is the caption's own."""

    image: str
    score: float
    right: bool


@dataclass(frozen=True)
class Query:
    """A caption, the pictures nearest to it, and the position of its own among all."""

    caption: str
    found: list[Found]
    rank: int


@dataclass(frozen=True)
class ClassScore:
    """Accuracy of one class, with one of its pictures."""

    name: str
    accuracy: float
    samples: int
    confused_with: str
    image: str


@dataclass(frozen=True)
class Examples:
    """The model's part of the page for one evaluation set; empty lists where the set has no captions or classes."""

    set_name: str
    matrix: Picture | None
    queries: list[Query]
    best: list[ClassScore]
    worst: list[ClassScore]


def collect_examples(
    config: RunConfig, model: TrainedModel, tokenizer: CaptionTokenizer, place: Place
) -> list[Examples]:
    """Examples of every evaluation set of a recipe, from its first samples. Collective."""
    sets = {
        name: entry.model_copy(update={"max_samples": _limit(entry.max_samples)})
        for name, entry in config.eval.sets.items()
    }
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"sets": sets})})
    evaluation = together(lambda: Evaluation(config, tokenizer, place))
    return [_of_set(evaluation, config, model, tokenizer, data) for data in evaluation.sets]


def _limit(given: int | None) -> int:
    return min(given or _MAX_SAMPLES, _MAX_SAMPLES)


def _of_set(
    evaluation: Evaluation, config: RunConfig, model: TrainedModel, tokenizer: CaptionTokenizer, data: EvalData
) -> Examples:
    test = evaluation.embed(model, data, data.test)
    thumbnails = _Thumbnails(config, data, test)
    matrix, queries = None, []
    if "retrieval" in data.tasks and all(test.captions):
        texts = encode_texts(model, tokenizer, [captions[0] for captions in test.captions], config.eval.batch_size)
        matrix = _matrix(pairwise_scores(test.images[:_MATRIX_ROWS], texts[:_MATRIX_ROWS]))
        queries = _queries(test, texts, thumbnails)
    best, worst = [], []
    if "zero_shot" in data.tasks:
        best, worst = _classes(test, data, evaluation.classes(model, data, data.class_names), thumbnails)
    return Examples(data.name, matrix, queries, best, worst)


def _matrix(scores: torch.Tensor) -> Picture:
    figure, axes = new_figure(5.4, 4.6)
    image = axes.imshow(scores.float().cpu().numpy(), cmap="viridis")
    figure.colorbar(image, ax=axes, label="cosine")
    axes.set_xlabel("caption")
    axes.set_ylabel("picture")
    axes.set_title(f"similarity of the first {len(scores)} pairs")
    return Picture("similarity matrix", to_svg(figure))


def _queries(test: Embedded, texts: torch.Tensor, thumbnails: "_Thumbnails") -> list[Query]:
    # Spread over the set, so that neighbouring samples of one kind do not fill the page.
    rows = np.unique(np.linspace(0, len(texts) - 1, min(_QUERIES, len(texts))).astype(int)).tolist()
    queries = []
    for row in rows:
        scores = pairwise_scores(texts[row : row + 1], test.images)[0]
        order = scores.argsort(descending=True, stable=True)[:_NEAREST].tolist()
        found = [Found(thumbnails.url(index), float(scores[index]), index == row) for index in order]
        rank = int((scores > scores[row]).sum()) + 1
        queries.append(Query(test.captions[row][0], found, rank))
    return queries


def _classes(
    test: Embedded, data: EvalData, classes: torch.Tensor, thumbnails: "_Thumbnails"
) -> tuple[list[ClassScore], list[ClassScore]]:
    labels = labels_of(test, data)
    scores = class_scores(test.images, classes)
    hit, predicted = score_ranks(scores, labels) == 0, scores.argmax(dim=1)
    scored = []
    for label in labels.unique().tolist():
        own = labels == label
        wrong = predicted[own & (predicted != label)]
        confused = data.class_names[int(wrong.mode().values)] if len(wrong) else ""
        first = int(own.nonzero()[0])
        accuracy = float(hit[own].double().mean())
        scored.append((accuracy, label, int(own.sum()), confused, first))
    ordered = sorted(scored, key=lambda entry: (-entry[0], entry[1]))
    count = min(_CLASSES, len(ordered))
    worst = sorted(ordered[len(ordered) - count :], key=lambda entry: (entry[0], entry[1]))
    return (
        [_class_score(entry, data, thumbnails) for entry in ordered[:count]],
        [_class_score(entry, data, thumbnails) for entry in worst],
    )


def _class_score(entry: tuple[float, int, int, str, int], data: EvalData, thumbnails: "_Thumbnails") -> ClassScore:
    accuracy, label, samples, confused, first = entry
    return ClassScore(data.class_names[label], accuracy, samples, confused, thumbnails.url(first))


class _Thumbnails:
    """Small pictures of a set's samples, as data URLs."""

    def __init__(self, config: RunConfig, data: EvalData, test: Embedded) -> None:
        self._transform = EvalTransform(_THUMBNAIL, None, config.data.max_image_pixels)
        self._data = data
        self._store = index_store(config)
        self._rows = test.rows
        self._made: dict[int, str] = {}

    def url(self, row: int) -> str:
        """Data URL of the picture in a row of the embeddings."""
        if row not in self._made:
            (pixels,) = read_eval_samples(self._data.test, [self._rows[row]], self._transform, self._store)
            stream = io.BytesIO()
            Image.fromarray(pixels.transpose(1, 2, 0)).save(stream, "PNG")
            self._made[row] = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
        return self._made[row]
