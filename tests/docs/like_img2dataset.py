"""Stands in for img2dataset, whose webdataset is older than ours: the arguments of the guide, and the same layout."""

import argparse
import csv
import io
import json
import time
import urllib.request
from pathlib import Path

import webdataset
from PIL import Image


def fetch(url: str) -> bytes:
    """A picture. The server may still be starting."""
    for _ in range(100):
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.read()
        except OSError as error:
            reason = error
            time.sleep(0.1)
    raise reason


def main() -> None:
    """Download and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--url_list", type=Path, required=True)
    parser.add_argument("--output_folder", type=Path, required=True)
    parser.add_argument("--number_sample_per_shard", type=int, required=True)
    arguments, _ = parser.parse_known_args()
    arguments.output_folder.mkdir()
    with arguments.url_list.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for shard, begin in enumerate(range(0, len(rows), arguments.number_sample_per_shard)):
        base = arguments.output_folder / f"{shard:05d}"
        part = rows[begin : begin + arguments.number_sample_per_shard]
        with webdataset.TarWriter(f"{base}.tar") as tar:
            for index, row in enumerate(part):
                encoded = io.BytesIO()
                Image.open(io.BytesIO(fetch(row["url"]))).save(encoded, "JPEG", quality=95)
                key = f"{shard:05d}{index:04d}"
                record = {**row, "key": key, "status": "success", "width": 64, "height": 64, "exif": "{}"}
                tar.write({"__key__": key, "jpg": encoded.getvalue(), "json": record, "txt": row["caption"]})
        Path(f"{base}_stats.json").write_text(json.dumps({"count": len(part), "successes": len(part)}))


if __name__ == "__main__":
    main()
