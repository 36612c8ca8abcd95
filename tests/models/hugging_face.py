"""Tiny models of transformers with random weights, saved to folders; nothing is fetched."""

from pathlib import Path

import torch
import transformers

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VOCAB_SIZE = 91
TEXT = {
    "bert": lambda: transformers.BertConfig(**TINY, vocab_size=VOCAB_SIZE, max_position_embeddings=24),
    "roberta": lambda: transformers.RobertaConfig(**TINY, vocab_size=VOCAB_SIZE, max_position_embeddings=24),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=VOCAB_SIZE, bos_token_id=2, eos_token_id=2
    ),
    "t5": lambda: transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=VOCAB_SIZE),
    "deberta": lambda: transformers.DebertaV2Config(**TINY, vocab_size=VOCAB_SIZE),
}
VISION = {
    "vit": lambda: transformers.ViTConfig(**TINY, image_size=32, patch_size=8),
    "dinov2": lambda: transformers.Dinov2Config(**TINY, image_size=32, patch_size=8),
    "swin": lambda: transformers.SwinConfig(
        embed_dim=8, depths=[1, 1], num_heads=[1, 2], image_size=32, window_size=4, patch_size=4
    ),
    "resnet": lambda: transformers.ResNetConfig(
        hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8, layer_type="basic"
    ),
}
BOTH = {
    "clip": lambda: transformers.CLIPConfig(
        text_config={**TINY, "vocab_size": VOCAB_SIZE, "bos_token_id": 2, "eos_token_id": 3},
        vision_config={**TINY, "image_size": 32, "patch_size": 8},
    ),
    "siglip": lambda: transformers.SiglipConfig(
        text_config={**TINY, "vocab_size": VOCAB_SIZE, "max_position_embeddings": 20, "projection_size": 32},
        vision_config={**TINY, "image_size": 32, "patch_size": 8},
    ),
}


def save_model(name: str, folder: Path) -> Path:
    """Writes a random model, moved away from its start, where zero biases would hide a mistake."""
    config = (TEXT | VISION | BOTH)[name]()
    torch.manual_seed(1)
    model = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder / name)
    return folder / name


def save_tokenizer(folder: Path) -> Path:
    """Writes a WordPiece tokenizer of `VOCAB_SIZE` ids with BERT's special tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["a", "red", "green", "blue", "yellow", "square", "bar", "column", "corner", "number"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters[1:], *(f"##{c}" for c in letters)]
    vocabulary += [f"[unused{i}]" for i in range(VOCAB_SIZE - len(vocabulary))]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)
    return folder
