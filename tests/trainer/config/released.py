"""What DeCLIP's authors released, in our settings: the one table that recipes which claim it are compared with.

Read in Sense-GVT/DeCLIP at 5d99a85: the `config.yaml` of each experiment, and in the code what those leave open. Keys
are those of a recipe; `views.<role>` is the augmentation of a role, resolved, and `method.w_*` the weights in force.
"""

import dataclasses
import math
from typing import Any, NamedTuple

from models.registry import find_architecture
from trainer.config.sections import RunConfig
from trainer.methods import parse_method
from trainer.views import augmentation


class Deviation(NamedTuple):
    """Where a recipe is not the release.

    Attributes:
        ours: What the recipe has instead.
        said: Words of docs/methods.md or of the recipe's own comment, or of one it extends, that say so.
    """

    ours: Any
    said: str


_CROP = {
    "crop_scale": (0.5, 1.0),
    "crop_ratio": (3 / 4, 4 / 3),
    "interpolation": "bilinear",
    "jitter_probability": 0.0,
    "grayscale_probability": 0.0,
    "blur_probability": 0.0,
    "flip_probability": 0.0,
}
_MOCO = {
    **_CROP,
    "crop_scale": (0.2, 1.0),
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "jitter_probability": 0.8,
    "grayscale_probability": 0.2,
    "blur_probability": 0.5,
    "blur_sigma": (0.1, 2.0),
    "flip_probability": 0.5,
}

_ALL = {
    "model.text_projection_bias": True,
    "model.init": "declip",
    "model.activation": "quick_gelu",
    "model.context_length": 77,
    "model.pixel_mean": (0.485, 0.456, 0.406),
    "model.pixel_std": (0.229, 0.224, 0.225),
    "model.batch_norm": "local",
    "method.logit_scale_min": 3.0,
    "method.logit_scale_max": 6.0,
    "data.mask_token": True,
    "data.caption": "first",
    "eval.resize_size": 256,
    "eval.interpolation": "bilinear",
    "optimizer.gradient_clipping": 0.0,
    "schedule.end_lr": 0.0,
    "train.ema_decay": None,
}
_VIT = {"model.name": "vit_b32", "model.embed_dim": 512, "model.freeze_patch_embed": True}
_RN50 = {"model.name": "rn50", "model.embed_dim": 1024, "model.freeze_patch_embed": False}
_YFCC = {
    **_ALL,
    "optimizer.name": "adamw",
    "optimizer.lr": 1e-3,
    "optimizer.betas": (0.9, 0.98),
    "optimizer.eps": 1e-8,
    "optimizer.weight_decay": 0.1,
    "optimizer.no_decay": ["norms", "biases", "temperatures"],
    "optimizer.groups": {},
    "schedule.warmup_steps": 2500,
    "schedule.start_lr": 1e-4,
    "train.steps": 128_001,
    "train.global_batch_size": 4096,
    "train.precision": "fp32",
}
_HALF = {"optimizer.lr": 5e-4, "optimizer.weight_decay": 0.5}
_DECLIP = {
    "method.w_clip": 0.1,
    "method.w_mvs": 0.3,
    "method.w_nns": 0.2,
    "method.w_iss": 0.2,
    "method.w_tss": 0.2,
    "method.nns_queue_size": 65536,
    "method.nns_queue": "local",
    "method.nns_warmup": "random",
    "method.nns_enqueue": "both",
    "method.nns_symmetric": False,
    "method.nns_mask_duplicates": False,
    "method.iss_bn": "local",
    "method.iss_hidden_dim": 1024,
    "method.iss_predictor_dim": 512,
    "method.mlm_probability": 0.15,
    "method.mlm_shared_pass": True,
    "data.synonyms": "wordnet",
    "views.augmented": _MOCO,
}
# No bounds at all.
_TOKENS = {
    "method.filip_dim": 256,
    "method.filip_keys": "topk",
    "method.filip_topk": 16,
    "method.filip_select": "own_pair",
    "method.logit_scale_dense_min": -math.inf,
    "method.logit_scale_dense_max": math.inf,
}
_88M = {
    **_ALL,
    **_DECLIP,
    "method.logit_scale_max": math.inf,
    "optimizer.name": "sgd",
    "optimizer.lr": 0.2,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": True,
    "optimizer.no_decay": [],
    "schedule.start_lr": 1e-3,
    "train.precision": "fp16",
}

RELEASED: dict[str, dict[str, Any]] = {
    "clip_yfcc15m_vitb32": {**_YFCC, **_VIT, "method.name": "clip", "views.base": _CROP},
    "declip_yfcc15m_vitb32": {**_YFCC, **_VIT, **_DECLIP, "method.name": "declip"},
    "declip_yfcc15m_rn50": {**_YFCC, **_RN50, **_DECLIP, "method.name": "declip"},
    "slip_yfcc15m_vitb32": {
        **_YFCC,
        **_VIT,
        **_HALF,
        "method.name": "slip",
        "method.w_clip": 1.0,
        "method.w_simclr": 1.0,
        "method.simclr_temperature": 0.1,
        "method.simclr_hidden_dim": 4096,
        "method.simclr_out_dim": 256,
        "method.simclr_bn": "local",
        "views.base": _CROP,
        "views.augmented": _MOCO,
    },
    "filip_yfcc15m_vitb32": {
        **_YFCC,
        **_VIT,
        **_HALF,
        **_TOKENS,
        "model.embed_dim": 768,
        "method.name": "filip",
        "method.w_filip": 1.0,
        "method.w_clip": 0.0,
        "views.base": _MOCO,
    },
    "defilip_yfcc15m_vitb32": {
        **_YFCC,
        **_VIT,
        **_DECLIP,
        **_TOKENS,
        "method.name": "defilip",
        "method.w_filip": 0.2,
        "method.filip_eval": "global",
    },
    "declip_88m_rn50": {
        **_88M,
        **_RN50,
        "method.name": "declip",
        "optimizer.weight_decay": 1e-4,
        "optimizer.groups": {"model.logit_scale": {"lr_factor": 0.1, "weight_decay": None}},
        "schedule.warmup_steps": 2500,
        "train.steps": 46_001,
    },
    "declip_88m_vitb32": {
        **_88M,
        **_VIT,
        "model.embed_dim": 3072,
        "method.name": "declip",
        "method.w_clip": 0.15,
        "method.w_mvs": 0.45,
        "optimizer.weight_decay": 0.0,
        "optimizer.groups": {"model.logit_scale": {"lr_factor": 0.0, "weight_decay": None}},
        "schedule.warmup_steps": 5000,
        "train.steps": 300_001,
    },
    # No file of it was released: what all runs of DeCLIP have in common.
    "declip_88m_regnety64": {**_ALL, **_DECLIP, "method.w_clip": 0.15, "method.w_mvs": 0.45},
}

