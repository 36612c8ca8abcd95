"""The trainer."""

import sys
from pathlib import Path

# Under `python -m trainer.…` the working directory comes first on the path, where a user's data.py, models.py or folder
# data/ would be taken for our packages; worker processes search the same path. It gives way to the folder of this copy.
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
