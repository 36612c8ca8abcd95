"""What methods ask of the towers, and which tensors stay on the host."""

from types import SimpleNamespace

import pytest
import torch

from models.registry import build_model
from trainer.methods.clip import ClipMethod, ClipSettings
from trainer.methods.declip import DeclipMethod, DeclipSettings
from trainer.pipeline import TrainData

LENGTHS = torch.tensor([[4, 7, 5], [9, 3, 6], [5, 8, 4]])
MLM_INDEX = torch.tensor([1, 9 + 4, 9 + 5, 18 + 2])


def make_method(method: type, settings: object) -> ClipMethod | DeclipMethod:
    torch.manual_seed(0)
    model = build_model("vit_pico_p8_32", vocab_size=300, context_length=16, patch_dropout=0.5)
    return method(model, settings, None)


def make_batch(image_views: int, text_views: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "images": torch.randint(256, (image_views, 3, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "token_ids": torch.randint(1, 300, (text_views, 3, 9), generator=generator),
        "text_lengths": LENGTHS[:text_views],
        "mlm_index": MLM_INDEX,
        "mlm_targets": torch.tensor([5, 6, 7, 8]),
        "view_keys": torch.randint(2**62, (image_views, 3), generator=generator),
    }


@pytest.mark.parametrize("shared_pass", [True, False])
def test_masked_rows_come_from_the_masked_view(shared_pass):
    settings = DeclipSettings(mlm_shared_pass=shared_pass, nns_queue_size=8, iss_hidden_dim=8, iss_predictor_dim=4)
    method = make_method(DeclipMethod, settings)
    masked_view = method.text_views.index("masked")
    assert masked_view == (0 if shared_pass else 2)
    batch = make_batch(2, len(method.text_views))
    # The masked positions lie within the captions of the masked view.
    batch["text_lengths"] = batch["text_lengths"].clone()
    batch["text_lengths"][masked_view] = LENGTHS[0]
    features = method.encode(batch)
    for row, index in zip(features["mlm_rows"], MLM_INDEX.tolist(), strict=True):
        caption, position = divmod(index, 9)
        prefix = batch["token_ids"][masked_view, caption, : position + 1]
        alone = method.model.encode_text(
            prefix[None], torch.tensor([position + 1]), state_rows=torch.tensor([position])
        )
        torch.testing.assert_close(row, alone.states[0], atol=1e-5, rtol=1e-5)
    assert features["text_features"].shape == (2, 3, 128)


def test_image_features_follow_the_view_keys():
    method, batch = make_method(ClipMethod, ClipSettings()), make_batch(1, 1)
    features = method.encode(batch)["image_features"]
    assert torch.equal(method.encode(batch)["image_features"], features)
    batch["view_keys"] = batch["view_keys"] + 1
    assert not torch.isclose(method.encode(batch)["image_features"], features).all(dim=-1).any()


def test_tensors_that_decide_shapes_stay_on_the_host():
    batch = {**make_batch(1, 1), "bad_samples": []}
    moved = TrainData.to_device(SimpleNamespace(_device=torch.device("meta"), _copies=None), batch)
    on_host = {name for name, value in moved.items() if torch.is_tensor(value) and value.device.type == "cpu"}
    assert on_host == {"text_lengths", "mlm_index"}
    assert moved.keys() == batch.keys()