_CEILING = {"method.logit_scale_max": Deviation(math.log(100.0), "The temperature's ceiling is ln 100")}
_SYNC = {"model.batch_norm": Deviation("sync", "Batch norm, in ResNets (`model.batch_norm`)")}
_STEPS = {"train.steps": Deviation(128_000, "128,000 steps; the release counts to 128,001")}
_STOCK = {"data.mask_token": Deviation(False, "The vocabulary of `clip`, `slip` and `filip` is CLIP's of 49,408")}
_ONE_QUEUE = {
    "method.nns_queue": Deviation("global", "One queue for all ranks, replicated bit for bit"),
    "method.iss_bn": Deviation("sync", "in the heads of SimSiam (`method.iss_bn`)"),
    "data.synonyms": Deviation(None, "EDA draws swap or deletion, 1/2 each"),
}
_BOUNDS = {
    "method.logit_scale_dense_min": Deviation(0.0, "The token-wise temperature has bounds"),
    "method.logit_scale_dense_max": Deviation(math.log(100.0), "The token-wise temperature has bounds"),
}
_TF32 = {"train.precision": Deviation("tf32", "tf32 stands for its fp32")}
_YFCC_DEVIATIONS = {**_CEILING, **_SYNC, **_STEPS, **_TF32}
_88M_DEVIATIONS = {
    **_CEILING,
    **_SYNC,
    **_ONE_QUEUE,
    "schedule.start_lr": Deviation(0.01, "2,500 of them warm-up from a rate of 1e-3"),
    "schedule.warmup_steps": Deviation(8594, "2,500 of them warm-up from a rate of 1e-3"),
    "train.steps": Deviation(275_000, "has 46,001 steps"),
    "train.precision": Deviation("bf16", "bf16 stands for its fp16"),
}

DEVIATIONS: dict[str, dict[str, Deviation]] = {
    "clip_yfcc15m_vitb32": {**_YFCC_DEVIATIONS, **_STOCK},
    "declip_yfcc15m_vitb32": {**_YFCC_DEVIATIONS, **_ONE_QUEUE},
    "declip_yfcc15m_rn50": {**_YFCC_DEVIATIONS, **_ONE_QUEUE},
    "slip_yfcc15m_vitb32": {
        **_YFCC_DEVIATIONS,
        **_STOCK,
        "method.simclr_bn": Deviation("sync", "Their SimCLR head normalised per rank"),
    },
    "filip_yfcc15m_vitb32": {**_YFCC_DEVIATIONS, **_STOCK, **_BOUNDS},
    "defilip_yfcc15m_vitb32": {**_YFCC_DEVIATIONS, **_ONE_QUEUE, **_BOUNDS},
    "declip_88m_rn50": _88M_DEVIATIONS,
    "declip_88m_vitb32": {
        **_88M_DEVIATIONS,
        "optimizer.name": Deviation("adamw", "Here both use AdamW"),
        "optimizer.lr": Deviation(1e-3, "trains both towers by SGD at a rate of .2 from 1e-3"),
        "optimizer.weight_decay": Deviation(0.05, "without decay"),
        "optimizer.no_decay": Deviation(["norms", "biases", "temperatures"], "without decay"),
        "optimizer.groups": Deviation({}, "the temperature not at all (rate 0"),
        "schedule.start_lr": Deviation(1e-4, "from 1e-3"),
        "schedule.warmup_steps": Deviation(8594, "5,000 steps of warm-up"),
        "train.steps": Deviation(275_000, "300,001 in all"),
    },
    "declip_88m_regnety64": {**_CEILING, **_SYNC, **_ONE_QUEUE},
}


def settings_of(config: RunConfig) -> dict[str, Any]:
    """A recipe's settings by the keys of the table."""
    found = {
        f"{section}.{key}": getattr(getattr(config, section), key)
        for section in ("model", "data", "eval", "train", "optimizer", "schedule")
        for key in type(getattr(config, section)).model_fields
    }
    found["optimizer.groups"] = {name: group.model_dump() for name, group in config.optimizer.groups.items()}
    found["model.embed_dim"] = config.model.embed_dim or find_architecture(config.model.name).embed_dim
    if config.optimizer.name == "auto":
        found["optimizer.name"] = "adamw"
    name, settings = parse_method(config.method)
    weights = settings.weights() if hasattr(settings, "weights") else {}
    found |= {f"method.{key}": value for key, value in ({"name": name} | settings.model_dump() | weights).items()}
    for role in ("base", "augmented"):
        found[f"views.{role}"] = dataclasses.asdict(augmentation(config, role))
    return found
