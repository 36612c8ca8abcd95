"""Near-duplicates between the training shards and evaluation sets, and what they do to accuracy.

`python -m trainer.overlap runs/declip` uses the run's training data and its evaluation sets with classes; for each set
it prints accuracy on all pictures, on those without and on those with a near-duplicate in the training set, as in
Radford et al., 2021, section 5. Several ranks share the work: `torchrun --nproc_per_node 8 -m trainer.overlap ...`.
"""

import argparse
import sys
from typing import Any

import numpy as np

from data.paths import path_argument
from data.writing import try_file, writing_to
from trainer.config.start import saved_config
from trainer.ranks.launch import Place, find_place
from trainer.ranks.shutdown import end_process, reported_errors

_ADVICE = "choose another file with --out"
_CONFIDENCE = 0.995


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.overlap",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run_dir", type=path_argument, metavar="RUN", help="folder of a training run")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest complete one)")
    parser.add_argument("--distance", type=int, default=4, help="bits of 64 in which two hashes may differ, 0 to 15")
    parser.add_argument("--max_train_samples", type=int, help="compare with the first so many training samples only")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--out", type=path_argument, metavar="FILE", help="JSON (default: RUN/evaluation/overlap_step_N.json)"
    )
    return parser.parse_args(argv)


def overlap_figures(hit: np.ndarray, duplicate: np.ndarray) -> dict[str, float]:
    """Accuracy with and without near-duplicates.

    Args:
        hit: bool [n], whether each picture was classified correctly.
        duplicate: bool [n], whether the training set has a near-duplicate of it.

    Returns:
        `overlap` (share of duplicates), `acc1_all`, `acc1_clean`, `acc1_overlap`, `gain` (all minus clean), and for the
        difference between overlap and clean CLIP's statistics: `p_value` (one-sided binomial test of the duplicates'
        hits against the clean accuracy) and the 99.5 % Clopper-Pearson interval `overlap_low` to `overlap_high`.
        What has no pictures is absent.
    """
    from scipy.stats import binomtest

    figures = {"overlap": float(duplicate.mean()), "acc1_all": float(hit.mean())}
    if not duplicate.all():
        figures["acc1_clean"] = float(hit[~duplicate].mean())
        figures["gain"] = figures["acc1_all"] - figures["acc1_clean"]
    if duplicate.any():
        figures["acc1_overlap"] = float(hit[duplicate].mean())
        expected = figures.get("acc1_clean", 0.0)
        test = binomtest(int(hit[duplicate].sum()), int(duplicate.sum()), expected, alternative="greater")
        two_sided = binomtest(int(hit[duplicate].sum()), int(duplicate.sum()), expected)
        interval = two_sided.proportion_ci(_CONFIDENCE, method="exact")
        figures["p_value"] = float(test.pvalue)
        figures["overlap_low"], figures["overlap_high"] = float(interval.low), float(interval.high)
    return figures


def find_overlap(arguments: argparse.Namespace, place: Place) -> None:
    """Hash, match, evaluate, report. Collective."""
    import torch.distributed as dist

    from data.overlap import hash_pictures, nearest_within
    from trainer.engine.device import select_device
    from trainer.engine.engine import init_distributed
    from trainer.errors import ConfigError
    from trainer.evaluation import Evaluation
    from trainer.evaluation.evaluation import labels_of
    from trainer.evaluation.results import write_json
    from trainer.evaluation.zero_shot import zero_shot_ranks
    from trainer.metrics import Console
    from trainer.pipeline import index_sources, index_store, patience, resolve_workers
    from trainer.ranks.agreement import on_main, together
    from trainer.tables import make_table
    from trainer.trained import TrainedModel, load_trained, run_config

    if not 0 <= arguments.distance <= 15:
        raise ConfigError(f"--distance {arguments.distance} is not in 0 to 15")
    config = run_config(arguments.run_dir)
    device = select_device(arguments.device, place)
    init_distributed(device, place, resolve_workers(config, place))
    console = Console(place.is_main)
    out = arguments.out or arguments.run_dir / "evaluation" / "overlap.json"
    on_main(lambda: try_file(out, _ADVICE))
    trained = together(lambda: load_trained(arguments.run_dir, arguments.step))
    evaluation = together(lambda: Evaluation(config, trained.tokenizer, place))
    classified = [data for data in evaluation.sets if "zero_shot" in data.tasks]
    if not classified:
        raise ConfigError(f"the recipe of {arguments.run_dir} has no evaluation set with zero_shot; nothing to compare")
    model, workers, store = TrainedModel(trained.method, device), resolve_workers(config, place), index_store(config)

    def all_hashes(samples: Any, limit: int | None) -> tuple[np.ndarray, np.ndarray]:
        options = {"rank": place.rank, "world_size": place.world_size, "workers": workers, "max_samples": limit}
        options["patience"] = patience(config)
        found = together(lambda: hash_pictures(samples, store, **options))
        parts: list[Any] = [None] * place.world_size
        dist.all_gather_object(parts, found)
        indices, hashes = (np.concatenate(column) for column in zip(*parts, strict=True))
        _warn_of_unreadable(console, samples, limit, len(indices))
        order = np.argsort(indices)
        return indices[order], hashes[order]

    console.line("hashing the training pictures")
    _, train_hashes = all_hashes(index_sources(config, place), arguments.max_train_samples)
    records, rows = [], []
    for data in classified:
        embedded = evaluation.embed(model, data, data.test)
        labels = labels_of(embedded, data)
        classes = evaluation.classes(model, data, data.class_names)
        hit = (zero_shot_ranks(embedded.images, labels, classes) == 0).cpu().numpy()
        # Both passes leave out the same unreadable pictures, so rows correspond.
        _, hashes = all_hashes(data.test, data.max_samples)
        near = nearest_within(hashes, train_hashes, arguments.distance)
        figures = overlap_figures(hit, near >= 0)
        keys = [embedded.metadata[row]["key"] for row in np.flatnonzero(near >= 0)]
        records.append({"dataset": data.name, "distance": arguments.distance, "metrics": figures, "duplicates": keys})
        shares = ("overlap", "acc1_all", "acc1_clean", "acc1_overlap", "gain")
        cells = [f"{figures[name]:.2%}" if name in figures else "" for name in shares]
        rows.append((data.name, *cells, f"{figures['p_value']:.3g}" if "p_value" in figures else ""))
    if place.is_main:
        path = arguments.out or out.with_name(f"overlap_{trained.checkpoint.name}.json")
        with writing_to(path, _ADVICE):
            write_json(path, {"train_samples": len(train_hashes), "sets": records})
        console.table(make_table(("set", "overlap", "all", "clean", "overlapping", "gain", "p"), rows))
        console.line(f"figures and the keys of near-duplicates in {path}")


def _warn_of_unreadable(console: Any, samples: Any, limit: int | None, hashed: int) -> None:
    parts = samples if isinstance(samples, list) else [samples]
    total = sum(part.num_samples for part in parts)
    total = min(total, limit or total)
    if hashed < total:
        console.warn(f"{total - hashed} of {total} pictures cannot be read and are not compared")


def main(argv: list[str]) -> None:
    """Parse and compare."""
    arguments = parse_arguments(argv)
    place = find_place()
    with reported_errors(place):
        # What is no run is said before the seconds that torch takes to import.
        saved_config(arguments.run_dir)
        find_overlap(arguments, place)


if __name__ == "__main__":
    end_process(main, sys.argv[1:])
