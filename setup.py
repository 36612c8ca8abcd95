"""Packaging of declip-trainer."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


class BuildWithConfigurations(build_py):
    """Puts ds_configs/, which lies beside the packages in a checkout, inside trainer/ in an installed copy."""

    def run(self) -> None:
        """Build as ever, then copy; an editable installation finds the checkout's."""
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "trainer" / "ds_configs"
            shutil.copytree(ROOT / "ds_configs", target, dirs_exist_ok=True)


setup(
    name="declip-trainer",
    version="0.1.0",
    description="Distributed DeepSpeed trainer for CLIP, DeCLIP and the data-efficient CLIP family",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["trainer*", "models*", "losses*", "data*"]),
    # Said so that an editable installation puts this folder on the path. Otherwise setuptools looks for our packages
    # after everything else, and a folder "data" in the working directory comes first.
    package_dir={"": "."},
    cmdclass={"build_py": BuildWithConfigurations},
    package_data={"trainer": ["recipes/*.yaml", "report/*.j2"], "models": ["hf_configs/*/config.json"]},
    install_requires=[
        "torch>=2.11",
        "torchvision",
        # The first in which ZeRO 1 and 2 can leave the gradient norm to the trainer, as far as tested.
        "deepspeed>=0.19.8",
        # Hugging Face towers and exports. Older versions name the parts of their models otherwise.
        "transformers>=5.23",
        "timm>=1.0",
        # The byte-level BPE vocabulary of CLIP ships inside this package.
        "open_clip_torch>=3.0",
        "tokenizers>=0.20",
        "ftfy",
        "regex",
        "webdataset>=1.0",
        "numpy>=1.26",
        "pillow>=10.1",
        "pydantic>=2.6",
        "pyyaml",
        "rich>=13",
        "tensorboard",
        "safetensors>=0.5",
        "filelock",
        "psutil",
        "fsspec",
        # The typefaces of the built-in set, and the curves of reports.
        "matplotlib>=3.8",
        "jinja2>=3.1",
        # Near-duplicate search and its statistics.
        "imagehash>=4.3",
        "scipy>=1.11",
        "fonttools",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist[psutil]>=3.6",
            "hypothesis",
            "scikit-learn>=1.4",
            "ruff>=0.6",
            "faiss-cpu>=1.14",
            "onnx>=1.16",
            "onnxscript>=0.5",
            "onnxruntime>=1.18",
            # Its command line judges our exports; it imports requests without requiring it.
            "clip-benchmark>=1.6.2",
            "requests",
            # Looks at reports in the Chromium of the machine.
            "playwright>=1.45",
        ],
        # method.name protoclip. A faiss built for GPUs, where there is one, takes its place.
        "cluster": ["faiss-cpu>=1.14"],
        # python -m trainer.export --to onnx
        "export": ["onnx>=1.16", "onnxscript>=0.5"],
        # mpich is a whole MPI from PyPI; leave the extra out where the cluster brings mpi4py with its own MPI.
        "mpi": ["mpi4py>=4", "mpich"],
        "remote": ["s3fs", "gcsfs", "huggingface_hub"],
        "tracking": ["wandb"],
    },
)
