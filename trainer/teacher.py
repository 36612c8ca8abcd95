"""Features of an external teacher for ProtoCLIP: a frozen language model's view of every training caption.

`python -m trainer.teacher --model FacebookAI/roberta-large --recipe protoclip_cc3m_rn50 --out teacher.npy` reads the
recipe's training shards, takes the mean of the model's last states over the tokens of each caption at unit length,
reduces them to `--dim` principal components, and writes a row for each sample, in stored order, for
`method.external_teacher`. Several ranks share the work: `torchrun --nproc_per_node 8 -m trainer.teacher ...`.

Source: Chen et al., "Prototypical Contrastive Language Image Pretraining", 2022.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.paths import path_argument
from data.writing import try_file, writing_to
from trainer.ranks.launch import Place, find_place
from trainer.ranks.shutdown import end_process, reported_errors

if TYPE_CHECKING:
    import torch

    from data.captions.hf_tokenizer import HfTokenizer
    from losses.row_store import RowStore
    from models.hf_towers import HfTextTower

_ADVICE = "choose another file with --out"
_CHUNK_ROWS = 1 << 16


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.teacher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        type=lambda text: str(path_argument(text)),
        required=True,
        help="text model of transformers: hub name or folder",
    )
    parser.add_argument("--recipe", default="protoclip_demo", help="whose data.train is read (default: protoclip_demo)")
    parser.add_argument("--data", metavar="SHARDS", help="other shards than the recipe's")
    parser.add_argument("--dim", type=int, default=64, help="principal components that are kept (default: 64)")
    parser.add_argument("--context_length", type=int, default=77, help="longest caption in tokens (default: 77)")
    parser.add_argument("--batch_size", type=int, default=256, help="captions at a time (default: 256)")
    parser.add_argument("--memory_gib", type=float, default=4.0, help="of a rank; more features go to TMPDIR")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--out", type=path_argument, required=True, metavar="FILE", help="the .npy file to write")
    return parser.parse_args(argv)


class CaptionOnly:
    """A transform that leaves the picture undecoded."""

    def __call__(self, image_bytes: bytes) -> np.ndarray:
        return np.zeros((3, 1, 1), dtype=np.uint8)


def over_ranks(values: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """The sum over ranks of a CPU tensor, by way of the device that the ranks talk through. Collective."""
    from losses.distributed import all_reduce_sum_

    return all_reduce_sum_(values.to(device)).cpu()


def principal_components(store: "RowStore", dim: int, device: "torch.device") -> tuple["torch.Tensor", "torch.Tensor"]:
    """Mean float64 [D] and the first `dim` axes float64 [D, dim] of the rows of all ranks. Collective.

    The axes are fixed but for rounding: the entry of each that is largest in size is positive.
    """
    import torch

    total = torch.zeros(store.dim + 1, dtype=torch.float64)
    moments = torch.zeros(store.dim, store.dim, dtype=torch.float64)
    for rows in chunks(store):
        total[:-1] += rows.sum(0)
        total[-1] += len(rows)
        moments += rows.T @ rows
    total, moments = over_ranks(total, device), over_ranks(moments, device)
    mean = total[:-1] / total[-1]
    axes = torch.linalg.eigh(moments / total[-1] - torch.outer(mean, mean)).eigenvectors.flip(1)[:, :dim]
    signs = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return mean, axes * signs


def chunks(store: "RowStore") -> Iterator["torch.Tensor"]:
    """The rows, some at a time, in float64."""
    for start in range(0, len(store), _CHUNK_ROWS):
        yield store.rows(start, start + _CHUNK_ROWS).double()


def make_teacher(arguments: argparse.Namespace, place: Place) -> None:
    """Encode, reduce, write. Collective."""
    import torch
    import torch.distributed as dist

    from data.captions.hf_tokenizer import HfTokenizer
    from data.loader import build_eval_loader
    from losses.row_store import RowStore
    from models.hf_backbone import read_hf_config
    from models.hf_towers import HfTextTower
    from trainer.engine.device import select_device
    from trainer.engine.engine import init_distributed
    from trainer.errors import ConfigError
    from trainer.loading import load_config
    from trainer.metrics import Console
    from trainer.pipeline import index_sources, index_store, patience, resolve_workers
    from trainer.ranks.agreement import on_main, together

    config = load_config(arguments.recipe, {} if arguments.data is None else {"data.train": arguments.data})
    device = select_device(arguments.device, place)
    init_distributed(device, place, resolve_workers(config, place))
    console = Console(place.is_main)
    on_main(lambda: try_file(arguments.out, _ADVICE, make=False))

    def open_model() -> tuple[Any, Any]:
        try:
            tokenizer = HfTokenizer(arguments.model, arguments.context_length)
            width = getattr(read_hf_config(arguments.model, "text"), "hidden_size", 0)
            if not 1 <= arguments.dim <= width:
                raise ConfigError(f"--dim {arguments.dim} is not in 1 to {width}, the width of {arguments.model}")
            tower = HfTextTower(
                arguments.model,
                vocab_size=tokenizer.vocab_size,
                context_length=arguments.context_length,
                embed_dim=width,
                pooling="mean",
                projection="none",
            )
            tower.load_pretrained()
        except ValueError as error:
            raise ConfigError(f"--model {arguments.model}: {error}") from None
        return tokenizer, tower.to(device).eval()

    tokenizer, tower = together(open_model)
    sources = index_sources(config, place)
    count = sum(source.num_samples for source in sources)
    # Tells before hours of work that the result has no place.
    on_main(lambda: _create(arguments.out, count, arguments.dim))
    loader = build_eval_loader(
        sources,
        CaptionOnly(),
        store=index_store(config),
        rank=place.rank,
        world_size=place.world_size,
        batch_size=arguments.batch_size,
        workers=resolve_workers(config, place),
        pin_memory=device.type == "cuda",
        patience=patience(config),
    )
    share = (-(-count // arguments.batch_size) // place.world_size + 1) * arguments.batch_size
    store = RowStore(share, tower.width, int(arguments.memory_gib * 2**30))
    console.line(f"encoding {count} captions with {arguments.model}")
    places = together(lambda: encode_captions(loader, tokenizer, tower, device, store))
    unreadable = count - int(over_ranks(torch.tensor(len(places)), device))
    if unreadable:
        console.warn(f"{unreadable} of {count} captions cannot be read and have rows of zeros")
    mean, axes = principal_components(store, arguments.dim, device)
    written = np.load(arguments.out, mmap_mode="r+")
    for start, rows in zip(range(0, len(store), _CHUNK_ROWS), chunks(store), strict=True):
        written[places[start : start + _CHUNK_ROWS]] = ((rows - mean) @ axes).float().numpy()
    written.flush()
    dist.barrier()
    console.line(f"{count} rows of {arguments.dim} in {arguments.out}: --method.external_teacher {arguments.out}")


def encode_captions(
    loader: Iterable[dict[str, Any]],
    tokenizer: "HfTokenizer",
    tower: "HfTextTower",
    device: "torch.device",
    store: "RowStore",
) -> np.ndarray:
    """Append the features of each sample's first caption, unit length, and return the samples' places int64 [n]."""
    import torch

    from losses import normalize

    places = [np.zeros(0, dtype=np.int64)]
    for batch in loader:
        encoded = [tokenizer.encode(captions[0]) for captions in batch["captions"]]
        lengths = torch.tensor([len(ids) for ids in encoded])
        token_ids = torch.full((len(encoded), int(lengths.max())), tokenizer.pad_id)
        for row, ids in zip(token_ids, encoded, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        with torch.no_grad():
            store.append(normalize(tower(token_ids.to(device), lengths)[0]))
        places.append(batch["sample_index"].numpy())
    return np.concatenate(places)


def _create(path: Path, count: int, dim: int) -> None:
    with writing_to(path, _ADVICE):
        np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, dim)).flush()


def main(argv: list[str]) -> None:
    """Parse and make."""
    arguments = parse_arguments(argv)
    place = find_place()
    with reported_errors(place):
        make_teacher(arguments, place)


if __name__ == "__main__":
    end_process(main, sys.argv[1:])
