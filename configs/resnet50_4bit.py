r"""ResNet-50 on ImageNet with 4-bit weights and activations.

    python -m saq_jax.main --config configs/resnet50_4bit.py

The paper's claim: 4-bit ResNet-50, +0.9 % top-1 over the best result before it (abstract).

Recipe: [code], from its script for ResNet-18 at 4 bits (SGD, 90 epochs, cosine, batch 512, rho
0.3); that the same holds for ResNet-50 is [ours].

ImageNet is prepared once (docs/data.md). `init_from` names the weights to start from, which
`huggingface_hub` fetches once (pip install 'saq_jax[hub]'); a directory or file of your own does
as well.

Hardware and hours: not measured; ImageNet has not been trained here yet.
"""

from ml_collections import config_dict

from saq_jax.training import recipes
from saq_jax.training.parsing import default_config


def get_config() -> config_dict.ConfigDict:
  """ResNet-50 at 4 bits."""
  config = default_config()
  recipes.image_data(config, 'imagenet2012', batch_size=512)
  recipes.authors_quantization(config, bits=4)
  recipes.authors_imagenet_stage(config)
  config.model.name, config.model.depth = 'resnet', 50
  config.init_from = 'hf://timm/resnet50.tv_in1k'
  return config
