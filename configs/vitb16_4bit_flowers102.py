r"""ViT-B/16 on Oxford Flowers-102 with 4-bit weights and activations.

    python -m saq_jax.main --config configs/vitb16_4bit_flowers102.py

The paper uses Oxford Flowers-102 (v5); its figures are not known to us.

Recipe: [later code] for small datasets (AdamW, rate 2e-4 for a batch of 512, 100 epochs), which
it has for CIFAR; for these 2,040 training images it is [ours].

The dataset is prepared once (docs/data.md). `init_from` names ImageNet weights, which
`huggingface_hub` fetches once (pip install 'saq_jax[hub]'); the head is replaced.

Hardware and hours: not measured.
"""

from ml_collections import config_dict

from saq_jax.training import recipes
from saq_jax.training.parsing import default_config


def get_config() -> config_dict.ConfigDict:
  """ViT-B/16 at 4 bits."""
  config = default_config()
  recipes.image_data(config, 'oxford_flowers102', batch_size=128)
  recipes.transformer_quantization(config, bits=4)
  config.model.name, config.model.size = 'vit', 'B'
  recipes.transformer_stage(config, epochs=100.0, lr=2e-4)
  config.init_from = 'hf://timm/vit_base_patch16_224.augreg_in21k_ft_in1k'
  config.data.mean = config.data.std = (0.5, 0.5, 0.5)  # as these weights were trained
  return config
