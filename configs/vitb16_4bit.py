r"""ViT-B/16 on ImageNet with 4-bit weights and activations.

    python -m saq_jax.main --config configs/vitb16_4bit.py

The paper's claim: 4-bit ViT-B/16, +1.2 % top-1 over AdamW (abstract); its absolute figure is not
known to us.

Recipe: [later code], which trained DeiT, with DeiT's augmentation (recipes.deit_augmentation).

ImageNet is prepared once (docs/data.md). `init_from` names the weights to start from, which
`huggingface_hub` fetches once (pip install 'saq_jax[hub]'); a directory or file of your own does
as well.

Hardware and hours: not measured; ImageNet has not been trained here yet.
"""

from ml_collections import config_dict

from saq_jax.training import recipes
from saq_jax.training.parsing import default_config


def get_config() -> config_dict.ConfigDict:
  """ViT-B/16 at 4 bits."""
  config = default_config()
  recipes.image_data(config, 'imagenet2012', batch_size=512)
  recipes.transformer_quantization(config, bits=4)
  config.model.name, config.model.size = 'vit', 'B'
  recipes.transformer_stage(config, epochs=300.0, lr=5e-4)
  config.init_from = 'hf://timm/vit_base_patch16_224.augreg_in21k_ft_in1k'
  config.data.mean = config.data.std = (0.5, 0.5, 0.5)  # as these weights were trained
  return config
