"""Export the model of a run for other libraries."""

import argparse
import sys

from data.errors import escape_unencodable, printable
from data.paths import path_argument
from trainer.config.start import saved_config
from trainer.export import FORMATS
from trainer.ranks.shutdown import plain_errors

_EPILOG = """examples:
  python -m trainer.export runs/declip --to openclip
  python -m trainer.export runs/declip --to huggingface --step 10000 --out exports/declip
  python -m trainer.export runs/declip --to safetensors --weights trained

openclip     open_clip.create_model_and_transforms('local-dir:DIR'), open_clip.get_tokenizer('local-dir:DIR')
huggingface  transformers.CLIPModel.from_pretrained('DIR'), transformers.CLIPProcessor.from_pretrained('DIR')
safetensors  this project's names; start another run from it with --model.pretrained DIR
onnx         image_encoder.onnx and text_encoder.onnx; needs pip install 'declip-trainer[export]'
"""


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer.export",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=path_argument, metavar="RUN", help="folder of the run")
    parser.add_argument("--to", required=True, choices=FORMATS, help="format")
    parser.add_argument("--step", type=int, metavar="N", help="which checkpoint (default: the newest)")
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="folder to write (default: RUN/export/<format>-step_<N>)"
    )
    parser.add_argument(
        "--weights",
        choices=("auto", "trained", "ema"),
        default="auto",
        help="the trained weights or their moving average (default: the average where the run kept one)",
    )
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Export one checkpoint; returns the exit code."""
    arguments = parse_arguments(argv)
    escape_unencodable()
    # What is no run is said before the seconds that torch takes to import.
    saved_config(arguments.run)
    from trainer.export.export import check_out, export, load_run

    # Before the weights are read.
    check_out(arguments.out or arguments.run / "export" / "step")
    exported = load_run(arguments.run, arguments.step, arguments.weights)
    out = arguments.out or exported.run / "export" / f"{arguments.to}-step_{exported.step}"
    export(exported, arguments.to, out)
    wrote = f"wrote {arguments.to} of {exported.run} step {exported.step} ({exported.weights} weights) to {out}"
    print(printable(wrote, None))
    return 0


if __name__ == "__main__":
    with plain_errors():
        sys.exit(main(sys.argv[1:]))
