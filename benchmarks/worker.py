"""The fresh process of one measurement: reads a job from standard input, writes its result to standard output."""

import importlib
import json
import os
import sys


def main() -> None:
    """Runs the job named on standard input."""
    # Libraries print to standard output; the result gets a descriptor of its own before any of them is imported.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as results:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        request = json.load(sys.stdin)
        import torch

        from benchmarks.harness import return_freed_memory

        torch.set_num_threads(1)
        return_freed_memory()
        function = getattr(importlib.import_module(request["module"]), request["function"])
        json.dump(function(**request["arguments"]).as_dict(), results)


if __name__ == "__main__":
    main()
